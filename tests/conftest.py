"""Tiny real models, a tiny real tokenizer, a text and a recipe that fits them."""

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Tests share the cores as processes, and models this small gain nothing from threads. Read when torch is imported,
# here and in the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import yaml
from forked import Forks, serving
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

VOCAB_SIZE = 384
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """The server of processes that have imported everything already, one for all workers of pytest."""
    folder = tmp_path_factory.getbasetemp()
    with serving((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "forks") as started:
        yield started


@pytest.fixture(scope="session")
def build_model() -> Callable[..., PreTrainedModel]:
    """Make a tiny random model of an architecture; keywords change its config."""

    def build(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = CONFIG_MAPPING[architecture](**{**COMMON, **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Random weights of the usual size give near-uniform logits; larger ones make every test sharper.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(4.0)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Some hundred paragraphs of English that every CPython carries."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)[:30])
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if len(paragraph) > 80][:300]


@pytest.fixture(scope="session")
def tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(corpus, vocab_size=VOCAB_SIZE, special_tokens=["<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained.to_str()), eos_token="<eos>", pad_token="<eos>"
    )


@pytest.fixture(scope="session")
def model_folders(
    tmp_path_factory: pytest.TempPathFactory, build_model: Callable[..., PreTrainedModel], tokenizer: Any
) -> dict[str, Path]:
    """A teacher of 4 blocks and width 32, and a student of 2 blocks and width 16."""
    root = tmp_path_factory.mktemp("models")
    build_model().save_pretrained(root / "teacher")
    narrow = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    build_model(seed=1, **narrow).save_pretrained(root / "narrow")
    for name in ("teacher", "narrow"):
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in ("teacher", "narrow")}


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path], corpus: list[str]) -> Path:
    """The output of a narrow student's run with every term of the loss, judged after each epoch; not to be changed."""
    root = tmp_path_factory.mktemp("whole")
    (root / "text.txt").write_text("\n".join(corpus))
    source = {"path": "text", "data_files": str(root / "text.txt")}
    data = {
        "output": str(root / "run"),
        "cache": str(root / "caches"),
        "teacher": {"path": str(model_folders["teacher"]), "dtype": "float32"},
        "data": {"sequence_length": 24, "train": {**source, "max_rows": 16}, "eval": {**source, "max_rows": 6}},
        "student": {"path": str(model_folders["narrow"])},
        "targets": {"hidden": {"blocks": [0, 1, 2, 3]}},
        "loss": {"alpha": 0.5, "beta": 0.5, "gamma": 0.1, "delta": 0.1, "temperature": 2.0},
        "train": {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "eval_strategy": "epoch",
            "save_strategy": "no",
        },
    }
    from coldstill.pipeline.evaluate import evaluate
    from coldstill.pipeline.precompute import precompute
    from coldstill.pipeline.recipe.file import load_recipe
    from coldstill.pipeline.train import train

    (root / "recipe.yaml").write_text(yaml.safe_dump(data))
    recipe = load_recipe(root / "recipe.yaml")
    precompute(recipe, show_progress=False)
    train(recipe)
    evaluate(recipe, show_progress=False)
    return Path(recipe.output)


@pytest.fixture
def workplace(tmp_path: Path, model_folders: dict[str, Path], corpus: list[str]) -> Path:
    """A folder with a teacher, a narrow student and a text of its own, which a test may delete."""
    for name, folder in model_folders.items():
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "text.txt").write_text("\n".join(corpus))
    return tmp_path


@pytest.fixture
def recipe_data(workplace: Path) -> dict[str, Any]:
    """A recipe as a map: prune 4 blocks to 3, packed rows of 24 tokens."""
    source = {"path": "text", "data_files": str(workplace / "text.txt")}
    return {
        "output": str(workplace / "run"),
        "cache": str(workplace / "caches"),
        "teacher": {"path": str(workplace / "teacher"), "dtype": "float32", "batch_size": 4},
        "data": {
            "sequence_length": 24,
            "train": {**source, "max_rows": 20},
            "eval": {**source, "max_rows": 6},
        },
        "student": {"prune": {"layers": {"remove": 1, "method": "last"}}},
        "targets": {"logits": {"kind": "topk", "k": 16, "temperatures": [1, 2]}},
        "mapping": {"strategy": "kept"},
        "loss": {"alpha": 0.5, "beta": 0.5, "gamma": 0.1, "temperature": 2.0},
        "train": {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.001, "logging_steps": 2},
    }


@pytest.fixture
def write_recipe(workplace: Path, recipe_data: dict[str, Any]) -> Callable[..., Path]:
    """Write the recipe with changes, `section__key=value`, and give its path."""

    def write(**changes: Any) -> Path:
        data = copy.deepcopy(recipe_data)
        for dotted, value in changes.items():
            section = data
            *parents, last = dotted.split("__")
            for part in parents:
                section = section.setdefault(part, {})
            section[last] = value
        path = workplace / "recipe.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


@pytest.fixture
def coldstill() -> Callable[..., Result]:
    """Run the command line in this process."""
    from coldstill.cli import app

    def run(*arguments: Any, expect: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == expect, result.output
        return result

    return run
