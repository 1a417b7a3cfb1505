"""A calibration says how far it is, and its metric is by positions of all of the text."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from coldstill.pipeline.models.output_head import OutputHead
from coldstill.pipeline.precompute import precompute
from coldstill.pipeline.recipe.file import load_recipe
from coldstill.pipeline.targets.fisher_information import fisher_information
from coldstill.pipeline.targets.kinds import parse_target
from coldstill.pipeline.targets.target import TeacherTarget

CODED = {"logits": {"kind": "final"}, "hidden": {"encoding": "coded"}}
D, V = 12, 60


@pytest.mark.parametrize("show_progress", [True, False])
def test_a_calibration_shows_what_it_does_and_how_far_it_is(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], show_progress: bool
):
    precompute(load_recipe(write_recipe(targets=CODED)), show_progress=show_progress)
    shown = capsys.readouterr().err
    for ending in ("calibrate: 100%", " 480/480 ", "calibrate, fit: 100%", " 768/768 "):  # 20 rows, 384 words twice
        assert (ending in shown) == show_progress, ending


def test_the_metric_is_by_positions_of_all_of_the_text():
    """Of a text whose halves differ, some of the positions give about the metric of all."""
    generator = torch.Generator().manual_seed(0)
    head = OutputHead(torch.randn(V, D, generator=generator))
    halves = [torch.randn(3000, D, generator=generator) * torch.linspace(*ends, D) for ends in ((3, 0.1), (0.1, 3))]
    states = torch.cat(halves)
    target = parse_target("logits/final/coded_0.03")
    assert isinstance(target, TeacherTarget)
    synthesis = target.fit_code(states, head).synthesis_DD.double()
    # An error in each coefficient costs 1 by the metric that the code was fitted to.
    costs = (synthesis @ fisher_information(states, head) * synthesis).sum(dim=1)
    assert 0.97 < costs.mean() < 1.03
    assert costs.min() > 0.8
    assert costs.max() < 1.2
