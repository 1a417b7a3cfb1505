"""Tiny real models, a tiny real tokenizer, a text and a recipe that fits them."""

import copy
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Tests share the cores as processes, and models this small gain nothing from threads. Read when torch is imported,
# here and in the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import yaml
from forked import Forks, serving
from tiny import NARROW, TINY, VOCAB_SIZE, text_data

# Torch and transformers are imported where they are used: the process that shares the tests out does without.
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast
    from typer.testing import Result


def pytest_collection_finish() -> None:
    """Leave what is imported and collected by now out of every collection of garbage to come: it stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _without_syncs() -> Iterator[None]:
    """Save the time of syncs: no test outlives its machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """The server of processes that have imported everything already, one for all workers of pytest."""
    folder = tmp_path_factory.getbasetemp()
    with serving((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "forks") as started:
        yield started


@pytest.fixture(scope="session")
def build_model() -> "Callable[..., PreTrainedModel]":
    """Make a tiny random model of an architecture; keywords change its config."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    def build(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> "PreTrainedModel":
        torch.manual_seed(seed)
        config = CONFIG_MAPPING[architecture](**{**TINY, **changes})
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
def tokenizer(corpus: list[str]) -> "PreTrainedTokenizerFast":
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(corpus, vocab_size=VOCAB_SIZE, special_tokens=["<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained.to_str()), eos_token="<eos>", pad_token="<eos>"
    )


@pytest.fixture(scope="session")
def model_folders(
    tmp_path_factory: pytest.TempPathFactory, build_model: "Callable[..., PreTrainedModel]", tokenizer: Any
) -> dict[str, Path]:
    """A teacher of 4 blocks and width 32, and a student of 2 blocks and width 16."""
    root = tmp_path_factory.mktemp("models")
    build_model().save_pretrained(root / "teacher")
    build_model(seed=1, **NARROW).save_pretrained(root / "narrow")
    for name in ("teacher", "narrow"):
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in ("teacher", "narrow")}


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path], corpus: list[str]) -> Path:
    """The output of a narrow student's run with every term of the loss, judged after each epoch; not to be changed."""
    root = tmp_path_factory.mktemp("whole")
    data = {
        "output": str(root / "run"),
        "cache": str(root / "caches"),
        "teacher": {"path": str(model_folders["teacher"]), "dtype": "float32"},
        "data": text_data(root, corpus, train_rows=16),
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
def teacher(build_model: Callable[..., Any]) -> Any:
    """A teacher of 4 blocks and width 32."""
    return build_model()


@pytest.fixture
def student(build_model: Callable[..., Any]) -> Any:
    """A student of 2 blocks and width 16."""
    return build_model(seed=1, **NARROW)


@pytest.fixture
def workplace(tmp_path: Path, model_folders: dict[str, Path]) -> Path:
    """A folder with a teacher and a narrow student of its own, which a test may delete."""
    for name, folder in model_folders.items():
        shutil.copytree(folder, tmp_path / name)
    return tmp_path


@pytest.fixture
def recipe_data(workplace: Path, corpus: list[str]) -> dict[str, Any]:
    """A recipe as a map: prune 4 blocks to 3, packed rows of 24 tokens of a text in the workplace."""
    return {
        "output": str(workplace / "run"),
        "cache": str(workplace / "caches"),
        "teacher": {"path": str(workplace / "teacher"), "dtype": "float32", "batch_size": 4},
        "data": text_data(workplace, corpus),
        # What is not asked of most tests takes no time in them.
        "student": {"prune": {"layers": {"remove": 1, "method": "last"}, "reconstruct": False}},
        "targets": {"logits": {"kind": "topk", "k": 16, "temperatures": [1, 2]}},
        "mapping": {"strategy": "kept"},
        "loss": {"alpha": 0.5, "beta": 0.5, "gamma": 0.1, "temperature": 2.0, "hidden": "mse"},
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
def coldstill() -> "Callable[..., Result]":
    """Run the command line in this process."""
    from commanding import run_command

    return run_command
