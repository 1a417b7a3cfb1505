"""The next step of a recovery, at and around every threshold."""

from dataclasses import replace
from typing import Any

import pytest

from coldstill.pipeline.judging.suggestions import Advice, Measured, Settings, advise_next, as_override

DEPTH = Settings(cut="depth", alpha=0.5, gamma=0.05, hidden="mse", num_epochs=3.0)


def advice(retention: float, settings: Settings = DEPTH, target: float = 0.95, **measured: Any) -> Advice:
    return advise_next(settings, Measured(retention, **measured), target=target)


@pytest.mark.parametrize(
    ("retention", "step", "changes"),
    [
        (0.5, "gamma", {"loss.gamma": 0.1}),
        (0.8999, "gamma", {"loss.gamma": 0.1}),
        (0.90, "epochs", {"train.num_train_epochs": 5.0}),
        (0.92, "epochs", {"train.num_train_epochs": 5.0}),
        (0.94, "epochs", {"train.num_train_epochs": 5.0}),
        (0.9401, "done", {}),
        (1.02, "done", {}),
    ],
)
def test_retention_decides_the_step(retention: float, step: str, changes: dict[str, Any]):
    given = advice(retention)
    assert (given.step, given.changes) == (step, changes)
    assert f"{retention:.1%}" in given.reason


@pytest.mark.parametrize(
    ("target", "retention", "step"),
    [
        (0.94, 0.9401, "done"),
        (0.95, 0.945, "done"),
        (0.951, 0.945, "epochs"),
        (0.97, 0.9699, "epochs"),
        (0.97, 0.97, "done"),
        (0.92, 0.9199, "epochs"),
        (0.92, 0.92, "done"),
        (0.80, 0.80, "done"),
        (0.80, 0.7999, "gamma"),
    ],
)
def test_a_high_or_a_low_target_is_itself_what_done_means(target: float, retention: float, step: str):
    assert advice(retention, target=target).step == step


@pytest.mark.parametrize(
    ("gamma", "following"), [(0.0, 0.05), (0.1, 0.15), (0.15, 0.2), (0.25, 0.3), (0.28, 0.3), (0.2999, 0.3)]
)
def test_gamma_goes_up_by_a_step_and_no_further_than_its_end(gamma: float, following: float):
    assert advice(0.8, replace(DEPTH, gamma=gamma)).changes == {"loss.gamma": following}


@pytest.mark.parametrize("gamma", [0.3, 0.5])
def test_where_gamma_is_at_its_end_more_epochs_follow(gamma: float):
    given = advice(0.8, replace(DEPTH, gamma=gamma))
    assert given.changes == {"train.num_train_epochs": 5.0}
    assert f"gamma is at {gamma:g}" in given.reason


def test_of_a_run_whose_length_is_given_in_steps_more_steps_are_advised():
    assert advice(0.92, replace(DEPTH, max_steps=300)).changes == {"train.max_steps": 500}


@pytest.mark.parametrize(
    ("share", "changes"),
    [
        (None, {"loss.gamma": 0.15}),
        (0.2, {"loss.gamma": 0.15}),
        (0.49, {"loss.gamma": 0.15}),
        (0.5, {"loss.hidden": "normalised_mse", "loss.gamma": 5.0}),
        (0.97, {"loss.hidden": "normalised_mse", "loss.gamma": 5.0}),
    ],
)
def test_more_of_a_raw_mse_is_advised_only_where_it_does_not_decide_the_step_already(
    share: float | None, changes: dict[str, Any]
):
    given = advice(0.8, replace(DEPTH, gamma=0.1, hidden_share=share))
    assert given.changes == changes
    assert given.notes == ()
    assert ("takes from the other terms" in given.reason) == (len(changes) == 2)


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"max_steps": 10, "seen_epochs": 0.16}, {"train.max_steps": 63}),
        ({"max_steps": 300, "seen_epochs": 0.89}, {"train.max_steps": 338}),
        ({"num_epochs": 0.5, "seen_epochs": 0.5}, {"train.num_train_epochs": 1.0}),
    ],
)
@pytest.mark.parametrize(
    "measured", [{}, {"worse": "perplexity rose"}, {"stderr": 0.02, "num_samples": 200}], ids=["", "worse", "unclear"]
)
@pytest.mark.parametrize("retention", [0.5, 0.92])
def test_a_run_that_ended_within_its_first_epoch_is_to_see_its_rows_first(
    settings: dict[str, Any], changes: dict[str, Any], measured: dict[str, Any], retention: float
):
    given = advice(retention, replace(DEPTH, **settings), **measured)
    assert (given.step, given.changes) == ("epochs", changes)
    assert f"only {settings['seen_epochs']:.2g} of an epoch" in given.reason


