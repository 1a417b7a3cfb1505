"""Models are loaded whole or not at all, and only causal language models: nothing runs on random weights."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSequenceClassification,
    BartForConditionalGeneration,
    BertLMHeadModel,
    PreTrainedModel,
    ViTForImageClassification,
)

from coldstill.pipeline.models import load_config, load_model, take_apart
from coldstill.pipeline.runtime.errors import ModelError
from coldstill.pipeline.runtime.out_of_memory import is_out_of_memory

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BART = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in (("layers", 2), ("ffn_dim", 48))}


@pytest.fixture
def change_weights(model_folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Copy the teacher with other weights; None leaves one out."""

    def change(**changes: torch.Tensor | None) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(model_folders["teacher"], folder)
        weights = {
            **load_file(folder / "model.safetensors"),
            **{key.replace("__", "."): v for key, v in changes.items()},
        }
        weights = {name: value for name, value in weights.items() if value is not None}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return change


@pytest.fixture
def change_config(model_folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    def change(**changes: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(model_folders["teacher"], folder)
        config = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return change


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_model_that_lacks_a_weight_is_refused_by_its_name(change_weights: Callable[..., Path], name: str):
    folder = change_weights(**{name.replace(".", "__"): None})
    with pytest.raises(ModelError, match=re.escape(f"{folder} lacks weights for LlamaForCausalLM: {name}; trans")):
        load_model(folder, dtype="float32")


def test_a_weight_of_another_shape_is_refused_with_both_shapes(change_weights: Callable[..., Path]):
    folder = change_weights(model__layers__2__mlp__up_proj__weight=torch.zeros(40, 32))
    expected = "model.layers.2.mlp.up_proj.weight ([40, 32] there, [48, 32] by the config)"
    with pytest.raises(ModelError, match=re.escape(expected)):
        load_model(folder, dtype="float32")


def test_a_model_with_more_blocks_than_its_config_says_is_refused(change_config: Callable[..., Path]):
    folder = change_config(num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"of its config has no place for: model.layers.3.* and 6 more; they would be"):
        load_model(folder, dtype="float32")


def test_a_bias_that_its_config_does_not_speak_of_is_refused(change_weights: Callable[..., Path]):
    folder = change_weights(model__layers__0__self_attn__q_proj__bias=torch.ones(32))
    with pytest.raises(ModelError, match=r"has no place for: model\.layers\.0\.self_attn\.q_proj\.bias; they would"):
        load_model(folder, dtype="float32")


def test_a_head_of_another_kind_beside_the_model_is_left_out_with_a_word(change_weights: Callable[..., Path], capfd):
    folder = change_weights(value_head__weight=torch.ones(1, 32))
    with pytest.warns(UserWarning, match=r"has weights that LlamaForCausalLM does not use: value_head\.weight"):
        load_model(folder, dtype="float32")
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_what_is_missing_is_said_once(change_weights: Callable[..., Path], capfd):
    with pytest.raises(ModelError, match="lacks weights"):
        load_model(change_weights(lm_head__weight=None), dtype="float32")
    assert "MISSING" not in capfd.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_named_by_their_weight(change_weights: Callable[..., Path], value: float):
    weight = torch.ones(32)
    weight[3] = value
    folder = change_weights(model__layers__3__input_layernorm__weight=weight)
    with pytest.raises(ModelError, match=r"numbers in model\.layers\.3\.input_layernorm\.weight that are not finite"):
        load_model(folder, dtype="float32")


def test_large_numbers_are_finite(change_weights: Callable[..., Path]):
    load_model(change_weights(model__norm__weight=torch.full((32,), 3e38)), dtype="float32")


def test_a_tie_that_the_files_do_not_keep_is_refused(change_config: Callable[..., Path]):
    with pytest.raises(ModelError, match="ties output head and input embedding .*, but has two different ones"):
        load_model(change_config(tie_word_embeddings=True), dtype="float32")


def test_a_model_with_fewer_blocks_than_its_config_says_is_refused(change_config: Callable[..., Path]):
    with pytest.raises(ModelError, match=r"lacks weights for LlamaForCausalLM: model.layers.4.*and 6 more"):
        load_model(change_config(num_hidden_layers=5), dtype="float32")


def test_a_body_without_its_head_is_refused_unless_the_head_is_its_embedding(
    build_model: Callable[..., PreTrainedModel], tmp_path: Path
):
    build_model().model.save_pretrained(tmp_path / "untied")
    with pytest.raises(ModelError, match=r"lacks weights for LlamaForCausalLM: lm_head\.weight"):
        load_model(tmp_path / "untied", dtype="float32")
    tied = build_model(tie_word_embeddings=True)
    tied.model.save_pretrained(tmp_path / "tied")
    ids = torch.arange(8).unsqueeze(0)
    torch.testing.assert_close(load_model(tmp_path / "tied", dtype="float32")(ids).logits, tied(ids).logits)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_classifier_is_refused_whether_or_not_its_embedding_would_do_for_a_head(
    build_model: Callable[..., PreTrainedModel], tmp_path: Path, is_tied: bool
):
    config = build_model(tie_word_embeddings=is_tied).config
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds a LlamaForSequenceClassification, which is no causal language model"):
        load_model(tmp_path, dtype="float32")


def test_what_is_no_decoder_is_refused_by_its_config(tmp_path: Path):
    bart = CONFIG_MAPPING["bart"](vocab_size=64, d_model=32, **BART)
    vit = CONFIG_MAPPING["vit"](**SMALL, image_size=32, patch_size=16)
    for name, model in {"bart": BartForConditionalGeneration(bart), "vit": ViTForImageClassification(vit)}.items():
        model.save_pretrained(tmp_path / name)
    with pytest.raises(ModelError, match="holds an encoder-decoder, BartForConditionalGeneration; Coldstill takes"):
        load_config(tmp_path / "bart")
    with pytest.raises(ModelError, match="holds a ViTForImageClassification, which is no causal language model"):
        load_config(tmp_path / "vit")


def test_a_model_whose_positions_see_later_ones_is_refused(build_model: Callable[..., PreTrainedModel]):
    embedder = build_model("gemma3_text", head_dim=8, use_bidirectional_attention=True)
    with pytest.raises(ModelError, match="another last token changes the logits before it by"):
        take_apart(embedder)
    encoder = BertLMHeadModel(CONFIG_MAPPING["bert"](vocab_size=64, **SMALL)).eval()
    with pytest.raises(ModelError, match="BertLMHeadModel: output head over last hidden state differs"):
        take_apart(encoder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": "four"}, "Field 'num_hidden_layers' expected int, got str (value: 'four')"),
        ({"num_attention_heads": 5}, "The hidden size (32) is not a multiple of the number of attention heads (5)"),
        ({"model_type": "nope"}, "model type `nope`"),
        ({"hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "requires optimum"),
    ],
)
def test_a_config_that_does_not_do_is_one_line(change_config: Callable[..., Path], changes: Any, reason: str):
    folder = change_config(**changes)
    with pytest.raises(ModelError, match=re.escape(reason)) as caught:
        load_model(folder, dtype="float32")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_was_cut_short_is_one_line(model_folders: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "short"
    shutil.copytree(model_folders["teacher"], folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:2000])
    with pytest.raises(ModelError, match=f"{folder} cannot be loaded as a causal language model"):
        load_model(folder, dtype="float32")


@pytest.mark.parametrize(
    ("architecture", "changes", "norm"),
    [
        (
            "opt",
            {"ffn_dim": 48, "word_embed_proj_dim": 32},
            "model.decoder.final_layer_norm",
        ),  # stands before them
        ("bloom", {}, "transformer.ln_f"),  # is not the only one
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False}, None),
    ],
)
def test_the_final_norm_is_what_runs_behind_the_last_block(
    build_model: Callable[..., PreTrainedModel], architecture: str, changes: dict[str, Any], norm: str | None
):
    parts = take_apart(build_model(architecture, **changes))
    assert parts.final_norm is (None if norm is None else parts.model.get_submodule(norm))


def test_a_norm_that_runs_before_the_blocks_is_no_final_norm(build_model: Callable[..., PreTrainedModel]):
    model = build_model("bloom")
    model.transformer.ln_f = torch.nn.Identity()
    assert take_apart(model).final_norm is None


def test_an_output_head_of_another_width_than_the_blocks_is_refused(build_model: Callable[..., PreTrainedModel]):
    model = build_model("opt", ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False)
    with pytest.raises(ModelError, match="its output head reads states of width 16, its blocks write 32"):
        take_apart(model)


def test_a_model_for_which_there_is_no_memory_is_not_called_a_bad_one(change_config: Callable[..., Path]):
    folder = change_config(vocab_size=10**12)
    with pytest.raises(RuntimeError, match="can't allocate memory") as raised:
        load_model(folder, dtype="float32")
    assert is_out_of_memory(raised.value)
