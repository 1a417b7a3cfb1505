"""An exported student on its way to the hub, over HTTP to a hub of the test's own."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub import READ_TOKEN, TOKEN, Hub
from huggingface_hub import constants

from coldstill.cache.errors import StoreNotFoundError
from coldstill.pipeline.push import push_student
from coldstill.pipeline.runtime.errors import HubError, RecipeError

REPO = "someone/student"


@pytest.fixture
def student(tmp_path: Path, build_model: Callable[..., Any], tokenizer: Any) -> Path:
    folder = tmp_path / "student"
    build_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\ntags: [coldstill]\n---\n\n# Student\n")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("private", [False, True])
def test_every_file_of_a_student_arrives_whole(hub: Hub, student: Path, private: bool):
    url = push_student(student, REPO, private=private)
    assert url == f"{constants.ENDPOINT}/{REPO}"
    assert hub.repositories[REPO] == files_of(student)
    assert list(hub.large) == ["model.safetensors"], "the large file took the way of large files"
    assert (REPO in hub.private) == private
    assert set(hub.cards) == {(student / "README.md").read_text()}, "the hub has checked the card"


def test_through_the_xet_store_the_commit_names_what_the_student_holds(
    hub: Hub, student: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    push_student(student, REPO)
    files = files_of(student)
    weights = files.pop("model.safetensors")
    assert hub.repositories[REPO] == files
    assert hub.large == {"model.safetensors": (hashlib.sha256(weights).hexdigest(), len(weights))}
    assert sum(map(len, hub.xorbs)) > 0.5 * len(weights), "random weights hardly compress"


def test_a_student_that_is_pushed_again_replaces_the_first(hub: Hub, student: Path):
    push_student(student, REPO)
    (student / "README.md").write_text("---\ntags: [coldstill]\n---\n\n## Recovery\n")
    push_student(student, REPO)
    assert hub.repositories[REPO] == files_of(student)


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub, student: Path):
    push_student(student, REPO)
    hub.repositories[REPO].clear()
    with pytest.raises(HubError, match="someone/student is there already and is public"):
        push_student(student, REPO, private=True)
    assert not hub.repositories[REPO]


def test_nobody_logged_in_is_said_before_anything_is_sent(
    hub: Hub, student: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(HubError, match="^nobody is logged in to the hub; run: hf auth login, or set HF_TOKEN$"):
        push_student(student, REPO)
    assert not hub.repositories


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_unknown", r"the hub does not know the token \(401: Invalid username or password.\); run: hf auth login"),
        (
            READ_TOKEN,
            r"the token may not write to someone/student \(403: You don't have the rights.*; use one with wri",
        ),
    ],
    ids=["unknown", "read-only"],
)
def test_a_token_that_does_not_do_is_one_line(
    hub: Hub, student: Path, monkeypatch: pytest.MonkeyPatch, token: str, message: str
):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=message) as caught:
        push_student(student, REPO)
    assert "\n" not in str(caught.value)


def test_a_hub_that_refuses_a_file_is_one_line(hub: Hub, student: Path):
    hub.breaks_uploads = True
    with pytest.raises(
        HubError, match=r"did not take someone/student \(400: the store is full\); push again"
    ) as caught:
        push_student(student, REPO)
    assert "\n" not in str(caught.value)


def test_a_hub_out_of_reach_is_one_line(student: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError, match="the hub at http://127.0.0.1:9 did not take someone/student: .*refused"):
        push_student(student, REPO)


def test_offline_is_said(hub: Hub, student: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push_student(student, REPO)


@pytest.mark.parametrize("repo", ["student", "a/b/c", "someone/stu dent", "someone/--student"])
def test_a_name_that_is_none_is_one_line(hub: Hub, student: Path, repo: str):
    with pytest.raises(RecipeError, match="--push") as caught:
        push_student(student, repo)
    assert "\n" not in str(caught.value)


def test_a_run_that_was_not_trained_has_nothing_to_push(hub: Hub, tmp_path: Path):
    with pytest.raises(StoreNotFoundError, match=r"no exported student in .*; run: coldstill train"):
        push_student(tmp_path / "run/student", REPO)
