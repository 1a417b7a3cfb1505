"""What a token costs, counted off a config, is what torch counts while a model runs, and what files and papers say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from live_memory import LiveMemory
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from coldstill.pipeline.estimates.token_work import TokenWork
from coldstill.pipeline.models import load_config
from coldstill.pipeline.models.outlines import outline_of
from coldstill.pipeline.models.placement import WeightBytes
from coldstill.pipeline.targets.encodings import ENCODING_BYTES, StateForm, encode_state
from coldstill.pipeline.targets.transform_coding import fit_code

ARCHITECTURES = [
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi3", "olmo", "olmo2"
]  # fmt: skip
MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
LENGTH = 24

# Parameters as the models' own pages give them, and the size of their safetensors files in bfloat16 where there is one.
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_70B = {
    "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
QWEN_HALF_B = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
GEMMA3_270M = {
    "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
}  # fmt: skip
KNOWN = [
    pytest.param("llama", SMOLLM2, 134_515_008, 269_060_552, id="SmolLM2-135M"),
    pytest.param("gemma3_text", GEMMA3_270M, 268_098_176, 536_223_056, id="gemma-3-270m"),
    pytest.param("qwen2", QWEN_HALF_B, 494_032_768, None, id="Qwen2.5-0.5B"),
    pytest.param("llama", LLAMA_70B, 70_553_706_496, None, id="Llama-3-70B"),
]


@pytest.mark.parametrize(("kind", "sizes", "num_parameters", "file_bytes"), KNOWN)
def test_parameters_and_bytes_by_config_are_those_of_models_that_are_known(
    kind: str, sizes: dict[str, Any], num_parameters: int, file_bytes: int | None
):
    outline = outline_of(CONFIG_MAPPING[kind](**sizes))
    weights = WeightBytes.of_outline(outline, dtype="bfloat16")
    assert weights.total == 2 * num_parameters
    assert weights.num_blocks == sizes["num_hidden_layers"]
    if file_bytes is not None:
        assert 0 < file_bytes - weights.total < 50_000, "beside its numbers a file has a header"
    # Two for each parameter that is multiplied with: all but the input embedding, where the head is no copy of it.
    work = TokenWork.of(outline, length=1)
    is_tied = sizes.get("tie_word_embeddings", kind == "gemma3_text")
    embedding = 0 if is_tied else sizes["vocab_size"] * sizes["hidden_size"]
    assert work.block_flops + work.head_flops == pytest.approx(2 * (num_parameters - embedding), rel=0.002)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bytes_by_config_are_those_by_the_headers_of_the_files(
    build_model: Callable[..., Any], tmp_path: Path, architecture: str
):
    build_model(architecture).save_pretrained(tmp_path)
    config = load_config(tmp_path)
    by_files = WeightBytes.of(tmp_path, config, dtype="bfloat16")
    assert WeightBytes.of_outline(outline_of(config), dtype="bfloat16") == by_files


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES])
def test_operations_are_those_that_torch_counts_while_the_model_runs(
    build_model: Callable[..., Any], architecture: str
):
    config = build_model(architecture, **MIXTURES.get(architecture, {})).config
    # What torch counts: plain products. Fused kernels for a CPU it does not know.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(0, 384, (2, LENGTH)), use_cache=False)
    work = TokenWork.of(outline_of(config), length=LENGTH)
    assert work.block_flops + work.head_flops == counter.get_total_flops() / (2 * LENGTH)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("llama", {"intermediate_size": 896}), ("qwen3", {"head_dim": 32}), ("gemma3_text", {"head_dim": 32})],
)
def test_numbers_at_work_in_a_block_are_those_that_live_while_it_runs(kind: str, sizes: dict[str, Any]):
    sizes = {
        "vocab_size": 500, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    } | sizes  # fmt: skip
    config = CONFIG_MAPPING[kind](**sizes)
    body = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().base_model
    ids_BT = torch.zeros(4, 256, dtype=torch.long)
    with torch.inference_mode(), LiveMemory() as memory:
        body(input_ids=ids_BT, use_cache=False)
    work = TokenWork.of(outline_of(config), length=256)
    assert memory.peak / ids_BT.numel() / 2 == pytest.approx(work.num_values, rel=0.05)


@pytest.mark.parametrize("form", ["int8", "coded_0.03", "coded_0.2", "float16", "bfloat16", "float32"])
def test_encoding_takes_no_more_memory_than_is_stated(form: str):
    states_ND = torch.randn(4096, 64).bfloat16()
    form = StateForm.parse(form)
    code = fit_code(states_ND.float(), torch.eye(64)) if form.encoding == "coded" else None
    with LiveMemory() as memory:
        encode_state(states_ND, form=form, code=code)
    assert memory.peak <= 1.05 * ENCODING_BYTES[form.encoding] * states_ND.numel()
