"""How a batch's block outputs are stored, and what they are.

Shapes: B rows, T positions, Dt width of the teacher.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from coldstill.pipeline.targets.encodings import STORED, StateForm, decode_state
from coldstill.pipeline.targets.transform_coding import TransformCode
from torch import Tensor

StoredStates = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class HiddenForm:
    """How a batch's block outputs are stored.

    Attributes:
        form: The form of all of them.
        codes: The transform code of each teacher block, where they are coded.
    """

    form: StateForm
    codes: Mapping[int, TransformCode] = field(default_factory=dict)
    _copies: dict[tuple[int, torch.device], TransformCode] = field(default_factory=dict, repr=False, compare=False)

    def decode(self, stored: StoredStates, block: int) -> Tensor:
        """Return a teacher block's output, [B, T, Dt] in float32, on the device of what is stored."""
        arrays = stored[str(block)]
        return decode_state(arrays, form=self.form, code=self._code(block, next(iter(arrays.values())).device))

    def chosen(self, stored: StoredStates, block: int, counts_BT: Tensor) -> Tensor:
        """Say which of the positions that count are stored, [B, T]."""
        arrays = stored[str(block)]
        return counts_BT & arrays[STORED].bool() if STORED in arrays else counts_BT

    def _code(self, block: int, device: torch.device) -> TransformCode | None:
        """Return a block's transform code on a device, which it is brought to once."""
        code = self.codes.get(block)
        if code is None or code.centre_D.device == device:
            return code
        if (block, device) not in self._copies:
            self._copies[block, device] = code.to(device)
        return self._copies[block, device]
