"""One teacher forward to named tensors. No I/O.

Block outputs come from hooks, not from `output_hidden_states`, whose last entry is behind the final norm. The output
head runs in chunks of positions, so that the logits of a batch never exist at once.
Shapes: B rows, T positions, N real positions of all rows, V vocabulary, K stored tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coldstill.pipeline.models import ModelParts, all_finite, rope_switches
from coldstill.pipeline.models.forward import Place, model_inputs, pad_rows, run_body, what_to_try
from coldstill.pipeline.models.output_head import OutputHead
from coldstill.pipeline.runtime.errors import NonFiniteError
from coldstill.pipeline.targets.captured import Captured, CaptureRequest, Draws, TailRequest
from coldstill.pipeline.targets.tail_sampling import draw_tail
from coldstill.pipeline.targets.teacher_logits import largest_logits, logsumexp_at

NO_LABEL = -1
# Of a chunk's logits: without gradients there is room for more rows, with which the head is faster.
_CHUNK_BYTES = 64 << 20


@torch.inference_mode()
def capture(
    parts: ModelParts,
    rows: Sequence[Tensor],
    request: CaptureRequest,
    *,
    row_names: Sequence[str],
    uniforms_N: Tensor | None = None,
) -> Captured:
    """Run the teacher over some rows of token ids, [T] each and of any lengths, and keep what is asked.

    Args:
        parts: The teacher.
        rows: The rows.
        request: What to keep.
        row_names: How errors name each row.
        uniforms_N: For draws from the tail, a number in [0, 1) for each of the N positions.

    Raises:
        NonFiniteError: A value is NaN or infinite; names row, block and position.
    """
    batch = LaidBatch.lay(parts, rows, row_names)
    switches = rope_switches(parts.model.config)
    outputs, state_BTD = run_body(parts.body, parts.blocks, batch.inputs, request.blocks, switches=switches)
    hidden_ND = {place: batch.real_positions(outputs[place], f"block {place}") for place in request.blocks}
    return capture_end(parts.output_head, batch, state_BTD, request, hidden_ND=hidden_ND, uniforms_N=uniforms_N)


@dataclass(frozen=True)
class LaidBatch:
    """Rows of a teacher batch, laid side by side.

    Attributes:
        rows: Their token ids, [T] each.
        names: How errors name each.
        mask_BT: Which positions are real, where the output head is.
        inputs: What the teacher is called with.
    """

    rows: Sequence[Tensor]
    names: Sequence[str]
    mask_BT: Tensor
    inputs: dict[str, Any]

    @classmethod
    def lay(cls, parts: ModelParts, rows: Sequence[Tensor], names: Sequence[str]) -> "LaidBatch":
        """Lay rows side by side, where the teacher takes them."""
        ids_BT, mask_BT = pad_rows(rows, device=next(parts.model.parameters()).device)
        # Without padding no mask is passed: attention then takes its fastest path.
        attention_mask = None if bool(mask_BT.all()) else mask_BT.long()
        return cls(rows, names, mask_BT.to(parts.device), model_inputs(ids_BT, attention_mask))

    def real_positions(self, values_BTD: Tensor, what: str) -> Tensor:
        """Leave padding behind: return the values of real positions, [N, D].

        Raises:
            NonFiniteError: One is not finite; names row, position and what it is of.
        """
        # What is stored, and what the head makes logits of, are real positions alone.
        values_ND = values_BTD.to(self.mask_BT.device)[self.mask_BT]
        # Where each value came from is known only now; in a shard's bytes a NaN would say neither row nor position.
        self.check_finite(values_ND, what)
        return values_ND

    def check_finite(self, values: Tensor, what: str) -> None:
        """Refuse values of the N real positions, [N, ...], one of which is not finite.

        Raises:
            NonFiniteError: One is not.
        """
        if all_finite([values]):
            return
        index = int((~values.isfinite()).reshape(len(values), -1).any(dim=1).nonzero()[0])
        for row, name in zip(self.rows, self.names, strict=True):
            if index < len(row):
                raise NonFiniteError(
                    f"teacher gave a non-finite value: {name}, {what}, position {index}; {what_to_try(values.dtype)}"
                )
            index -= len(row)


@torch.inference_mode()
def capture_end(
    head: OutputHead,
    batch: LaidBatch,
    state_BTD: Tensor,
    request: CaptureRequest,
    *,
    hidden_ND: dict[Place, Tensor],
    uniforms_N: Tensor | None = None,
) -> Captured:
    """Keep what is asked of the last state that a teacher's body gave of a batch, and of its logits.

    Args:
        head: The teacher's output head.
        batch: The batch.
        state_BTD: The post-norm last state.
        request: What to keep.
        hidden_ND: What was kept of it before, by place.
        uniforms_N: For draws from the tail, a number in [0, 1) for each of the N positions.

    Raises:
        NonFiniteError: A value is NaN or infinite; names row and position.
    """
    state_ND = batch.real_positions(state_BTD, "final norm")
    logits = _Logits(request, len(state_ND), state_ND.device, uniforms_N)
    # The head is as much work as several blocks, or, of a small model with many words, as all of them.
    if request.needs_logits:
        labels_N = torch.cat([_next_tokens(row) for row in batch.rows]).to(state_ND.device)
        for chunk in head.chunks(len(state_ND), num_bytes=_CHUNK_BYTES):
            logits_CV = head(state_ND[chunk])
            logits.take(chunk, logits_CV, labels_N[chunk])
        logits.check_finite(batch)
    return logits.finish(hidden_ND, state_ND if request.final_state else None)


class _Logits:
    """Gathers what is asked of the logits, chunk by chunk."""

    def __init__(
        self, request: CaptureRequest, num_positions: int, device: torch.device, uniforms_N: Tensor | None
    ) -> None:
        self._request = request
        self._uniforms_N = None if uniforms_N is None else uniforms_N.to(device)
        self._draws: dict[TailRequest, list[Draws]] = {tail: [] for tail in request.tails}
        self._top_NK = {
            k: (
                torch.empty(num_positions, k, device=device),
                torch.empty(num_positions, k, dtype=torch.int64, device=device),
            )
            for k in request.ks
        }
        self._label_logit_N = torch.empty(num_positions, device=device) if request.labels else None
        self._logsumexp_N = {
            temperature: torch.empty(num_positions, device=device) for temperature in request.temperatures
        }

    def take(self, chunk: slice, logits_CV: Tensor, labels_C: Tensor) -> None:
        # In place, chunk by chunk: pieces that are joined at the end would be there twice for a moment.
        for k, (top_logits_NK, top_ids_NK) in self._top_NK.items():
            top_logits_NK[chunk], top_ids_NK[chunk] = largest_logits(logits_CV, k)
        if self._label_logit_N is not None:
            of_label_C = logits_CV.gather(-1, labels_C.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            self._label_logit_N[chunk] = of_label_C.where(labels_C != NO_LABEL, 0.0)
        for temperature, values_C in logsumexp_at(logits_CV, self._request.temperatures).items():
            self._logsumexp_N[temperature][chunk] = values_C
        for tail, draws in self._draws.items():
            assert self._uniforms_N is not None
            # Chosen again, not taken from the stored ones: these may be more than the tail begins behind, and where
            # logits tie, the first k of more are not the k largest.
            _, top_ids_CK = largest_logits(logits_CV, tail.k)
            drawn = draw_tail(
                logits_CV,
                top_ids_CK,
                temperatures=tail.temperatures,
                num_draws=tail.num_draws,
                uniforms_C=self._uniforms_N[chunk],
            )
            draws.append(drawn)

    def check_finite(self, batch: LaidBatch) -> None:
        named = {"label logit": self._label_logit_N}
        named |= {f"top {k} logits": top_logits_NK for k, (top_logits_NK, _) in self._top_NK.items()}
        named |= {f"logsumexp at T={temperature:g}": values for temperature, values in self._logsumexp_N.items()}
        for name, values in named.items():
            if values is not None:
                batch.check_finite(values, name)

    def finish(self, hidden_ND: dict[Place, Tensor], final_state_ND: Tensor | None) -> Captured:
        return Captured(
            hidden_ND=hidden_ND,
            final_state_ND=final_state_ND,
            top_NK=self._top_NK,
            label_logit_N=self._label_logit_N,
            logsumexp_N=self._logsumexp_N,
            tail_NM={tail: _joined(draws) for tail, draws in self._draws.items()},
        )


def _joined(chunks: Sequence[Draws]) -> Draws:
    logits, ids, log_weights = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return logits, ids, log_weights


def _next_tokens(row: Tensor) -> Tensor:
    return torch.cat([row[1:].long(), torch.tensor([NO_LABEL])])
