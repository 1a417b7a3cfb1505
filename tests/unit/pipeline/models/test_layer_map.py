import pytest

from coldstill.pipeline.models.layer_map import create_layer_map, spread_pairs
from coldstill.pipeline.runtime.errors import RecipeError


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("uniform", {0: 0, 1: 2, 2: 4, 3: 6}),
        ("last", {0: 4, 1: 5, 2: 6, 3: 7}),
        ("stride", {0: 1, 1: 3, 2: 5, 3: 7}),
        ("endpoints", {0: 0, 1: 2, 2: 4, 3: 7}),
    ],
)
def test_each_strategy_maps_four_blocks_onto_eight(strategy, expected):
    assert create_layer_map(4, 8, strategy) == expected


def test_covered_maps_each_block_to_the_last_one_that_it_stands_for():
    assert create_layer_map(3, 6, "covered", kept_blocks=[0, 2, 4]) == {0: 1, 1: 3, 2: 5}
    assert create_layer_map(3, 3, "covered", kept_blocks=[0, 1, 2]) == {0: 0, 1: 1, 2: 2}


def test_kept_maps_each_block_to_the_one_it_was_cut_from():
    assert create_layer_map(3, 6, "kept", kept_blocks=[0, 2, 5]) == {0: 0, 1: 2, 2: 5}


def test_pairs_are_taken_as_given_in_the_students_order():
    assert list(create_layer_map(3, 6, "pairs", pairs={2: 5, 0: 1}).items()) == [(0, 1), (2, 5)]


@pytest.mark.parametrize("strategy", ["uniform", "last", "stride", "endpoints"])
@pytest.mark.parametrize(("n_student", "n_teacher"), [(1, 1), (1, 7), (5, 7), (7, 7), (26, 30)])
def test_every_map_is_increasing_and_within_the_teacher(strategy, n_student, n_teacher):
    layer_map = create_layer_map(n_student, n_teacher, strategy)
    targets = list(layer_map.values())
    assert list(layer_map) == list(range(n_student))
    assert targets == sorted(set(targets))
    assert 0 <= targets[0] <= targets[-1] < n_teacher


def test_equal_depths_map_each_block_to_itself():
    for strategy in ("uniform", "last", "stride", "endpoints"):
        assert create_layer_map(5, 5, strategy) == {block: block for block in range(5)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9, 8, "uniform"), "mapping needs 1 to 8 student blocks, as many as the teacher has, got 9"),
        ((4, 8, "nearest"), "mapping.strategy 'nearest' is unknown; one of uniform, last"),
        ((4, 8, "kept"), "mapping.strategy kept needs a student .* its config names no kept_blocks"),
        ((4, 8, "covered"), "mapping.strategy covered needs a student .* its config names no kept_blocks"),
    ],
)
def test_what_cannot_be_mapped_is_refused(arguments, message):
    with pytest.raises(RecipeError, match=message):
        create_layer_map(*arguments)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({4: 0}, "student block 4; the student has blocks 0 to 3"),
        ({0: 8}, "teacher block 8; the teacher has blocks 0 to 7"),
    ],
)
def test_pairs_beyond_a_model_are_refused(pairs, message):
    with pytest.raises(RecipeError, match=message):
        create_layer_map(4, 8, "pairs", pairs=pairs)


def test_kept_blocks_that_do_not_fit_are_refused():
    with pytest.raises(RecipeError, match=r"names kept_blocks \[0, 9\]; expected 2 blocks below 8"):
        create_layer_map(2, 8, "kept", kept_blocks=[0, 9])


def test_fewer_pairs_are_evenly_spaced_and_end_with_the_last():
    layer_map = {block: block for block in range(26)}
    assert list(spread_pairs(layer_map, 6)) == [3, 7, 12, 16, 20, 25]
    assert spread_pairs(layer_map, None) == layer_map
    with pytest.raises(RecipeError, match="mapping.num_pairs is 27, but the student has 26 blocks"):
        spread_pairs(layer_map, 27)
