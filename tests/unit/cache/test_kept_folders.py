"""What is wrong with a pruned student's files, against the checksums that were written last."""

import hashlib
import json
from pathlib import Path

import pytest
from bits import flip

from coldstill.cache.kept_folders import CHECKSUMS, find_damage
from coldstill.cache.local_objects import LocalObjects

FILES = {"config.json": b'{"width": 16, "blocks": 3}', "model.safetensors": b"weights" * 10}


@pytest.fixture
def student(tmp_path: Path) -> Path:
    folder = tmp_path / "students/s0"
    folder.mkdir(parents=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    (folder / "provenance.json").write_text("{}")
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
    (folder / CHECKSUMS).write_text(json.dumps(sums))
    return folder


def damage(student: Path) -> str | None:
    return find_damage(LocalObjects(str(student.parents[1])), "students/s0")


def test_a_student_as_it_was_written_has_no_damage(student: Path):
    assert damage(student) is None


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_altered_or_lost_is_named(student: Path, name: str):
    flip(student / name)
    assert damage(student) == f"{name} is not what was written"
    (student / name).unlink()
    assert damage(student) == f"{name} is missing"


def test_a_student_without_checksums_was_never_finished(student: Path):
    (student / CHECKSUMS).unlink()
    assert damage(student) == f"{CHECKSUMS} is missing"


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_checksums_that_are_none_are_damage_themselves(student: Path, text: str):
    (student / CHECKSUMS).write_text(text)
    assert damage(student) == f"{CHECKSUMS} is not what was written"


def test_the_record_of_how_it_was_made_decides_nothing(student: Path):
    (student / "provenance.json").unlink()
    assert damage(student) is None
