"""What a column is, said once: by the target that its name names."""

import ast
from pathlib import Path

import pytest

from coldstill.cache.errors import FormatError
from coldstill.pipeline.models.sizes import ModelSizes
from coldstill.pipeline.targets.chosen_tokens import LargestLogits, TailDraws
from coldstill.pipeline.targets.encodings import StateForm
from coldstill.pipeline.targets.kinds import KINDS, parse_target
from coldstill.pipeline.targets.states import BlockInput, BlockOutput, FinalState
from coldstill.pipeline.targets.token_logits import LabelLogit, Normaliser
from coldstill.pipeline.targets.tokens import Tokens

ROOT = Path(__file__).parents[4]

TARGETS = {
    "tokens": Tokens(),
    "label_logit": LabelLogit(),
    "logsumexp/1": Normaliser(1.0),
    "logsumexp/0.5": Normaliser(0.5),
    "logits/topk/64/delta": LargestLogits(64, "delta"),
    "logits/topk/16/float32": LargestLogits(16, "float32"),
    "logits/tail/32_16/1_2.5": TailDraws(32, 16, (1.0, 2.5)),
    "logits/final/float16": FinalState(StateForm("float16")),
    "logits/final/coded_0.03": FinalState(StateForm("coded", 0.03)),
    "hidden/12/int8": BlockOutput(StateForm("int8"), 12),
    "hidden/0/coded_0.2_sampled_0.5": BlockOutput(StateForm("coded", 0.2, 0.5), 0),
    "hidden_input/12/int8": BlockInput(StateForm("int8"), 12),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_what_its_name_says(name: str):
    assert parse_target(name) == TARGETS[name]
    assert TARGETS[name].name == name


def test_every_kind_is_among_these():
    assert {type(target) for target in TARGETS.values()} == set(KINDS)


@pytest.mark.parametrize(
    "name",
    [
        "attention/3/int8",
        "hidden/3",
        "hidden/x/int8",
        "hidden/3/int8/more",
        "hidden/03/int8",
        "logsumexp/2.0",
        "logsumexp",
        "logits/topk/many/delta",
        "logits/tail/32/1",
        "logits/top/64/delta",
        "label_logits",
        "tokens/0",
    ],
)
def test_a_name_of_no_known_kind_is_an_error_and_no_guess(name: str):
    with pytest.raises(FormatError, match=rf"column {name} is of no kind that this version knows.*update coldstill"):
        parse_target(name)


BEGINNINGS = ("hidden/", "hidden_input/", "logits/", "logsumexp/", "calibration/", "label_logit")


def strings_of(file: Path) -> list[str]:
    """The literals of a module, those in f-strings too; docstrings are none."""
    tree = ast.parse(file.read_text())
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in bare]
    return [node.value for node in constants if isinstance(node.value, str)]


def test_no_module_outside_the_targets_looks_into_the_name_of_a_column():
    files = [file for file in ROOT.glob("pipeline/**/*.py") if file.parent.name != "targets"]
    assert len(files) > 100
    for file in [*files, *ROOT.glob("cache/*.py"), ROOT / "cli.py"]:
        found = [text for text in strings_of(file) if text.startswith(BEGINNINGS)]
        assert not found, f"{file.name} names columns by itself: {found}"
    # The check sees what it is to see.
    assert [text for text in strings_of(ROOT / "pipeline/targets/states.py") if text.startswith(BEGINNINGS)]


# Bytes a token of columns of real models: width, vocabulary, what a store has. SmolLM2-135M on WikiText-2 and, where
# its last states take more, on FineWeb-Edu and code; gemma-3-270m on WikiText-2 and FineWeb-Edu (docs/results.md).
MEASURED = [
    ("tokens", 576, 49152, 1.4),
    ("label_logit", 576, 49152, 3.6),
    ("logsumexp/4", 576, 49152, 3.4),
    ("logits/final/coded_0.02", 576, 49152, 256.2),
    ("logits/final/coded_0.02", 576, 49152, 304),
    ("logits/final/coded_0.03", 576, 49152, 207.4),
    ("logits/final/coded_0.03", 576, 49152, 247),
    ("logits/final/coded_0.03", 640, 262144, 252.4),
    ("logits/final/coded_0.03", 640, 262144, 269.5),
    ("logits/final/int8", 576, 49152, 536.1),
    ("logits/final/float16", 576, 49152, 1065.9),
    ("hidden/4/coded_0.1", 576, 49152, 330.2),
    ("hidden/14/coded_0.2", 576, 49152, 273.9),
    ("hidden/24/coded_0.4", 576, 49152, 225.8),
    ("hidden/14/int8", 576, 49152, 534.2),
    ("hidden/14/bfloat16", 576, 49152, 917.8),
    ("hidden/14/float32", 576, 49152, 2141.9),
    ("logits/topk/64/delta", 576, 49152, 140.1),
    ("logits/topk/64/float32", 576, 49152, 327.9),
    ("logits/tail/32_32/1_2_3_4", 576, 49152, 145.6),
]


@pytest.mark.parametrize(("name", "width", "vocab_size", "measured"), MEASURED)
def test_what_is_said_to_be_written_is_what_stores_of_real_models_have(
    name: str, width: int, vocab_size: int, measured: float
):
    target = parse_target(name)
    raw_bytes = target.raw_bytes(ModelSizes(width, vocab_size), num_tokens=32_768, num_shards=1)
    assert target.written_share * raw_bytes / 32_768 == pytest.approx(measured, rel=0.15)
