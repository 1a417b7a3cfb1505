"""The distiller alone, with a tiny student and targets by hand: it runs once for what the terms need, and adds up."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_pair import LAYER_MAP
from torch import Tensor

from coldstill.pipeline.losses.objective import Objective
from coldstill.pipeline.models.labels import IGNORED, counts_of, weights_of
from coldstill.pipeline.models.output_head import OutputHead
from coldstill.pipeline.models.projectors import create_projectors
from coldstill.pipeline.recipe.loss import LossConfig
from coldstill.pipeline.runtime.errors import DataError, TargetError
from coldstill.pipeline.stage_two.distiller import Distiller, TargetForms
from coldstill.pipeline.targets.encodings import StateForm
from coldstill.pipeline.targets.forms import FINAL, FinalForm, HiddenForm

B, T, V, TEACHER_WIDTH = 3, 10, 384, 32
ALL = {"alpha": 0.5, "beta": 0.4, "gamma": 0.2, "delta": 0.1}
NOTHING = dict.fromkeys(ALL, 0.0)
NAMES = {"alpha": "loss_task", "beta": "loss_logits", "gamma": "loss_hidden", "delta": "loss_dynamics"}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HEAD = OutputHead(random(V, TEACHER_WIDTH, seed=0))
FORMS = TargetForms(FinalForm(StateForm("float32"), HEAD), HiddenForm(StateForm("float32")))


@pytest.fixture
def batch() -> dict[str, Any]:
    """Rows with a prompt of three tokens in the last, and every target."""
    ids = torch.randint(1, V, (B, T), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[2, :3] = IGNORED
    states = {str(block): {"values": random(B, T, TEACHER_WIDTH, seed=block)} for block in LAYER_MAP.values()}
    final = {FINAL: {"values": random(B, T, TEACHER_WIDTH, seed=9)}}
    return {"input_ids": ids, "labels": labels, "logits": final, "hidden": states}


def distiller_of(student: Any, *, layer_map: dict[int, int] = LAYER_MAP, **section: Any) -> Distiller:
    objective = Objective.of(LossConfig.model_validate({"temperature": 2.0, "hidden": "mse", **section}))
    projectors = create_projectors(layer_map, student_dim=16, teacher_dim=TEACHER_WIDTH, seed=1)
    return Distiller(student, projectors, layer_map=layer_map, objective=objective, forms=FORMS)


def gradients(distiller: Distiller, loss: Tensor) -> dict[str, Tensor]:
    distiller.zero_grad()
    loss.backward()
    return {name: value.grad for name, value in distiller.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("weight", ALL)
def test_each_term_stands_alone_and_is_what_it_is_among_the_others(student: Any, batch: dict[str, Any], weight: str):
    among_all = distiller_of(student, **ALL)(**batch)
    alone = distiller_of(student, **{**NOTHING, weight: 0.3})(**batch)
    assert alone.keys() == {"loss", NAMES[weight]}
    torch.testing.assert_close(alone[NAMES[weight]], among_all[NAMES[weight]])
    torch.testing.assert_close(alone["loss"], 0.3 * alone[NAMES[weight]])


def test_the_loss_is_the_terms_each_times_its_weight(student: Any, batch: dict[str, Any]):
    terms = distiller_of(student, **ALL)(**batch)
    assert terms["loss"].item() == pytest.approx(sum(ALL[key] * terms[name].item() for key, name in NAMES.items()))


def test_the_student_runs_once_for_all_terms(student: Any, batch: dict[str, Any]):
    distiller, runs = distiller_of(student, **ALL), []
    student.model.register_forward_hook(lambda *_: runs.append(1))
    distiller(**batch)
    assert len(runs) == 1


def test_block_outputs_are_taken_only_where_a_term_needs_them(student: Any, batch: dict[str, Any]):
    beyond = {7: 1}  # a block that the student does not have cannot be hooked
    without = distiller_of(student, layer_map=beyond, **{**ALL, "gamma": 0.0, "delta": 0.0})
    assert without(**batch).keys() == {"loss", "loss_task", "loss_logits"}
    with pytest.raises(IndexError):
        distiller_of(student, layer_map=beyond, **{**ALL, "delta": 0.0})(**batch)


def test_the_output_head_learns_nothing_where_no_term_needs_logits(student: Any, batch: dict[str, Any]):
    distiller = distiller_of(student, **{**NOTHING, "gamma": 0.3, "delta": 0.1})
    found = gradients(distiller, distiller(**batch)["loss"])
    assert "student.lm_head.weight" not in found
    assert "student.model.layers.0.mlp.down_proj.weight" in found


def test_targets_that_no_term_needs_may_be_missing(student: Any, batch: dict[str, Any]):
    distiller = distiller_of(student, **{**NOTHING, "alpha": 1.0})
    distiller.forms = TargetForms()
    want = distiller(**batch)["loss"]
    assert torch.equal(distiller(batch["input_ids"], batch["labels"])["loss"], want)


@pytest.mark.parametrize(
    ("weights", "missing", "message"),
    [
        ({"beta": 0.4}, "logits", "loss_logits has the weight beta = 0.4, but a batch has no 'final' of the teacher's"),
        ({"gamma": 0.2}, "hidden", "loss_hidden has the weight gamma = 0.2, but a batch has no output of teacher blo"),
        ({"delta": 0.1}, "hidden", "loss_dynamics has the weight delta = 0.1, but a batch has no output of teacher b"),
        (
            {"alpha": 1.0, "schedule": {"beta": {"end": 0.3}}},
            "logits",
            "loss_logits has the weight beta = 0, and 0.3 at the last step, but a batch has no",
        ),
    ],
)
def test_a_term_whose_target_is_missing_raises(
    student: Any, batch: dict[str, Any], weights: dict[str, Any], missing: str, message: str
):
    distiller = distiller_of(student, **{**NOTHING, **weights})
    distiller(**batch)
    del batch[missing]
    with pytest.raises(TargetError, match=message):
        distiller(**batch)


def test_each_step_has_its_own_weights_and_temperature(student: Any, batch: dict[str, Any]):
    schedule = {"alpha": {"end": 0.0}, "temperature": {"end": 1.0}}
    distiller = distiller_of(student, **ALL, schedule=schedule)
    distiller.set_step(4, 5)
    last = distiller(**batch)
    want = distiller_of(student, **{**ALL, "alpha": 0.0}, temperature=1.0)(**batch)
    for name in ("loss", "loss_logits", "loss_hidden", "loss_dynamics"):
        torch.testing.assert_close(last[name], want[name])
    assert last["loss_task"] > 0, "a term is computed where its weight has come to 0"
    distiller.set_step(0, 5)
    torch.testing.assert_close(distiller(**batch)["loss"], distiller_of(student, **ALL)(**batch)["loss"])


@pytest.fixture
def weights() -> Tensor:
    given = torch.rand(B, T, generator=torch.Generator().manual_seed(5))
    given[0, 4:6], given[1, 0] = 0.0, 7.0  # the first token of a row is predicted from nothing
    return given


def by_definition(distiller: Distiller, batch: dict[str, Any], weights: Tensor) -> Tensor:
    """All logits and all states at once, by torch's own operations: a position's share is its weight."""
    student, states = distiller.student, {}
    for index, block in enumerate(student.model.layers):
        block.register_forward_hook(lambda _m, _a, out, index=index: states.update({index: out}))
    logits = student(input_ids=batch["input_ids"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    share = weights[:, 1:] * (labels != IGNORED)
    share = share / share.sum()
    task = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    log_p = (HEAD(batch["logits"][FINAL]["values"][:, :-1]) / 2.0).log_softmax(-1)
    divergence = F.kl_div((logits / 2.0).log_softmax(-1), log_p, log_target=True, reduction="none").sum(-1) * 4.0
    own = [distiller.projectors[str(block)](states[block])[:, :-1] for block in LAYER_MAP]
    teacher = [batch["hidden"][str(block)]["values"][:, :-1] for block in LAYER_MAP.values()]
    hidden = sum((one - other).square().mean(-1) for one, other in zip(own, teacher, strict=True)) / 2
    dynamics = 1 - F.cosine_similarity(own[1] - own[0], teacher[1] - teacher[0], dim=-1)
    return (share * (0.5 * task + 0.4 * divergence + 0.2 * hidden + 0.1 * dynamics)).sum()


def test_a_positions_share_of_the_loss_and_of_every_gradient_is_its_weight(
    student: Any, batch: dict[str, Any], weights: Tensor
):
    distiller = distiller_of(student, **ALL)
    got = distiller(**batch, weights=weights)["loss"]
    want = by_definition(distiller, batch, weights)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    found, expected = gradients(distiller, got), gradients(distiller, want)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6 * value.abs().max().item(), msg=name)


def test_weights_that_are_all_one_change_no_digit(student: Any, batch: dict[str, Any]):
    distiller = distiller_of(student, **ALL)
    want, got = (distiller(**batch, **more) for more in ({}, {"weights": torch.ones(B, T)}))
    assert all(torch.equal(got[name], value) for name, value in want.items())
    expected = gradients(distiller, want["loss"])
    expected = {name: value.clone() for name, value in expected.items()}
    found = gradients(distiller, got["loss"])
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_token_of_weight_0_is_one_without_a_label(student: Any, batch: dict[str, Any]):
    distiller = distiller_of(student, **ALL)
    weights = torch.ones(B, T)
    weights[1, 3:7] = 0.0
    unlabelled = batch["labels"].masked_fill(weights == 0, IGNORED)
    got = distiller(**batch, weights=weights)
    want = distiller(**{**batch, "labels": unlabelled})
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_small_weights_are_as_good_as_large_ones_and_none_at_all_are_a_loss_of_zero(
    student: Any, batch: dict[str, Any], weights: Tensor
):
    distiller = distiller_of(student, **ALL)
    want = distiller(**batch, weights=weights)["loss"]
    torch.testing.assert_close(distiller(**batch, weights=weights * 1e-3)["loss"], want)
    terms = distiller(**batch, weights=torch.zeros(B, T))
    assert all(value.item() == 0.0 for value in terms.values())


def test_parts_of_an_accumulated_batch_add_up_by_the_sum_of_all_weights(
    student: Any, batch: dict[str, Any], weights: Tensor
):
    distiller = distiller_of(student, **ALL)
    whole = distiller(**batch, weights=weights)

    def part(rows: slice) -> dict[str, Any]:
        columns = {
            kind: {name: {"values": arrays["values"][rows]} for name, arrays in batch[kind].items()}
            for kind in ("logits", "hidden")
        }
        return {"input_ids": batch["input_ids"][rows], "labels": batch["labels"][rows], **columns}

    total = weights_of({**batch, "weights": weights}).sum()
    parts = [
        distiller(**part(rows), weights=weights[rows], num_items_in_batch=total) for rows in (slice(0, 1), slice(1, 3))
    ]
    for name, value in whole.items():
        torch.testing.assert_close(sum(each[name] for each in parts), value)


def test_weights_are_shifted_as_the_tokens_are_and_are_0_where_nothing_counts():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}
    assert weights_of(batch) is None
    batch["weights"] = torch.tensor([[9.0, 0.5, 0.0, 2.0], [9.0, 0.25, 1.0, 3.0]])
    assert weights_of(batch).tolist() == [[0.5, 0.0, 2.0, 0.0], [0.25, 1.0, 0.0, 0.0]]
    assert counts_of(batch).tolist() == [[True, False, True, False], [True, True, False, False]]


def test_weights_of_another_shape_are_refused(student: Any, batch: dict[str, Any]):
    with pytest.raises(DataError, match=r"weights of shape \[3, 9\] for input_ids of shape \[3, 10\]; expected one"):
        distiller_of(student, **ALL)(**batch, weights=torch.ones(B, T - 1))


def test_the_scale_of_the_teacher_is_measured_before_a_term_is_measured_by_it(student: Any, batch: dict[str, Any]):
    distiller = distiller_of(student, **{**NOTHING, "gamma": 1.0, "hidden": "standardised_mse"})
    with pytest.raises(TargetError, match=r"^the scale of the teacher's blocks is not known; call measure_scales with"):
        distiller(**batch)
    ignored = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
    with pytest.raises(DataError, match=r"^nothing counts in the first train rows, on which the scale of the teacher"):
        distiller.measure_scales([ignored])
    distiller.measure_scales([ignored, batch])
    assert 0 < distiller(**batch)["loss"].item() < 10
    assert not any("scale" in name for name in distiller.state_dict())


def test_what_holds_the_teacher_is_no_parameter(student: Any):
    distiller = distiller_of(student, **ALL)
    assert all(name.startswith(("student.", "projectors.")) for name in distiller.state_dict())
