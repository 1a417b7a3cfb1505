"""Blocks, final norm and output head of real architectures, by structure; pruning them; refusing what does not fit."""

from pathlib import Path

import pytest
import torch
from hooks import has_hooks

from coldstill.pipeline.models import (
    check_vocabularies,
    load_config,
    load_model,
    load_tokenizer,
    resolve_dtype,
    resolve_folder,
    take_apart,
)
from coldstill.pipeline.models.forward import block_outputs
from coldstill.pipeline.recipe.student import PruneLayersConfig
from coldstill.pipeline.runtime.errors import ModelError, RecipeError
from coldstill.pipeline.students.depth import block_importances, check_prune, choose_kept_blocks

ARCHITECTURES = {
    "llama": ("model.layers", "LlamaRMSNorm", {}),
    "qwen2": ("model.layers", "Qwen2RMSNorm", {}),
    "qwen3": ("model.layers", "Qwen3RMSNorm", {"head_dim": 8}),
    "mistral": ("model.layers", "MistralRMSNorm", {}),
    "gemma2": ("model.layers", "Gemma2RMSNorm", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("model.layers", "Gemma3RMSNorm", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gpt2": ("transformer.h", "LayerNorm", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("gpt_neox.layers", "LayerNorm", {}),
    "phi3": ("model.layers", "Phi3RMSNorm", {}),
    "olmo2": ("model.layers", "Olmo2RMSNorm", {}),
    "olmo": ("model.layers", "OlmoLayerNorm", {}),
}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request, build_model):
    blocks_name, norm, changes = ARCHITECTURES[request.param]
    return build_model(request.param, **changes), blocks_name, norm


def test_parts_are_found_by_structure(architecture):
    model, blocks_name, norm = architecture
    parts = take_apart(model)
    assert parts.blocks_name == blocks_name
    assert len(parts.blocks) == 4
    assert type(parts.final_norm).__name__ == norm
    assert parts.output_head.weight_VD is model.get_output_embeddings().weight
    assert (parts.hidden_size, parts.vocab_size) == (32, 384)


def test_a_head_that_does_something_unknown_is_refused(build_model):
    model = build_model()
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _args, output: output + 1.0)
    with pytest.raises(ModelError, match="output head over last hidden state differs from the model's logits by 1"):
        take_apart(model)


def test_importance_is_least_for_a_block_that_does_nothing_and_leaves_no_hook(build_model):
    model = build_model()
    parts = take_apart(model)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        parts.blocks[2].get_submodule(name).weight.data.zero_()
    rows = [torch.arange(1, 1 + length) for length in (20, 7, 13, 4, 9)]
    importances = block_importances(parts, rows)
    assert importances[2] == pytest.approx(0.0, abs=1e-6)
    assert min(importances[:2] + importances[3:]) > 1e-3
    chosen = choose_kept_blocks(PruneLayersConfig(remove=1), num_blocks=4, importances=importances)
    assert chosen == [0, 1, 3]
    assert not has_hooks(model)


@pytest.mark.parametrize(
    ("section", "kept"),
    [
        ({"method": "last", "remove": 2}, [0, 1, 2, 3]),
        ({"method": "first", "remove": 2}, [2, 3, 4, 5]),
        ({"method": "explicit", "blocks": [1, 4]}, [0, 2, 3, 5]),
    ],
)
def test_each_method_keeps_its_blocks(section, kept):
    assert choose_kept_blocks(PruneLayersConfig(**section), num_blocks=6) == kept


def test_removing_what_is_not_there_is_refused():
    with pytest.raises(RecipeError, match="names block 6; the teacher has blocks 0 to 5"):
        check_prune(PruneLayersConfig(method="explicit", blocks=[6]), num_blocks=6)
    with pytest.raises(RecipeError, match="removes 6 of the teacher's 6 blocks: none is left"):
        check_prune(PruneLayersConfig(remove=6), num_blocks=6)


def test_vocabularies_of_another_size_are_refused(build_model, model_folders):
    other = build_model(vocab_size=100).config
    with pytest.raises(ModelError, match="different vocabularies: 384 entries against 100"):
        check_vocabularies(load_config(model_folders["teacher"]), other)


def test_hooks_are_there_while_the_context_is_open_and_gone_after_an_error(build_model):
    blocks = take_apart(build_model()).blocks

    def fail_inside() -> None:
        with block_outputs(blocks, [0, 2]):
            assert has_hooks(blocks[0])
            assert not has_hooks(blocks[1])
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert not has_hooks(blocks)


def test_what_is_no_model_is_refused_with_its_folder(tmp_path: Path, model_folders):
    with pytest.raises(ModelError, match=f"{tmp_path} holds no model config that transformers can read"):
        load_config(tmp_path)
    with pytest.raises(ModelError, match=f"{tmp_path} holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="no model folder at /nowhere/at/all"):
        resolve_folder("/nowhere/at/all")
    with pytest.raises(ModelError, match="hub cannot be asked for a model of that name"):
        resolve_folder("somebody/some-model", local_only=True)


def test_a_pickled_checkpoint_is_refused(build_model, tmp_path: Path):
    model = build_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="as a causal language model: Error no file named model.safetensors"):
        load_model(tmp_path, dtype="float32")


def test_auto_is_the_dtype_of_the_checkpoint(build_model, tmp_path: Path):
    build_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert resolve_dtype(load_config(tmp_path), "auto") == "bfloat16"
    assert resolve_dtype(load_config(tmp_path), "float32") == "float32"


def test_taking_a_model_apart_runs_its_body_three_times(build_model):
    model, last = build_model(), []

    def note(_body, _args, kwargs):
        last.append(kwargs["input_ids"][0, -1].item())

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    take_apart(model)
    assert last == [7, 7, 8], "below its head, by itself, and with another last token"
