"""Run by torchrun: processes that see different rows multiply the weights of their loss by the same factors."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from live_pair import arguments, distiller_of, rows
from tiny import NARROW, TINY
from transformers import LlamaConfig, LlamaForCausalLM

from coldstill.pipeline.stage_two.distillation_trainer import UniversalDistillationTrainer


def main() -> None:
    folder = Path(sys.argv[1])
    trainer = UniversalDistillationTrainer(
        distiller_of(build(seed=1, **NARROW), hidden="standardised_mse", balance="gradient"),
        args=arguments(folder, max_steps=5, per_device_train_batch_size=2, save_strategy="no", learning_rate=1e-3),
        teacher_model=build(seed=0),
        train_dataset=rows(),
    )
    trainer.train()
    process = trainer.args.process_index
    state = {name: value.double().sum().item() for name, value in trainer.model.state_dict().items()}
    found = {"factors": trainer.model.factors, "norms": trainer.sums()["norms"], "state": state}
    (folder / f"{process}.json").write_text(json.dumps(found))


def build(*, seed: int, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes}))


if __name__ == "__main__":
    main()
