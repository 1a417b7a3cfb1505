"""Blocks are cut from every kind of architecture: what stays computes what it did, or the cut is one line."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hooks import has_hooks
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from versions import INSTALLED, since

from coldstill.pipeline.models import find_parts, load_model, take_apart
from coldstill.pipeline.runtime.errors import ModelError
from coldstill.pipeline.students.cut_check import check_cut
from coldstill.pipeline.students.depth import block_importances, cut_blocks
from coldstill.pipeline.students.layer_patterns import cut_patterns

CUTS = ([1, 3], [0, 1])
SMALL = {"num_hidden_layers": 6, "vocab_size": 96}
IDS = torch.arange(1, 25).unsqueeze(0)


@dataclass(frozen=True)
class Case:
    """A tiny teacher of six blocks; what is refused of its cuts, by the first removed block."""

    architecture: str
    changes: dict[str, Any] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    since: str = "5.6"


WINDOW = {"sliding_window": 8}
KINDS = [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full", "sliding")]
LINEAR = [f"{kind}_attention" for kind in ("linear", "full", "linear", "linear", "full", "linear")]
CONVOLUTIONS = ["conv", "full_attention", "conv", "conv", "full_attention", "conv"]
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GROUPED = {"n_group": 1, "topk_group": 1}
DEEPSEEK = {
    **GROUPED,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
GPT = {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64, "n_ctx": 64, "n_inner": 48}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
ZAMBA = {
    "mamba_d_state": 8,
    "n_mamba_heads": 8,
    "mamba_ngroups": 1,
    "chunk_size": 8,
    "num_mem_blocks": 1,
    "adapter_rank": 4,
    "num_key_value_heads": 4,
}
PER_LAYER_INPUTS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}

CASES = {
    # Equal blocks.
    "llama": Case("llama"),
    "mistral": Case("mistral", WINDOW),
    "qwen2": Case("qwen2"),
    "qwen3": Case("qwen3", HEADS),
    "gemma": Case("gemma", HEADS),
    "phi": Case("phi"),
    "phi3": Case("phi3", WINDOW),
    "gpt2": Case("gpt2", GPT),
    "gpt_neox": Case("gpt_neox"),
    "gpt_neox-serial": Case("gpt_neox", {"use_parallel_residual": False}),
    "gptj": Case("gptj", {**GPT, "rotary_dim": 4}),
    "codegen": Case("codegen", {**GPT, "rotary_dim": 4}),
    "gpt_bigcode": Case("gpt_bigcode", GPT),
    "openai-gpt": Case("openai-gpt", GPT),
    "opt": Case("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": Case("bloom", {"n_layer": 6, "n_head": 4}),
    "falcon": Case("falcon"),
    "falcon-new": Case("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": Case("falcon", {"alibi": True, "parallel_attn": False, "bias": True}),
    "mpt": Case("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 6, "expansion_ratio": 2, "max_seq_len": 64}),
    "stablelm": Case("stablelm", {"num_key_value_heads": 4}),
    "stablelm-parallel": Case("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "cohere": Case("cohere"),
    "granite": Case("granite", {"residual_multiplier": 0.3}),
    "olmo": Case("olmo"),
    "olmo2": Case("olmo2"),
    "starcoder2": Case("starcoder2", WINDOW),
    "nemotron": Case("nemotron"),
    "glm": Case("glm", HEADS),
    "ernie4_5": Case("ernie4_5", HEADS),
    "helium": Case("helium", HEADS),
    "persimmon": Case("persimmon"),
    "xglm": Case("xglm", {"d_model": 32, "ffn_dim": 48, "num_layers": 6, "attention_heads": 4}),
    "biogpt": Case("biogpt"),
    "ctrl": Case("ctrl", {**GPT, "dff": 48}),
    "nanochat": Case("nanochat"),
    "doge": Case("doge", since="5.18"),
    # Equal mixtures of experts.
    "mixtral": Case("mixtral", LOCAL_EXPERTS),
    "phimoe": Case("phimoe", LOCAL_EXPERTS),
    "granitemoe": Case("granitemoe", LOCAL_EXPERTS),
    "olmoe": Case("olmoe", EXPERTS),
    "jetmoe": Case("jetmoe", {"kv_channels": 8, "num_local_experts": 4}),
    "minimax_m2": Case("minimax_m2", {**HEADS, **LOCAL_EXPERTS, "rotary_dim": 4}),
    # Kinds of attention by block, from a list or a period.
    "ministral": Case("ministral", {**HEADS, **WINDOW, "layer_types": KINDS}),
    "qwen2-windowed": Case("qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 3}),
    "qwen3-windowed": Case("qwen3", {**HEADS, **WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    "gemma2": Case("gemma2", {**HEADS, **WINDOW, "query_pre_attn_scalar": 8}),
    "gemma3_text": Case("gemma3_text", {**HEADS, **WINDOW, "query_pre_attn_scalar": 8, "sliding_window_pattern": 3}),
    "cohere2": Case("cohere2", {**HEADS, **WINDOW, "sliding_window_pattern": 3}),
    "exaone4": Case("exaone4", {**WINDOW, "sliding_window_pattern": 3}),
    "olmo3": Case("olmo3", WINDOW),
    "cwm": Case("cwm", {**HEADS, **WINDOW}),
    "granite_swa": Case("granite_swa", {**WINDOW, "layer_types": KINDS}, since="5.15"),
    "gpt_oss": Case("gpt_oss", {**HEADS, **WINDOW, **LOCAL_EXPERTS}),
    "smollm3": Case("smollm3", {**WINDOW, "no_rope_layer_interval": 3, "use_sliding_window": True}),
    "gpt_neo": Case(
        "gpt_neo", {"num_layers": 6, "num_heads": 4, "window_size": 8, "attention_types": [[["global", "local"], 3]]}
    ),
    "modernbert-decoder": Case(
        "modernbert-decoder",
        {"local_attention": 8, "global_attn_every_n_layers": 3, "cls_token_id": 0, "sep_token_id": 0},
        # Only the first block has no norm in front of its attention.
        {0: "block 2 as block 0 is another by its attn_norm.weight, which there would be no place for"},
    ),
    # Dense and sparse blocks.
    "qwen2_moe-step": Case("qwen2_moe", {**SHARED_EXPERT, "decoder_sparse_step": 2}),
    "qwen2_moe-list": Case("qwen2_moe", {**SHARED_EXPERT, "mlp_only_layers": [0, 3, 5]}),
    "qwen3_moe-step": Case("qwen3_moe", {**HEADS, **EXPERTS, "decoder_sparse_step": 2}),
    "qwen3_moe-both": Case("qwen3_moe", {**HEADS, **EXPERTS, "decoder_sparse_step": 3, "mlp_only_layers": [2]}),
    "qwen3_moe-long-list": Case("qwen3_moe", {**HEADS, **EXPERTS, "mlp_only_layers": list(range(6))}),
    "deepseek_v2": Case("deepseek_v2", {**DEEPSEEK, **LATENT}),
    "deepseek_v3": Case("deepseek_v3", {**DEEPSEEK, **LATENT}),
    "glm4_moe": Case("glm4_moe", {**DEEPSEEK, **HEADS}),
    "glm4_moe_lite": Case("glm4_moe_lite", {**DEEPSEEK, **LATENT}),
    "dots1": Case("dots1", {**DEEPSEEK, **HEADS}),
    "hunyuan_v1_moe": Case("hunyuan_v1_moe", {**HEADS, "num_experts": 4, "moe_topk": [1, 2, 1, 2, 2, 1]}),
    "hy_v3": Case("hy_v3", {**HEADS, **EXPERTS}),
    "ernie4_5_moe": Case(
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 4,
            "moe_layer_interval": 2,
        },
    ),
    # Both.
    "exaone_moe": Case("exaone_moe", {**WINDOW, **EXPERTS, **GROUPED, "num_shared_experts": 1, "layer_types": KINDS}),
    "afmoe": Case(
        "afmoe",
        {
            **HEADS,
            **WINDOW,
            **EXPERTS,
            **GROUPED,
            "num_shared_experts": 1,
            "num_dense_layers": 2,
            "global_attn_every_n_layers": 3,
        },
    ),
    "llama4_text": Case(
        "llama4_text",
        {
            **HEADS,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 3,
            "attention_chunk_size": 8,
        },
    ),
    "mellum": Case("mellum", {**HEADS, **WINDOW, **EXPERTS, "layer_types": KINDS}, since="5.10"),
    "mimo_v2_flash": Case("mimo_v2_flash", {**HEADS, **WINDOW, **DEEPSEEK, "v_head_dim": 8}, since="5.15"),
    # A part for each block outside the blocks, a width of its own, keys and values that others read.
    "gemma4_text": Case(
        "gemma4_text",
        {**HEADS, **WINDOW, **PER_LAYER_INPUTS, "global_head_dim": 16, "layer_types": [*KINDS[:5], KINDS[1]]},
        # All releases but one mark the last block of a kind as one whose keys and values are read, even if by none.
        {}
        if INSTALLED.release[:2] == (5, 23)
        else {1: "block 2 as block 1 is another by its self_attn.store_full_length_kv"},
    ),
    "gemma3n_text": Case(
        "gemma3n_text",
        {
            **HEADS,
            **WINDOW,
            **PER_LAYER_INPUTS,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "num_kv_shared_layers": 2,
            "layer_types": [KINDS[1], KINDS[0], KINDS[0], KINDS[1], KINDS[0], KINDS[1]],
            "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.5, 0.0],
        },
        # The last block reads the keys and values of block 3.
        {1: "block 0 as block 0 is another by its self_attn.store_full_length_kv, which would be True, and is False"},
    ),
    # Arithmetic of the index, or of the number of blocks.
    "gpt2-inverse": Case("gpt2", {**GPT, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2-upcast": Case("gpt2", {**GPT, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "diffllama": Case("diffllama"),
    "minicpm3": Case("minicpm3", {**LATENT, "scale_depth": 1.4}, since="5.15"),
    "gpt_neox_japanese": Case("gpt_neox_japanese", {"intermediate_multiple_size": 2}),
    "minimax": Case("minimax", {**HEADS, "num_local_experts": 4, "block_size": 8, "layer_types": LINEAR}),
    "rwkv": Case(
        "rwkv",
        {"attention_hidden_size": 32},
        {0: "block 2 as block 0 is another by its pre_ln.weight, which is not there"},
    ),
    # Attention beside other mixers.
    "mamba": Case("mamba", {"state_size": 8}),
    "mamba2": Case(
        "mamba2", {"state_size": 8, "expand": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
    ),
    "falcon_h1": Case("falcon_h1", {**MAMBA, "mamba_d_ssm": 64}),
    "bamba": Case("bamba", {**MAMBA, "attn_layer_indices": [1, 4]}),
    "granitemoehybrid": Case(
        "granitemoehybrid",
        {**MAMBA, **LOCAL_EXPERTS, "shared_intermediate_size": 16, "layer_types": LINEAR},
        since="5.15",
    ),
    "jamba": Case(
        "jamba",
        {
            "attn_layer_period": 3,
            "attn_layer_offset": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "jamba-no-period": Case(
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
            "expert_layer_period": 4,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
        {
            1: "block 2 as block 1 is another by its mamba.A_log, which is not there "
            "(its config says which block is of which kind by attn_layer_period, attn_layer_offset,"
        },
    ),
    "zamba": Case(
        "zamba",
        {
            "mamba_d_state": 8,
            "n_mamba_heads": 2,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "num_key_value_heads": 4,
        },
        since="5.15",
    ),
    "zamba2": Case("zamba2", {**ZAMBA, "layers_block_type": [LINEAR[0], "hybrid", *LINEAR[2:4], "hybrid", LINEAR[5]]}),
    "zamba2-two": Case(
        "zamba2",
        {
            **ZAMBA,
            "num_mem_blocks": 2,
            "use_shared_attention_adapter": True,
            "layers_block_type": ["hybrid", LINEAR[0], "hybrid", LINEAR[0], "hybrid", "hybrid"],
        },
        {0: "block 2 as block 0 is another by its shared_transformer.block_id, which would be 0, and is 1"},
        since="5.18",
    ),
    "qwen3_next": Case(
        "qwen3_next", {**SHARED_EXPERT, **DELTA, "full_attention_interval": 2, "decoder_sparse_step": 2}
    ),
    "qwen3_5_text": Case("qwen3_5_text", {**DELTA, "layer_types": LINEAR}),
    "olmo_hybrid": Case("olmo_hybrid", {**DELTA, "linear_num_key_heads": 2, "layer_types": [*LINEAR[:5], LINEAR[1]]}),
    "lfm2": Case("lfm2", {"layer_types": CONVOLUTIONS}),
    "lfm2_moe": Case("lfm2_moe", {**EXPERTS, "layer_types": CONVOLUTIONS, "num_dense_layers": 2}),
    "recurrent_gemma": Case(
        "recurrent_gemma",
        {
            **HEADS,
            "lru_width": 32,
            "attention_window_size": 8,
            "block_types": ["recurrent", "attention", "recurrent"],
        },
    ),
    "nemotron_h": Case(
        "nemotron_h",
        {
            **HEADS,
            "layers_block_type": [*LINEAR[:1], "moe", LINEAR[1], "mlp", *LINEAR[:2]],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
        since="5.15",
    ),
}


def known(*names: str) -> list[Any]:
    """The names of cases, each left out where the installed transformers does not have it, or not right."""
    return [pytest.param(name, marks=since(CASES[name].since)) for name in names]


def skip(model: PreTrainedModel, blocks: nn.ModuleList, removed: list[int]) -> Callable[[], None]:
    """Let blocks give on what they were given, without running; the answer undoes it."""
    outputs: dict[int, Any] = {}
    handles = [
        blocks[block].register_forward_hook(lambda _m, _a, output, block=block: outputs.update({block: output}))
        for block in removed
    ]
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    for block in removed:

        def forward(hidden_states: Any, *args: Any, output: Any = outputs[block], **kwargs: Any) -> Any:
            if isinstance(output, torch.Tensor):
                return hidden_states
            return type(output)([hidden_states, *[None] * (len(output) - 1)])

        blocks[block].forward = forward

    def undo() -> None:
        for block in removed:
            del blocks[block].forward

    return undo


@pytest.mark.parametrize("name", known(*CASES))
def test_a_cut_model_in_plain_transformers_is_the_teacher_with_its_blocks_skipped(name, build_model, tmp_path):
    case = CASES[name]
    model = build_model(case.architecture, **{**SMALL, **case.changes})
    parts = find_parts(model)  # some of them have a head that is not known, which is no matter of the cut
    for removed in CUTS:
        kept = [block for block in range(6) if block not in removed]
        if removed[0] in case.refused:
            with pytest.raises(ModelError) as raised:
                cut_blocks(parts, kept)
            line = str(raised.value)
            assert line.startswith(f"{type(model).__name__} cannot be cut by blocks {removed[0]}, {removed[1]}: ")
            assert case.refused[removed[0]] in line
            assert len(line.splitlines()) == 1
            continue
        cut_blocks(parts, kept).save_pretrained(tmp_path / str(removed))
        student, loading = AutoModelForCausalLM.from_pretrained(tmp_path / str(removed), output_loading_info=True)
        assert not any(loading.values())
        assert student.config.kept_blocks == kept
        undo = skip(model, parts.blocks, removed)
        with torch.no_grad():
            expected = model(input_ids=IDS, use_cache=False).logits
            got = student.eval()(input_ids=IDS, use_cache=False).logits
        undo()
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        answers = [
            student.generate(IDS[:, :12], max_new_tokens=3, do_sample=False, eos_token_id=None, use_cache=use_cache)
            for use_cache in (True, False)
        ]
        assert torch.equal(*answers)


@pytest.fixture(scope="module")
def halved(build_model, tmp_path_factory):
    """Load a tiny teacher of an architecture as a teacher in half precision is loaded."""

    def load(name: str, dtype: str) -> PreTrainedModel:
        folder = tmp_path_factory.mktemp(name)
        build_model(CASES[name].architecture, **{**SMALL, **CASES[name].changes}).save_pretrained(folder)
        return load_model(folder, dtype=dtype)

    return load


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", known("llama", "gpt2-inverse", "diffllama", "minicpm3", "gemma3_text", "mimo_v2_flash")
)
def test_a_cut_in_half_precision_is_the_teacher_with_its_blocks_skipped(name, dtype, halved):
    model = halved(name, dtype)
    parts = take_apart(model)
    student = cut_blocks(parts, [0, 2, 4, 5])
    skip(model, parts.blocks, [1, 3])
    with torch.no_grad():
        expected, got = (each(input_ids=IDS, use_cache=False).logits.float() for each in (model, student))
    assert (got - expected).norm() <= 4 * torch.finfo(model.dtype).eps * expected.norm()


def test_weights_that_transformers_keeps_in_float32_stay_so(halved):
    model = halved("deepseek_v3", "bfloat16")
    student = cut_blocks(take_apart(model), [0, 2, 4, 5])
    for name, block in (("4", "2"), ("5", "3")):
        bias = model.get_buffer(f"model.layers.{name}.mlp.gate.e_score_correction_bias")
        cut = student.get_buffer(f"model.layers.{block}.mlp.gate.e_score_correction_bias")
        assert bias.dtype == cut.dtype == torch.float32
        assert torch.equal(bias, cut)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        # Relatives of what GPT-2 and DiffLlama do with a block's index, of a few percent, in an architecture without.
        (lambda block: setattr(block.self_attn, "scaling", block.self_attn.scaling * 1.5), "self_attn.scaling"),
        (lambda block: setattr(block.self_attn.q_norm, "variance_epsilon", 3.0), "q_norm.variance_epsilon"),
        (lambda block: block.mlp.down_proj.weight.data.mul_(1.05), "block 4 does not compute the same as block 2"),
        # Beyond what a few tokens show.
        (lambda block: setattr(block.self_attn, "sliding_window", 4096), "self_attn.sliding_window, which would be 4"),
        (lambda block: setattr(block, "attention_type", "sliding_attention"), "attention_type, which would be sliding"),
    ],
)
def test_a_block_that_is_another_where_it_stands_now_is_named_with_what_of_it(change, reason, dtype, halved):
    parts = take_apart(halved("qwen3", dtype))
    parts.blocks[4].attention_type = "full_attention"
    weights = {name: value.clone() for name, value in parts.model.state_dict().items()}
    kept = [0, 2, 4, 5]
    student = cut_blocks(find_parts(halved("qwen3", dtype)), kept)
    student.model.layers[2].attention_type = "full_attention"
    check_cut(parts, student, kept)
    change(student.model.layers[2])
    with pytest.raises(ModelError) as raised:
        check_cut(parts, student, kept)
    line = str(raised.value)
    assert line.startswith("Qwen3ForCausalLM cannot be cut by blocks 1, 3: block 4 ")
    assert reason in line
    assert line.endswith("; remove other blocks, such as the last ones (student.prune.layers.method: last)")
    assert not has_hooks(parts.model, student)
    assert all(torch.equal(value, weights[name]) for name, value in parts.model.state_dict().items())


def test_the_teacher_is_left_as_it_was_by_cuts_that_mend_and_by_refused_ones(build_model):
    for name, kept in (("gpt2-inverse", [2, 4, 5]), ("diffllama", [2, 4]), ("gemma3n_text", [0, 2, 4, 5])):
        model = build_model(CASES[name].architecture, **{**SMALL, **CASES[name].changes})
        before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
        if name == "gemma3n_text":
            with pytest.raises(ModelError):
                cut_blocks(find_parts(model), kept)
        else:
            cut_blocks(find_parts(model), kept)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert model.config.to_dict() == config
        assert not has_hooks(model)


@pytest.mark.parametrize("name", ["lfm2", "bamba", "qwen3_5_text"])
def test_a_hybrid_that_loses_its_only_attention_is_warned_of_and_generates_without_a_cache(name, build_model):
    parts = find_parts(build_model(CASES[name].architecture, **{**SMALL, **CASES[name].changes}))
    with pytest.warns(UserWarning, match="needs to generate with a cache .*: generate with use_cache=False, or keep"):
        student = cut_blocks(parts, [0, 2, 3, 5])
    with pytest.raises(ValueError, match="Attention layers"):
        student.generate(IDS, max_new_tokens=2, eos_token_id=None)
    assert student.generate(IDS, max_new_tokens=2, eos_token_id=None, use_cache=False).shape == (1, 26)
    cut_blocks(parts, [0, 1, 2, 3])  # one is left: no warning


@pytest.mark.parametrize(
    ("values", "changes"),
    [
        ({"mlp_only_layers": [0, 1, 2, 3, 4, 5]}, {"mlp_only_layers": [0, 1, 2, 3]}),
        ({"attn_layer_indices": [1, 4]}, {"attn_layer_indices": [2]}),
        ({"moe_layers": []}, {"moe_layers": []}),
        ({"num_dense_layers": 4}, {"num_dense_layers": 2}),
        ({"first_k_dense_replace": 9}, {}),
        ({"num_kv_shared_layers": 3}, {"num_kv_shared_layers": 2}),
        ({"layer_types": ["a", "b", "c", "d", "e", "f"]}, {"layer_types": ["a", "c", "e", "f"]}),
        ({"num_layers": 6}, {"num_layers": 4}),
        # As long as there are blocks, and not of them.
        ({"ssm_multipliers": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "eos_token_id": [1, 2, 3, 4, 5, 6]}, {}),
        ({"mtp_layer_types": ["a", "b", "c", "d", "e", "f"], "time_step_limit": [0.0, 1.0]}, {}),
    ],
)
def test_what_a_config_says_of_its_blocks_is_said_of_those_that_stay(values, changes):
    assert cut_patterns(values, [0, 2, 4, 5], num_blocks=6) == {"num_hidden_layers": 4, **changes}


@pytest.mark.parametrize("name", known("gemma3n_text", "openai-gpt", "granitemoehybrid"))
def test_importances_are_measured_whatever_a_block_takes_and_gives(name, build_model):
    model = build_model(CASES[name].architecture, **{**SMALL, **CASES[name].changes})
    rows = [torch.arange(1, 1 + length) for length in (20, 7, 13)]
    importances = block_importances(find_parts(model), rows)
    assert len(importances) == 6
    assert all(0 < importance < 2 for importance in importances)
