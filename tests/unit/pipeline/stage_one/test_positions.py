"""A row's output is a function of the row alone, also where a model chooses rotary factors by a batch's longest."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import Result

from coldstill.pipeline.models import rope_switches, take_apart
from coldstill.pipeline.models.forward import mean_loss, padded_batches
from coldstill.pipeline.models.student_forward import StudentForward
from coldstill.pipeline.stage_one.capture import capture
from coldstill.pipeline.students.depth import block_importances
from coldstill.pipeline.targets.captured import CaptureRequest

SWITCH = 12
LONGROPE = {
    "max_position_embeddings": 64,
    "original_max_position_embeddings": SWITCH,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 5.0, 8.0],
    },
}
# Short, at the switch, beyond it, and short again.
ROWS = [torch.arange(1, 1 + length) for length in (9, SWITCH, 13, 30, 5)]


@pytest.fixture(params=["phi3", "llama"])
def model(request: pytest.FixtureRequest, build_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return build_model(request.param, **LONGROPE)


def test_a_row_beside_a_longer_one_would_get_other_logits(model: PreTrainedModel):
    # Else this file would show nothing.
    ids, longer = ROWS[0], ROWS[3]
    batch = torch.stack([torch.nn.functional.pad(ids, (0, len(longer) - len(ids))), longer])
    with torch.no_grad():
        alone, beside = model(ids.unsqueeze(0)).logits[0], model(batch).logits[0, : len(ids)]
    assert (alone - beside).abs().max() > 0.1


def test_only_longrope_has_a_switch(build_model: Callable[..., PreTrainedModel]):
    assert rope_switches(build_model("phi3", **LONGROPE).config) == (SWITCH,)
    for kind in ("default", "dynamic", "linear"):
        rope = {"rope_type": kind, "rope_theta": 10000.0, **({} if kind == "default" else {"factor": 2.0})}
        assert rope_switches(build_model(rope_parameters=rope).config) == ()
    assert rope_switches(build_model("gemma3_text", head_dim=8).config) == ()
    assert rope_switches(build_model("gpt2", n_embd=32, n_layer=4, n_head=4, n_positions=64).config) == ()


def test_what_a_teacher_says_of_a_row_does_not_depend_on_the_batch(model: PreTrainedModel):
    parts = take_apart(model)
    request = CaptureRequest(blocks=(0, 3), temperatures=(1.0,), labels=True, final_state=True)
    together = capture(parts, ROWS, request, row_names=list("abcde"))
    alone = [capture(parts, [row], request, row_names=["row"]) for row in ROWS]
    for block in request.blocks:
        torch.testing.assert_close(together.hidden_ND[block], torch.cat([one.hidden_ND[block] for one in alone]))
    torch.testing.assert_close(together.final_state_ND, torch.cat([one.final_state_ND for one in alone]))
    torch.testing.assert_close(together.logsumexp_N[1.0], torch.cat([one.logsumexp_N[1.0] for one in alone]))


@pytest.mark.parametrize("has_known_head", [True, False])
def test_what_a_student_learns_of_a_row_does_not_depend_on_the_batch(model: PreTrainedModel, has_known_head: bool):
    if has_known_head:
        student = StudentForward(model)
    else:
        model.lm_head.register_forward_hook(lambda _module, _args, output: 2.0 * output)
        with pytest.warns(UserWarning, match="the student's logits are computed whole"):
            student = StudentForward(model)
    ids_BT = torch.nn.utils.rnn.pad_sequence(ROWS, batch_first=True)
    mask_BT = (torch.arange(ids_BT.shape[1]) < torch.tensor([[len(row)] for row in ROWS])).long()
    outputs, values_BTX, head = student(ids_BT, mask_BT, [1])
    head(values_BTX)[mask_BT.bool()].square().sum().backward()
    gradient = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    for index, row in enumerate(ROWS):
        of_row, values_1TX, head = student(row.unsqueeze(0), None, [1])
        torch.testing.assert_close(outputs[1][index, : len(row)], of_row[1][0])
        torch.testing.assert_close(values_BTX[index, : len(row)], values_1TX[0])
        head(values_1TX).square().sum().backward()
    scale = float(gradient.abs().max())
    torch.testing.assert_close(gradient, model.get_input_embeddings().weight.grad, atol=1e-5 * scale, rtol=1e-4)


def test_what_calibration_rows_say_does_not_depend_on_their_neighbours(model: PreTrainedModel):
    parts = take_apart(model)
    tokens = [len(row) for row in ROWS]
    alone = torch.tensor([block_importances(parts, [row]) for row in ROWS], dtype=torch.float64)
    weighted = (alone * torch.tensor(tokens).unsqueeze(1)).sum(dim=0) / sum(tokens)
    assert block_importances(parts, ROWS) == pytest.approx(weighted.tolist(), rel=1e-5)
    losses = sum(mean_loss(model, [row]) * (len(row) - 1) for row in ROWS) / sum(len(row) - 1 for row in ROWS)
    assert mean_loss(model, ROWS) == pytest.approx(losses, rel=1e-5)


def test_rows_that_may_be_together_are(build_model: Callable[..., PreTrainedModel]):
    rows = [torch.arange(length) for length in (3, 20, 5, 7, 9)]
    assert [len(ids) for ids, _ in padded_batches(rows, build_model())] == [4, 1]
    assert [len(ids) for ids, _ in padded_batches(rows, build_model("phi3", **LONGROPE))] == [1, 1, 3]


def test_evaluation_does_not_depend_on_the_size_of_its_batches(
    workplace: Path,
    write_recipe: Callable[..., Path],
    coldstill: Callable[..., Result],
    build_model: Callable[..., PreTrainedModel],
    corpus: list[str],
):
    texts = [corpus[index][:length] for index, length in enumerate((20, 200, 25, 90, 15, 160, 30, 400) * 3)]
    (workplace / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    source = {"path": "json", "data_files": str(workplace / "text.jsonl")}
    build_model("phi3", **LONGROPE).save_pretrained(workplace / "teacher")
    recipe = write_recipe(
        data={
            "sequence_length": 48,
            "packing": False,
            "train": {**source, "max_rows": 12},
            "eval": {**source, "max_rows": 8},
        },
        student={"path": str(workplace / "teacher")},
        loss={"alpha": 0.5, "beta": 0.5, "gamma": 0},
        targets={"logits": {"kind": "final", "encoding": "float32"}, "hidden": {"blocks": "none"}},
        teacher__batch_size=8,
    )
    coldstill("precompute", recipe)
    found: list[Any] = []
    for size in (1, 8):
        changes = [f"evaluate.batch_size={size}", f"output={workplace / str(size)}"]
        result = coldstill("evaluate", recipe, *changes, "--json")
        found.append(json.loads(result.stdout)["models"])
        # The teacher is its own student: it is at no distance from itself.
        assert found[-1]["pruned"]["kl"] == pytest.approx(0.0, abs=1e-4)
        # What was found of a student is kept: it is to be found once more.
        (kept,) = (workplace / "caches/index").glob("quality-*")
        kept.unlink()
    assert found[0]["pruned"] == pytest.approx(found[1]["pruned"], rel=1e-5, abs=1e-4)
    assert found[0]["teacher"]["loss"] == pytest.approx(found[0]["pruned"]["loss"], rel=1e-4)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_rows_longer_than_a_model_reads_are_refused_before_the_teacher_runs(
    workplace: Path,
    write_recipe: Callable[..., Path],
    coldstill: Callable[..., Result],
    build_model: Callable[..., PreTrainedModel],
    who: str,
):
    # Beyond that length `dynamic` factors depend on the longest row that was seen, and learned positions end.
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    folder = workplace / ("teacher" if who == "teacher" else "narrow")
    build_model(max_position_embeddings=20, rope_parameters=rope).save_pretrained(folder)
    changes = {} if who == "teacher" else {"student": {"path": str(folder)}, "mapping": {"strategy": "uniform"}}
    result = coldstill("precompute", write_recipe(**changes), "--dry-run", expect=2)
    assert f"data.sequence_length is 24, but the {who} reads at most 20 tokens" in result.output


def test_padding_alone_does_not_bring_short_rows_to_the_other_side(model: PreTrainedModel):
    student = StudentForward(model)
    rows = [row for row in ROWS if len(row) <= SWITCH]
    ids_BT = torch.stack([torch.nn.functional.pad(row, (0, 40 - len(row))) for row in rows])
    mask_BT = (torch.arange(40) < torch.tensor([[len(row)] for row in rows])).long()
    _, state_BTD, _ = student(ids_BT, mask_BT, [])
    assert state_BTD.shape[:2] == (3, 40)
    for index, row in enumerate(rows):
        torch.testing.assert_close(state_BTD[index, : len(row)], student(row.unsqueeze(0), None, [])[1][0])


def test_documents_that_share_a_row_count_by_their_own_positions(model: PreTrainedModel):
    student = StudentForward(model)
    rows = [ROWS[2], ROWS[0]]
    ids = torch.stack([torch.cat([row, row])[:18] for row in rows])
    # One document of 18 tokens, which lies beyond the switch, and two of 9, which do not.
    positions = torch.stack([torch.arange(18), torch.arange(18) % 9])
    together = student(ids, None, [], positions)[1]
    for index in range(2):
        alone = student(ids[index : index + 1], None, [], positions[index : index + 1])[1]
        torch.testing.assert_close(together[index : index + 1], alone)
