"""What a store holds once, beside its shards: the teacher's output head, and the transform codes of coded columns."""

from collections.abc import Iterable

import torch

from coldstill.cache.manifest import Manifest
from coldstill.cache.store import CONSTANTS, Store
from coldstill.pipeline.models.output_head import OutputHead
from coldstill.pipeline.targets.calibrations import read_code
from coldstill.pipeline.targets.kinds import parse_target
from coldstill.pipeline.targets.stored_head import load_head
from coldstill.pipeline.targets.target import TeacherTarget
from coldstill.pipeline.targets.transform_coding import TransformCode

_HOST = torch.device("cpu")


class StoredConstants:
    """Reads what a store holds once, when it is asked for.

    Args:
        store: The store.
        manifest: Its manifest.
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._store = store
        self._manifest = manifest
        self._codes: dict[str, TransformCode] = {}

    @property
    def vocab_size(self) -> int:
        """Entries of the teacher's vocabulary."""
        return int(self._store.teacher["vocab_size"])

    def code(self, target: TeacherTarget) -> TransformCode | None:
        """Return the transform code of a target, on the host; None where it has no calibration.

        Raises:
            IncompleteError: It was never committed.
            IdentityError: A committed shard of the column was coded with another.
        """
        if target.calibration is None:
            return None
        if target.name not in self._codes:
            self._codes[target.name] = read_code(self._store, self._manifest, target.calibration, column=target.name)
        return self._codes[target.name]

    def codes(self, targets: Iterable[TeacherTarget]) -> dict[str, TransformCode]:
        """Return the transform code of each target that has one, by its name."""
        found = {target.name: self.code(target) for target in targets}
        return {name: code for name, code in found.items() if code is not None}

    def head(self, device: torch.device = _HOST) -> OutputHead:
        """Return the teacher's output head, in float32.

        Raises:
            IncompleteError: It was never committed.
        """
        return load_head(self._store, device)


def read_codes(store: Store, manifest: Manifest, columns: Iterable[str]) -> dict[str, TransformCode]:
    """Read the transform codes that some of a store's columns need, by the name of each column.

    Raises:
        IncompleteError: One was never committed.
        IdentityError: A committed shard of a column was coded with another.
    """
    parsed = (parse_target(name) for name in columns if (CONSTANTS, name) not in manifest)
    return StoredConstants(store, manifest).codes(target for target in parsed if isinstance(target, TeacherTarget))