@pytest.mark.parametrize(("seen", "step"), [(0.9, "gamma"), (3.0, "gamma"), (None, "gamma")])
def test_a_run_that_saw_its_rows_is_advised_by_what_it_retains(seen: float | None, step: str):
    assert advice(0.5, replace(DEPTH, max_steps=100, seen_epochs=seen)).step == step


def test_what_is_reached_within_the_first_epoch_is_reached():
    assert advice(0.98, replace(DEPTH, max_steps=10, seen_epochs=0.16)).step == "done"


@pytest.mark.parametrize(
    ("settings", "retention"), [({}, 0.92), ({"gamma": 0.3}, 0.8), ({"hidden": "normalised_mse", "gamma": 5.0}, 0.8)]
)
@pytest.mark.parametrize(("max_rows", "changes"), [(200, {"data.train.max_rows": 400}), (None, {})])
def test_more_epochs_are_never_advised_of_rows_that_are_learned_by_heart(
    settings: dict[str, Any], retention: float, max_rows: int | None, changes: dict[str, Any]
):
    rising = "eval_loss was least at step 10, 2.5, and 2.6 at the end"
    given = advice(retention, replace(DEPTH, rising=rising, max_rows=max_rows, **settings))
    assert (given.step, given.changes) == ("rows", changes)
    assert rising in given.reason
    assert ("name a longer source in data.train" in given.reason) == (max_rows is None)


@pytest.mark.parametrize(
    ("hidden", "gamma", "changes"),
    [
        ("normalised_mse", 0.0, {"loss.gamma": 5.0}),
        ("normalised_mse", 0.1, {"loss.gamma": 5.0}),
        ("normalised_mse", 4.9, {"loss.gamma": 5.0}),
        ("normalised_mse", 5.0, {"train.num_train_epochs": 5.0}),
        ("cosine", 0.1, {"loss.hidden": "normalised_mse", "loss.gamma": 5.0}),
        ("cosine", 9.0, {"loss.hidden": "normalised_mse", "loss.gamma": 5.0}),
    ],
)
def test_kinds_that_do_nothing_at_small_weights_are_not_raised_in_small_steps(
    hidden: Any, gamma: float, changes: dict[str, Any]
):
    assert advice(0.8, replace(DEPTH, hidden=hidden, gamma=gamma)).changes == changes


@pytest.mark.parametrize(
    ("cut", "target", "retention", "changes", "why"),
    [
        ("depth", 0.95, 0.8, {"loss.gamma": 0.05}, "below 90%"),
        ("depth", 0.95, 0.92, {"train.num_train_epochs": 5.0}, "more epochs"),
        ("depth", 0.951, 0.92, {"loss.gamma": 0.1}, "target is above 95%"),
        ("depth", 0.97, 0.96, {"loss.gamma": 0.1}, "target is above 95%"),
        ("width", 0.95, 0.92, {"loss.gamma": 0.2}, "width was cut: hidden terms"),
        ("width", 0.95, 0.8, {"loss.gamma": 0.2}, "width was cut: hidden terms"),
        ("both", 0.95, 0.8, {"loss.gamma": 0.2}, "depth and width were cut: hidden terms"),
    ],
)
def test_without_hidden_terms_they_are_wanted_where_width_was_cut_or_the_target_is_high(
    cut: Any, target: float, retention: float, changes: dict[str, Any], why: str
):
    given = advice(retention, replace(DEPTH, cut=cut, gamma=0.0), target)
    assert given.changes == changes
    assert why in given.reason


@pytest.mark.parametrize(
    ("cut", "gamma", "target", "notes"),
    [
        ("depth", 0.1, 0.95, 1),
        ("depth", 0.0, 0.95, 0),
        ("width", 0.2, 0.95, 1),
        ("depth", 0.1, 0.97, 1),
    ],
)
def test_when_done_gamma_may_come_down_and_logits_alone_may_serve_a_cut_in_depth(
    cut: Any, gamma: float, target: float, notes: int
):
    given = advice(0.98, replace(DEPTH, cut=cut, gamma=gamma), target)
    assert (given.step, given.changes, len(given.notes)) == ("done", {}, notes)
    for note in given.notes:
        assert note.startswith("gamma may come down")
        assert ("logits alone" in note) == (cut == "depth" and target == 0.95)


