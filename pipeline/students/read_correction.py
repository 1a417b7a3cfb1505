"""What a narrower residual stream no longer says, told by what it still says.

The channels of a residual stream are correlated. When some go, each matrix that reads the stream is corrected by least
squares over calibration rows, so that it gives from the kept channels what it gave from all. Norms that no corrected
matrix reads behind, and a norm before a tied head, are scaled instead: fewer channels have another mean square.

Shapes: N positions, D channels, K of them kept, O outputs of a matrix.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from coldstill.pipeline.models import ModelParts
from coldstill.pipeline.models.forward import padded_batches
from coldstill.pipeline.students.axes import READERS, final_norm_name, head_name, is_tied
from coldstill.pipeline.students.norms import sliced_norm
from coldstill.pipeline.students.ridge import solve_towards

# Of the mean of the Gram matrix's diagonal: what few rows do not tell stays as plain slicing has it.
_RIDGE = 1e-3


@dataclass
class ReadCorrections:
    """What to change where the channels that are read become fewer.

    Attributes:
        maps: By reading matrix, [D, K]: times this from the right, it reads the kept channels.
        norm_scales: By norm, what its weight is multiplied by.
    """

    maps: dict[str, Tensor] = field(default_factory=dict)
    norm_scales: dict[str, float] = field(default_factory=dict)


def fit_read_corrections(parts: ModelParts, channels_K: Tensor, rows: Sequence[Tensor]) -> ReadCorrections:
    """Fit the corrections of a model that keeps some channels, over rows of token ids [T].

    Holds K times (K + D) float32 for each norm of the model while it runs.
    """
    moments = _Moments(parts, channels_K.to(next(parts.model.parameters()).device))
    with torch.inference_mode(), moments.watching():
        for ids_BT, mask_BT in padded_batches(rows, parts.model):
            moments.mask_BT = mask_BT
            parts.body(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False)
    return moments.solve()


@dataclass
class _Reading:
    """One place where the stream is read: by which matrices, and second moments of what they would and did read."""

    readers: list[str]
    gram_KK: Tensor | float = 0.0
    cross_KD: Tensor | float = 0.0


@dataclass
class _Scale:
    """Products of what a norm gives for the kept channels, and what its sliced copy would give."""

    dot: float = 0.0
    square: float = 0.0

    @property
    def value(self) -> float:
        return self.dot / self.square if self.square else 1.0


class _Moments:
    """Sums over calibration rows, gathered by hooks."""

    def __init__(self, parts: ModelParts, channels_K: Tensor) -> None:
        self.channels_K = channels_K
        self.mask_BT: Tensor | None = None
        self._parts = parts
        self._readings: dict[str, _Reading] = {}
        self._scales: dict[str, _Scale] = {}
        # Of the block that is running: by the identity of a norm's output, the norm and its sliced copy's output.
        self._sources: dict[int, tuple[str, Tensor, Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Gather from every forward pass while the context is open."""
        handles = []
        final_norm = final_norm_name(self._parts)
        for name, module in self._parts.model.named_modules():
            within = name.removeprefix(f"{self._parts.blocks_name}.").partition(".")[2]
            if name == final_norm or ("." not in within and within and _is_norm_of(module, self._parts.hidden_size)):
                handles.append(
                    module.register_forward_hook(self._norm_hook(name, sliced_norm(module, self.channels_K)))
                )
            elif within in READERS:
                handles.append(module.register_forward_pre_hook(self._reader_hook(name)))
        handles += [block.register_forward_hook(lambda *_: self._sources.clear()) for block in self._parts.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _norm_hook(self, name: str, sliced: nn.Module) -> Any:
        scale = self._scales.setdefault(name, _Scale())
        reads_head = name == final_norm_name(self._parts) and not is_tied(self._parts)

        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            kept = sliced(args[0][..., self.channels_K])
            counted = kept[self.mask_BT].float()
            scale.dot += float((output[..., self.channels_K][self.mask_BT].float() * counted).sum())
            scale.square += float(counted.square().sum())
            self._sources[id(output)] = (name, output, kept)
            if reads_head:
                self._add(name, head_name(self._parts), output, kept)

        return hook

    def _reader_hook(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            read = args[0]
            # A matrix that no norm stands before reads the stream itself.
            source, _, kept = self._sources.get(id(read), (name.rpartition(".")[0], read, read[..., self.channels_K]))
            self._add(source, name, read, kept)

        return hook

    def _add(self, place: str, reader: str, read: Tensor, kept: Tensor) -> None:
        reading = self._readings.setdefault(place, _Reading([reader]))
        if reading.readers[0] != reader:
            if reader not in reading.readers:
                reading.readers.append(reader)
            return
        read_ND, kept_NK = read[self.mask_BT].float(), kept[self.mask_BT].float()
        weighted_NK = kept_NK / read_ND.square().mean(dim=-1, keepdim=True).clamp(min=1e-12)
        reading.gram_KK = reading.gram_KK + weighted_NK.T @ kept_NK
        reading.cross_KD = reading.cross_KD + weighted_NK.T @ read_ND

    def solve(self) -> ReadCorrections:
        """Solve each place's (G + ridge) B = C + ridge * (plain slicing), in float64."""
        result = ReadCorrections()
        for reading in self._readings.values():
            assert isinstance(reading.gram_KK, Tensor)
            assert isinstance(reading.cross_KD, Tensor)
            gram_KK, cross_KD = reading.gram_KK.double(), reading.cross_KD.double()
            kept_K = torch.arange(len(self.channels_K), device=self.channels_K.device)
            usual = cross_KD[kept_K, self.channels_K].sum() / gram_KK.diagonal().sum()
            sliced_KD = torch.zeros_like(cross_KD)
            sliced_KD[kept_K, self.channels_K] = usual
            map_DK = solve_towards(sliced_KD, gram_KK, cross_KD, share=_RIDGE).T.float()
            result.maps |= dict.fromkeys(reading.readers, map_DK)
        result.norm_scales = {name: scale.value for name, scale in self._scales.items() if name not in self._readings}
        return result


def _is_norm_of(module: nn.Module, width: int) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(tuple(parameter.shape) == (width,) for parameter in parameters)
