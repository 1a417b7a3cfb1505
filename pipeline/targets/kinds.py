"""All kinds of columns, and the one parser of their names."""

from collections.abc import Iterable

from coldstill.cache.errors import FormatError
from coldstill.cache.manifest import Manifest
from coldstill.cache.store import CONSTANTS
from coldstill.pipeline.targets.chosen_tokens import LargestLogits, TailDraws
from coldstill.pipeline.targets.states import BlockInput, BlockOutput, FinalState
from coldstill.pipeline.targets.target import Target, TeacherTarget
from coldstill.pipeline.targets.token_logits import LabelLogit, Normaliser
from coldstill.pipeline.targets.tokens import Tokens

KINDS: tuple[type[Target], ...] = (
    Tokens,
    LabelLogit,
    LargestLogits,
    Normaliser,
    TailDraws,
    FinalState,
    BlockOutput,
    BlockInput,
)


def parse_target(name: str) -> Target:
    """Return the target that a column's name says.

    Raises:
        FormatError: No kind that this version knows has such a name.
    """
    for kind in KINDS:
        try:
            target = kind.parse(name)
        except ValueError:
            continue
        # What does not come back as it was is the name of something else.
        if target is not None and target.name == name:
            return target
    raise FormatError(
        f"column {name} is of no kind that this version knows; a newer version wrote it: update coldstill"
    )


def teacher_targets(names: Iterable[str]) -> list[TeacherTarget]:
    """Return those targets among the columns of these names that are of what the teacher says.

    Raises:
        FormatError: No kind that this version knows has one of the names.
    """
    targets = (parse_target(name) for name in names)
    return [target for target in targets if isinstance(target, TeacherTarget)]


def stored_targets(manifest: Manifest) -> list[TeacherTarget]:
    """Return what a store keeps of its teacher's words for each token, by name; constants are none.

    Raises:
        FormatError: The store has a column of no kind that this version knows.
    """
    return teacher_targets(name for name in manifest.columns() if (CONSTANTS, name) not in manifest)