@pytest.mark.parametrize("retention", [0.5, 0.92, 0.99])
def test_a_task_that_is_forgotten_comes_first_and_wants_more_alpha(retention: float):
    given = advice(retention, worse="perplexity rose from 65.3 to 70.1")
    assert (given.step, given.changes) == ("alpha", {"loss.alpha": 0.6})
    assert "perplexity rose from 65.3 to 70.1" in given.reason


@pytest.mark.parametrize(
    ("share", "changes"), [(0.9, {"loss.hidden": "normalised_mse", "loss.gamma": 5.0}), (0.1, {}), (None, {})]
)
def test_beside_a_raw_mse_that_rules_the_step_alpha_alone_is_not_advised(share: float | None, changes: dict[str, Any]):
    given = advice(0.8, replace(DEPTH, gamma=0.1, hidden_share=share), worse="w")
    assert given.changes == {"loss.alpha": 0.6, **changes}


@pytest.mark.parametrize(
    ("retention", "stderr", "target", "threshold"),
    [
        (0.91, 0.006, 0.95, "90.0%"),
        (0.89, 0.006, 0.95, "90.0%"),
        (0.91, 0.005, 0.95, None),
        (0.93, 0.006, 0.95, "94.0%"),
        (0.95, 0.006, 0.95, "94.0%"),
        (0.96, 0.006, 0.97, "97.0%"),
        (0.94, 0.006, 0.97, None),
        (0.85, 0.006, 0.84, "84.0%"),
        (0.90, 0.006, 0.84, None),
        (0.92, 0.0, 0.95, None),
    ],
)
def test_an_interval_that_holds_a_threshold_wants_more_questions(
    retention: float, stderr: float, target: float, threshold: str | None
):
    given = advice(retention, target=target, stderr=stderr, num_samples=200)
    assert (given.step == "samples") == (threshold is not None)
    if threshold:
        assert given.reason.startswith(f"retention {retention:.1%} ± {stderr:.1%} may be above or below {threshold}")
        assert given.notes[0].startswith("by the value alone it would be ")


@pytest.mark.parametrize(
    ("retention", "stderr", "limit"),
    [
        (0.91, 0.0102, 800),  # (1.96 * 0.0102 / 0.01)^2 = 3.997 times as many
        (0.91, 0.006, 300),
        (0.91, 0.022, 3800),
        (0.91, 0.0229, None),  # more than 20 times as many
        (0.90, 0.006, None),
    ],
)
def test_as_many_questions_are_advised_as_would_tell(retention: float, stderr: float, limit: int | None):
    assert advice(retention, stderr=stderr, num_samples=200).changes == {"evaluate.limit": limit}


def test_where_there_are_no_more_questions_the_value_decides_and_a_note_says_so():
    given = advice(0.91, stderr=0.02, num_samples=2376, all_samples=True)
    assert given.step == "epochs"
    assert given.notes == ("retention 91.0% ± 2.0% may be above or below 90.0%; the step goes by the value",)


def test_agreement_is_called_a_stand_in():
    given = advice(0.66, is_proxy=True)
    assert given.step == "gamma"
    assert "no task was evaluated: agreement with the teacher stands in" in given.notes[0]


@pytest.mark.parametrize(
    ("value", "text"), [(0.15, "k=0.15"), (5.0, "k=5"), (None, "k=null"), ("mse", "k=mse"), (400, "k=400")]
)
def test_a_change_is_written_as_the_command_line_takes_it(value: Any, text: str):
    assert as_override("k", value) == text


@pytest.mark.parametrize("cut", ["depth", "width", "both"])
def test_beside_the_teachers_whole_distribution_hidden_terms_are_not_advised(cut: Any):
    given = advice(0.7, replace(DEPTH, cut=cut, gamma=0.0, hidden="standardised_mse"))
    assert (given.step, given.changes) == ("epochs", {"train.num_train_epochs": 5.0})
    assert given.reason.startswith("retention 70.0% is below 90%: more text helped")
