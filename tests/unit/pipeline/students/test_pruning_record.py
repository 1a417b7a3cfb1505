"""What a student's record says was cut, in words and for those who go by it; records of before say less."""

import pytest

from coldstill.pipeline.students.pruning_record import describe_cut, is_narrower, was_cut

RECORD = {
    "parameters": {"teacher": 1000, "student": 900},
    "blocks": {"teacher": 30, "student": 30},
    "heads": {"teacher": 9, "student": 9},
    "mlp": {"teacher": None, "student": None},
    "hidden": {"teacher": 576, "student": 576},
}


@pytest.mark.parametrize(
    ("size", "narrower", "words"),
    [
        ("blocks", False, "blocks 30 to 26, "),
        ("heads", True, "attention heads 9 to 6, "),
        ("mlp", True, "MLP width 1,536 to 1,072, "),
        ("hidden", True, "hidden width 576 to 448, "),
    ],
)
def test_each_size_that_was_cut_is_named_and_all_but_blocks_make_a_student_narrower(size, narrower, words):
    before, after = {"blocks": (30, 26), "heads": (9, 6), "mlp": (1536, 1072), "hidden": (576, 448)}[size]
    record = {**RECORD, size: {"teacher": before, "student": after}}
    assert [name for name in ("blocks", "heads", "mlp", "hidden") if was_cut(record, name)] == [size]
    assert is_narrower(record) is narrower
    assert describe_cut(record) == f"{words}parameters 1,000 to 900 (90.0%)"


def test_a_record_of_before_heads_were_cut_says_that_they_are_whole():
    before = {key: value for key, value in RECORD.items() if key != "heads"}
    assert not was_cut(before, "heads")
    assert not is_narrower(before)
