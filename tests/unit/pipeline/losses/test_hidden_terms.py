"""The terms over block outputs against their definition, in value and in gradient."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coldstill.pipeline.losses.block_losses import MappedStates, block_losses
from coldstill.pipeline.losses.dynamics import Dynamics
from coldstill.pipeline.losses.hidden import Hidden
from coldstill.pipeline.models.counted import places_of
from coldstill.pipeline.targets.encodings import StateForm
from coldstill.pipeline.targets.forms import HiddenForm

B, T, WIDTH, TEACHER_WIDTH = 2, 5, 4, 6
LAYER_MAP = {0: 1, 2: 4, 3: 5}
COUNTS = torch.tensor([[True, True, True, True, False], [False, True, True, False, False]])
NUM_COUNTED = 6


def states(width: int, *, seed: int) -> Tensor:
    return torch.randn(B, T, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def outputs() -> dict[int, Tensor]:
    return {block: states(WIDTH, seed=block).requires_grad_() for block in LAYER_MAP}


@pytest.fixture
def stored() -> dict[str, dict[str, Tensor]]:
    return {str(block): {"values": states(TEACHER_WIDTH, seed=10 + block)} for block in LAYER_MAP.values()}


@pytest.fixture
def projectors() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({str(block): nn.Linear(WIDTH, TEACHER_WIDTH) for block in LAYER_MAP})


def terms(
    *,
    hidden: str | None = None,
    dynamics: str | None = None,
    form: StateForm | None = None,
    layer_map: dict[int, int] = LAYER_MAP,
) -> Callable[..., dict[str, Tensor]]:
    chosen = [*([Hidden(1.0, hidden)] if hidden else []), *([Dynamics(1.0, dynamics)] if dynamics else [])]

    def losses(
        outputs: Any, stored: Any, projectors: nn.ModuleDict, counts: Tensor, num: float, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        read = HiddenForm(form or StateForm("float32"))
        places = places_of(read.chosen(stored, layer_map[min(layer_map)], counts))
        states = MappedStates(layer_map, outputs, stored, read, places, weights)
        return block_losses(chosen, states, projectors, num_positions=num)

    return losses


def test_the_change_from_block_to_block_is_compared_over_consecutive_mapped_pairs(outputs, stored, projectors):
    got = terms(dynamics="mse")(outputs, stored, projectors, COUNTS, NUM_COUNTED)
    own = [projectors[str(block)](outputs[block])[COUNTS] for block in LAYER_MAP]
    teacher = [stored[str(block)]["values"][COUNTS] for block in LAYER_MAP.values()]
    changes = [
        F.mse_loss(own[index + 1] - own[index], teacher[index + 1] - teacher[index]) for index in range(len(own) - 1)
    ]
    want = (changes[0] + changes[1]) / 2
    assert list(got) == ["loss_dynamics"]
    assert got["loss_dynamics"].item() == pytest.approx(want.item(), rel=1e-6)
    leaves = [*outputs.values(), *projectors.parameters()]
    for one, other in zip(
        torch.autograd.grad(got["loss_dynamics"], leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_both_terms_stand_beside_each_other_and_neither_changes_the_other(outputs, stored, projectors):
    both = terms(hidden="cosine", dynamics="normalised_mse")(outputs, stored, projectors, COUNTS, NUM_COUNTED)
    for name, alone in (
        ("loss_hidden", terms(hidden="cosine")),
        ("loss_dynamics", terms(dynamics="normalised_mse")),
    ):
        assert torch.equal(both[name], alone(outputs, stored, projectors, COUNTS, NUM_COUNTED)[name])


def test_a_student_whose_blocks_all_lie_off_by_the_same_has_the_right_changes(stored):
    identity = nn.ModuleDict({str(block): nn.Identity() for block in LAYER_MAP})
    shifted = {
        student: (stored[str(teacher)]["values"] + 3.0).requires_grad_() for student, teacher in LAYER_MAP.items()
    }
    got = terms(hidden="mse", dynamics="mse")(shifted, stored, identity, COUNTS, NUM_COUNTED)
    assert got["loss_hidden"].item() == pytest.approx(9.0, rel=1e-5)
    assert got["loss_dynamics"].item() == pytest.approx(0.0, abs=1e-10)


def test_one_mapped_block_has_no_change_to_compare(outputs, stored, projectors):
    alone = terms(hidden="mse", dynamics="mse", layer_map={0: 1})
    assert list(alone(outputs, stored, projectors, COUNTS, NUM_COUNTED)) == ["loss_hidden"]


def test_positions_that_were_not_stored_do_not_count_and_the_sum_is_divided_by_their_share(outputs, stored, projectors):
    kept = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 0, 1, 0]], dtype=torch.uint8)
    for arrays in stored.values():
        arrays["stored"] = kept
    sampled = terms(hidden="mse", dynamics="mse", form=StateForm("float32", fraction=0.5))
    got = sampled(outputs, stored, projectors, COUNTS, NUM_COUNTED)
    only = terms(hidden="mse", dynamics="mse")
    for arrays in stored.values():
        del arrays["stored"]
    want = only(outputs, stored, projectors, COUNTS & kept.bool(), NUM_COUNTED * 0.5)
    for name in ("loss_hidden", "loss_dynamics"):
        assert got[name].item() == pytest.approx(want[name].item(), rel=1e-6)


WEIGHTS = torch.tensor([[0.3, 1.0, 0.0, 2.0, 1.0], [1.0, 0.5, 0.8, 1.0, 1.0]])
BY_POSITION = {
    "mse": lambda own, teacher: (own - teacher).square().mean(-1),
    "normalised_mse": lambda own, teacher: (own - teacher).square().mean(-1) / teacher.var(-1, correction=0),
    "cosine": lambda own, teacher: 1 - F.cosine_similarity(own, teacher, dim=-1),
}


@pytest.mark.parametrize("kind", BY_POSITION)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_positions_share_of_both_terms_is_its_weight(outputs, stored, projectors, kind, fraction):
    if fraction < 1.0:
        for arrays in stored.values():
            arrays["stored"] = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 0, 1, 0]], dtype=torch.uint8)
    weighted = terms(hidden=kind, dynamics=kind, form=StateForm("float32", fraction=fraction))
    got = weighted(outputs, stored, projectors, COUNTS, (WEIGHTS * COUNTS).sum(), WEIGHTS)
    own = [projectors[str(block)](outputs[block]) for block in LAYER_MAP]
    teacher = [stored[str(block)]["values"] for block in LAYER_MAP.values()]
    kept = WEIGHTS * COUNTS * stored["1"].get("stored", 1)

    def mean(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        losses = [(BY_POSITION[kind](*pair) * kept).sum() for pair in pairs]
        return torch.stack(losses).mean() / (fraction * (WEIGHTS * COUNTS).sum())

    pairs = list(zip(own, teacher, strict=True))
    changes = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(pairs)]
    leaves = [*outputs.values(), *projectors.parameters()]
    for name, want in {"loss_hidden": mean(pairs), "loss_dynamics": mean(changes)}.items():
        assert got[name].item() == pytest.approx(want.item(), rel=1e-5)
        gradients = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (got[name], want))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_weights_that_are_all_one_change_no_digit(outputs, stored, projectors):
    both = terms(hidden="normalised_mse", dynamics="cosine")
    want, got = (
        both(outputs, stored, projectors, COUNTS, num, weights)
        for num, weights in ((COUNTS.sum(), None), (COUNTS.float().sum(), torch.ones(B, T)))
    )
    for name, value in want.items():
        assert torch.equal(got[name], value), name
