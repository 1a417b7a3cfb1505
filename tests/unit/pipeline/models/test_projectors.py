import pytest
import torch
from torch import nn

from coldstill.pipeline.models.projectors import LearnableProjector, create_projectors
from coldstill.pipeline.runtime.errors import RecipeError


def test_equal_widths_need_no_projector_and_different_ones_get_a_linear_one():
    assert isinstance(create_projectors([0, 3], student_dim=8, teacher_dim=8)["3"], nn.Identity)
    projectors = create_projectors([0, 3], student_dim=8, teacher_dim=12)
    assert list(projectors) == ["0", "3"]
    assert projectors["0"](torch.ones(2, 5, 8)).shape == (2, 5, 12)


def test_a_number_of_blocks_makes_a_projector_for_each_of_them():
    projectors = create_projectors(student_dim=8, teacher_dim=12, n_layers=11)
    assert list(projectors) == [str(block) for block in range(11)]
    assert list(create_projectors({3: 5, 1: 2}, student_dim=8, teacher_dim=12)) == ["1", "3"], "a layer map will do"


@pytest.mark.parametrize(("given", "which"), [({}, "neither"), ({"student_blocks": [0], "n_layers": 2}, "both")])
def test_blocks_are_given_in_one_way(given, which):
    with pytest.raises(RecipeError, match=f"takes student_blocks, the mapped ones, or n_layers, .* got {which}"):
        create_projectors(**given, student_dim=8, teacher_dim=12)


def test_a_linear_projector_is_asked_for_by_name_where_widths_agree():
    assert isinstance(create_projectors([0], student_dim=8, teacher_dim=8, kind="linear")["0"], LearnableProjector)


def test_the_linear_projector_is_xavier_uniform_with_gain_a_hundredth_and_has_no_bias():
    torch.manual_seed(0)
    projector = LearnableProjector(300, 200)
    bound = 0.01 * (6 / (300 + 200)) ** 0.5
    weight = projector.linear.weight.detach()
    assert projector.linear.bias is None
    assert weight.abs().max() <= bound
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_initial_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = (create_projectors([0, 1], student_dim=4, teacher_dim=6, seed=7) for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first["0"].linear.weight, first["1"].linear.weight)


def test_fixed_projectors_learn_nothing_and_an_mlp_bends():
    assert not any(
        p.requires_grad for p in create_projectors([0], student_dim=4, teacher_dim=6, learnable=False).parameters()
    )
    mlp = create_projectors([0], student_dim=4, teacher_dim=6, kind="mlp", seed=0)["0"]
    x = torch.randn(3, 4)
    assert mlp(x).shape == (3, 6)
    assert not torch.allclose(mlp(2 * x) - mlp(torch.zeros(3, 4)), 2 * (mlp(x) - mlp(torch.zeros(3, 4))), atol=1e-9)


def test_none_between_different_widths_and_an_unknown_kind_are_refused():
    with pytest.raises(RecipeError, match="the student's width 4 is not the teacher's 6; use auto"):
        create_projectors([0], student_dim=4, teacher_dim=6, kind="none")
    with pytest.raises(RecipeError, match="projector.kind 'conv' is unknown; one of auto, linear, mlp, none"):
        create_projectors([0], student_dim=4, teacher_dim=6, kind="conv")
