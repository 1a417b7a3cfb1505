"""Send an exported student with its card to the model hub."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined] # HTTPError is of httpx, or of httpx2 in version 2
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
)

from coldstill.cache.errors import StoreNotFoundError
from coldstill.pipeline.outputs.run_index import STUDENT
from coldstill.pipeline.runtime.errors import HubError, RecipeError
from coldstill.pipeline.stage_two.model_card import has_numbers
from coldstill.pipeline.stage_two.run_folder import folder_named
from coldstill.pipeline.sweeps.results import is_sweep

_LOGIN = "run: hf auth login, or set HF_TOKEN"


@dataclass(frozen=True)
class PushSummary:
    """What was sent.

    Attributes:
        url: Where it is.
        has_numbers: Whether its card says what was recovered.
    """

    url: str
    has_numbers: bool


def push(path: Path, repo: str, *, private: bool = False) -> PushSummary:
    """Upload the student of a run, named by its folder or its recipe; see `push_student`.

    Raises:
        RecipeError: The folder holds a sweep, which has many students.
    """
    folder = folder_named(path)
    if is_sweep(folder):
        raise RecipeError(f"--push uploads one student, and {folder} holds a sweep; name the folder of one of its runs")
    student = folder / STUDENT
    return PushSummary(push_student(student, repo, private=private), has_numbers(student))


def push_student(student: Path, repo: str, *, private: bool = False) -> str:
    """Upload a student's folder into a model repository, which is made where it is missing, and return its URL.

    What was uploaded stays when the rest fails; the same call goes on.

    Args:
        student: The folder, as `train` exported it.
        repo: `OWNER/NAME` on the hub.
        private: Whether the repository is to be private; one that is there already and is not is refused.

    Raises:
        StoreNotFoundError: There is no exported student.
        RecipeError: The name is none that the hub allows.
        HubError: Nobody is logged in, the token may not write there, or the hub cannot be reached.
    """
    if not (student / "config.json").is_file():
        raise StoreNotFoundError(f"no exported student in {student}; run: coldstill train")
    if repo.count("/") != 1:
        raise RecipeError(f"--push takes OWNER/NAME, got {repo!r}")
    if get_token() is None:
        raise HubError(f"nobody is logged in to the hub; {_LOGIN}")
    api = HfApi()
    with _hub_errors(repo):
        url = str(api.create_repo(repo, private=private or None, exist_ok=True))
        is_open = private and not api.model_info(repo).private
    if is_open:
        raise HubError(f"{repo} is there already and is public: make it private on the hub, or choose another name")
    with _hub_errors(repo):
        api.upload_folder(repo_id=repo, folder_path=student, commit_message="Student trained by Coldstill")
    return url


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn what the hub and its client say into one line."""
    try:
        yield
    except HFValidationError as error:
        raise RecipeError(f"--push {repo}: {_one_line(error)}") from None
    except OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set: unset it to push") from None
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        cause = error.__cause__ or error  # what is said of one file's upload hides what the hub answered
        answer = cause if isinstance(cause, HfHubHTTPError) else error
        if isinstance(answer, HfHubHTTPError):
            raise HubError(_refusal(answer, repo)) from None
        raise HubError(f"{_hub()} did not take {repo}: {_one_line(cause)}; push again to go on") from None


def _hub() -> str:
    return f"the hub at {constants.ENDPOINT}"


def _refusal(error: HfHubHTTPError, repo: str) -> str:
    """Say what an answer of the hub means."""
    status, said = error.response.status_code, error.server_message or error.response.reason_phrase
    if status == HTTPStatus.UNAUTHORIZED:
        return f"the hub does not know the token (401: {_one_line(said)}); {_LOGIN}"
    if status == HTTPStatus.FORBIDDEN:
        return (
            f"the token may not write to {repo} (403: {_one_line(said)}); use one with write access, or a name of yours"
        )
    return f"{_hub()} did not take {repo} ({status}: {_one_line(said)}); push again to go on"


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
