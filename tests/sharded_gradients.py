"""Run by torchrun: a distiller that FSDP2 shards, as accelerate does it, has the gradients of the whole on one process.

Sharding by accelerate itself wants a GPU; what it calls does not.
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from coldstill.pipeline.losses.objective import Objective
from coldstill.pipeline.models.output_head import OutputHead
from coldstill.pipeline.models.projectors import create_projectors
from coldstill.pipeline.recipe.loss import LossConfig
from coldstill.pipeline.stage_two.distiller import Distiller, TargetForms
from coldstill.pipeline.targets.encodings import StateForm
from coldstill.pipeline.targets.forms import FINAL, FinalForm, HiddenForm

WIDTH, TEACHER_WIDTH, VOCAB, LENGTH = 32, 48, 384, 16
LAYER_MAP = {0: 1, 2: 3}


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = build(tied=sys.argv[1] == "tied")
    batch = make_batch()
    num_positions = (batch["labels"][:, 1:] != -100).sum()
    want = gradients(whole, batch, num_positions)
    sharded = copy.deepcopy(whole)
    sharded.zero_grad()
    mesh = init_device_mesh("cpu", (world,))
    for block in sharded.student.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    rows = slice(rank * 2, rank * 2 + 2)
    own = {
        "input_ids": batch["input_ids"][rows],
        "labels": batch["labels"][rows],
        "logits": {FINAL: {"values": batch["logits"][FINAL]["values"][rows]}},
        "hidden": {name: {"values": arrays["values"][rows]} for name, arrays in batch["hidden"].items()},
    }
    # Gradients are averaged over processes, while the count is over all of them.
    got = gradients(sharded, own, num_positions / world)
    for name, value in want.items():
        error = (got[name] - value).abs().max() / value.abs().max()
        assert error < 1e-5, f"{name}: {error:.2g}"
    if rank == 0:
        sys.stdout.write(f"equal: {len(want)} gradients\n")
    dist.barrier()
    sys.stdout.flush()
    # At the interpreter's end, gloo's threads abort a sharded process now and then; nothing is left to be done.
    os._exit(0)


def build(*, tied: bool) -> Distiller:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    projectors = create_projectors(LAYER_MAP, student_dim=WIDTH, teacher_dim=TEACHER_WIDTH, seed=1)
    objective = Objective.of(LossConfig(alpha=0.5, beta=0.5, gamma=0.1, delta=0.2, temperature=2.0, hidden="mse"))
    forms = TargetForms(
        FinalForm(StateForm("float32"), OutputHead(torch.randn(VOCAB, TEACHER_WIDTH))),
        HiddenForm(StateForm("float32")),
    )
    return Distiller(LlamaForCausalLM(config), projectors, layer_map=LAYER_MAP, objective=objective, forms=forms)


def make_batch() -> dict:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCAB, (4, LENGTH), generator=generator)
    labels = ids.clone()
    labels[1, :6] = -100  # processes count differently many

    def states() -> dict[str, torch.Tensor]:
        return {"values": torch.randn(4, LENGTH, TEACHER_WIDTH, generator=generator)}

    hidden = {str(block): states() for block in LAYER_MAP.values()}
    return {"input_ids": ids, "labels": labels, "logits": {FINAL: states()}, "hidden": hidden}


def gradients(distiller: Distiller, batch: dict, num_positions: torch.Tensor) -> dict[str, torch.Tensor]:
    distiller(**batch, num_items_in_batch=num_positions)["loss"].backward()
    found = {name: value.grad for name, value in distiller.named_parameters() if value.grad is not None}
    return {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in found.items()}


if __name__ == "__main__":
    main()
