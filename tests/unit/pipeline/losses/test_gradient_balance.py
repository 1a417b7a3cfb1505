"""From the norms of terms' gradients to the factors that bring them into proportion, and to their shares."""

import math

import pytest

from coldstill.pipeline.losses.gradient_balance import balance_factors, gradient_shares, smoothed

NORMS = {"loss_task": 4.0, "loss_logits": 8.0, "loss_hidden": 20_000.0}


def test_weighted_norms_are_in_the_proportion_of_the_weights_and_the_anchor_keeps_its_own():
    factors = balance_factors(NORMS, "loss_logits")
    assert factors["loss_logits"] == 1.0
    products = [factors[name] * norm for name, norm in NORMS.items()]
    assert products == pytest.approx([8.0, 8.0, 8.0])


def test_a_term_that_has_all_but_vanished_is_blown_up_a_hundredfold_at_most():
    assert balance_factors({**NORMS, "loss_hidden": 1e-9}, "loss_task")["loss_hidden"] == 100.0


def test_without_the_anchors_norm_every_weight_stays():
    assert balance_factors({"loss_hidden": 3.0}, "loss_task") == {}


def test_norms_are_averaged_over_measurements_by_their_logarithms():
    assert smoothed({}, NORMS) == NORMS
    assert smoothed({"loss_task": 4.0}, {"loss_task": 16.0}) == pytest.approx({"loss_task": 8.0})


@pytest.mark.parametrize("norm", [0.0, math.inf, math.nan])
def test_a_norm_that_says_nothing_changes_nothing(norm: float):
    assert smoothed({"loss_task": 4.0}, {"loss_task": norm}) == {"loss_task": 4.0}
    assert smoothed({}, {"loss_task": norm}) == {}


def test_shares_are_of_the_weighted_norms_and_there_are_none_of_nothing():
    weights = {"loss_task": 0.5, "loss_logits": 0.25, "loss_hidden": 0.0}
    assert gradient_shares(NORMS, weights) == {"loss_task": 0.5, "loss_logits": 0.5, "loss_hidden": 0.0}
    assert gradient_shares(NORMS, dict.fromkeys(NORMS, 0.0)) == {}
    assert gradient_shares({**NORMS, "loss_task": math.inf}, weights) == {}
