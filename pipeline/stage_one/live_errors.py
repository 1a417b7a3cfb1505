"""How far stored columns are from the live teacher, and whether that is within what they state. No I/O.

Each kind of column has its measure, and each form its bound. An element is held to its bound, ten times the noise, and
rounding; the noise is how far two live runs of the teacher differ.
Shapes: N positions of some rows, P of these that are stored, K stored tokens, C positions of a chunk, D width,
V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from coldstill.pipeline.losses.logits_targets import FullDistribution
from coldstill.pipeline.models.output_head import OutputHead
from coldstill.pipeline.targets.columns import (
    FINAL_PREFIX,
    HIDDEN_PREFIX,
    LABEL_LOGIT,
    TAIL_PREFIX,
    logsumexp_name,
    state_form,
    topk_size,
)
from coldstill.pipeline.targets.encodings import STORED, StateForm, decode_state
from coldstill.pipeline.targets.token_encodings import LOGIT_STEP, decode_tail, decode_topk
from coldstill.pipeline.targets.transform_coding import TransformCode
from torch import Tensor

SHARE, NATS, KL = "variance share", "nats", "KL in nats"

_NOISE_MARGIN = 10.0
# What float32 sums over a model's width may lose, in units of its rounding.
_FLOAT32_ROUNDINGS = 32
_SMALLEST_VARIANCE = 1e-12
# Of the value, and below the smallest normal number.
_FLOAT_BOUNDS = {"float16": (2**-11, 2**-25), "bfloat16": (2**-8, 2**-134), "float32": (0.0, 0.0)}

Arrays = Mapping[str, Tensor]
# What a column is made of, each row run alone, and rows run side by side.
Live = tuple[Tensor, Tensor]


def measure_of(column: str) -> str | None:
    """Say what a column's error is measured in; None for a column that is nothing of the teacher's."""
    if column.startswith(FINAL_PREFIX):
        return KL
    if column.startswith(HIDDEN_PREFIX):
        return SHARE
    is_logit = column == LABEL_LOGIT or column.startswith((TAIL_PREFIX, logsumexp_name(1.0)[:-1]))
    return NATS if is_logit or topk_size(column) else None


@dataclass(frozen=True)
class Difference:
    """One column beside the teacher, at the P positions that are stored.

    Attributes:
        error: In the column's measure, [P] or [P, K].
        noise: The same measure between two live runs.
        excess_P: How far a position's worst element is beyond what is allowed; at most 0 where all are within.
        kept_N: Which positions these are.
    """

    error: Tensor
    noise: Tensor
    excess_P: Tensor
    kept_N: Tensor


@dataclass(frozen=True)
class Comparison:
    """What stored columns are compared by, all on the teacher's device.

    Attributes:
        head: The teacher's output head.
        stored_head: The one that the store keeps, by which training rebuilds logits.
        codes: The transform code of each coded column, by its name.
        corrections: What is added to the rebuilt logits of each coded final state, by its name.
        dtype: Of the teacher's forward.
    """

    head: OutputHead
    stored_head: OutputHead
    codes: Mapping[str, TransformCode]
    corrections: Mapping[str, Tensor]
    dtype: torch.dtype

    def compare(self, column: str, stored: Sequence[Arrays], live: Live) -> Difference:
        """Compare a column of some rows, its arrays for each row, with the live values of the same rows."""
        if form := state_form(column):
            return self._states(column, form, stored, live)
        arrays = {name: torch.cat([row[name] for row in stored]) for name in stored[0]}
        if topk_size(column) or column.startswith(TAIL_PREFIX):
            return self._tokens(column, arrays, live)
        kept_N = torch.ones_like(arrays["values"], dtype=torch.bool)
        if column == LABEL_LOGIT:
            ends = torch.tensor([len(row["values"]) for row in stored]).cumsum(0)
            kept_N[ends.to(kept_N.device) - 1] = False  # no token follows
        stored_P, alone_P, together_P = (values[kept_N] for values in (arrays["values"], *live))
        return self._logits(stored_P - alone_P, together_P - alone_P, alone_P, kept_N=kept_N, stated=0.0)

    def _states(self, column: str, form: StateForm, stored: Sequence[Arrays], live: Live) -> Difference:
        code = self.codes.get(column)
        decoded_ND = torch.cat([decode_state(arrays, form=form, code=code) for arrays in stored])
        kept_N = torch.ones(len(decoded_ND), dtype=torch.bool, device=decoded_ND.device)
        if form.fraction < 1.0:
            kept_N = torch.cat([arrays[STORED] for arrays in stored]).bool()
        decoded_PD, alone_PD, together_PD = (values[kept_N].float() for values in (decoded_ND, *live))
        apart_PD, noise_PD = decoded_PD - alone_PD, together_PD - alone_PD
        if code is None:
            stated_PD = _stated(form, stored, live[0].float())[kept_N]
            scale_PD = alone_PD.abs().amax(dim=-1, keepdim=True)
        else:
            # A coded state is held to half a step in each coefficient.
            apart_PD, noise_PD = apart_PD @ code.analysis_DD, noise_PD @ code.analysis_DD
            stated_PD = torch.full_like(apart_PD, _half_step(form))
            scale_PD = (alone_PD.square() + code.centre_D.square()) @ code.analysis_DD.square()
            scale_PD = scale_PD.sqrt()
        # Each position by its own noise: an attention sink has hundreds of times that of the others.
        noise_P1 = noise_PD.abs().amax(dim=-1, keepdim=True)
        noise_P1 = torch.maximum(noise_P1, noise_P1.median()) if len(noise_P1) else noise_P1
        excess_P = self._excess(apart_PD, noise_P1, stated_PD, scale_PD).amax(dim=-1)
        if column.startswith(FINAL_PREFIX):
            rebuilt = FullDistribution(decoded_PD, self.stored_head, 1.0, self.corrections.get(column))
            error_P, noise_P = _divergences(self.head, live[0][kept_N], live[1][kept_N], rebuilt)
        else:
            error_P, noise_P = _share(decoded_PD, alone_PD), _share(together_PD, alone_PD)
        return Difference(error_P, noise_P, excess_P, kept_N)

    def _tokens(self, column: str, arrays: Arrays, live: Live) -> Difference:
        """Compare stored logits with the live ones of the same tokens, and of the same rank where they are ranked."""
        k = topk_size(column)
        logits_NK, ids_NK = decode_topk(arrays, k=k) if k else decode_tail(arrays)[:2]
        alone_NK, ranked_NK = _logits_of(self.head, live[0], ids_NK, k=k)
        together_NK, _ = _logits_of(self.head, live[1], ids_NK)
        apart_NK = (logits_NK - alone_NK).abs()
        if k:
            apart_NK = torch.maximum(apart_NK, (logits_NK - ranked_NK).abs())
        kept_N = torch.ones(len(ids_NK), dtype=torch.bool, device=ids_NK.device)
        stated = 0.0 if "values" in arrays else LOGIT_STEP / 2
        return self._logits(apart_NK, together_NK - alone_NK, alone_NK, kept_N=kept_N, stated=stated)

    def _logits(self, apart: Tensor, noise: Tensor, alone: Tensor, *, kept_N: Tensor, stated: float) -> Difference:
        """Hold logits to the largest noise of all: that of a single number may be zero by chance."""
        if not len(apart):
            return Difference(apart, noise, apart, kept_N)
        excess = self._excess(apart, noise.abs().max(), torch.full_like(apart, stated), alone.abs().max())
        return Difference(apart.abs(), noise.abs(), excess.reshape(len(apart), -1).amax(dim=-1), kept_N)

    def _excess(self, apart: Tensor, noise: Tensor, stated: Tensor, scale: Tensor) -> Tensor:
        rounding = torch.finfo(self.dtype).eps + _FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps
        return apart.abs() - stated - _NOISE_MARGIN * noise.abs() - rounding * scale


def _stated(form: StateForm, stored: Sequence[Arrays], live_ND: Tensor) -> Tensor:
    """Give the error that a form states for each element, [N, D]."""
    if form.encoding == "int8":
        return torch.cat([0.5 * arrays["scale"].unsqueeze(1) * arrays["spread"] for arrays in stored])
    relative, absolute = _FLOAT_BOUNDS[form.encoding]
    return relative * live_ND.abs() + absolute


def _half_step(form: StateForm) -> float:
    assert form.step is not None
    return 0.5 * form.step


def _share(got_PD: Tensor, live_PD: Tensor) -> Tensor:
    """Give the squared error as a share of the live variance over channels, [P]."""
    variance_P = live_PD.var(dim=-1, correction=0).clamp(min=_SMALLEST_VARIANCE)
    return (got_PD - live_PD).square().mean(dim=-1) / variance_P


def _logits_of(head: OutputHead, state_ND: Tensor, ids_NK: Tensor, *, k: int = 0) -> tuple[Tensor, Tensor]:
    """Give the logits of some tokens of each position, and the k largest, descending."""
    chosen, ranked = [], []
    for chunk in head.chunks(len(state_ND)):
        logits_CV = head(state_ND[chunk])
        chosen.append(logits_CV.gather(-1, ids_NK[chunk]))
        ranked.append(logits_CV.topk(k, dim=-1).values)
    return torch.cat(chosen), torch.cat(ranked)


def _divergences(
    head: OutputHead, alone_PD: Tensor, together_PD: Tensor, rebuilt: FullDistribution
) -> tuple[Tensor, Tensor]:
    """Give KL(live || rebuilt) and KL(live || live again) in nats at temperature 1, [P] each."""
    error_P, noise_P = torch.zeros(2, len(alone_PD), device=alone_PD.device)
    for chunk in head.chunks(len(alone_PD)):
        live_CV = head(alone_PD[chunk]).log_softmax(dim=-1)
        error_P[chunk] = _kl(live_CV, rebuilt.logprobs(chunk))
        noise_P[chunk] = _kl(live_CV, head(together_PD[chunk]).log_softmax(dim=-1))
    return error_P, noise_P


def _kl(live_CV: Tensor, other_CV: Tensor) -> Tensor:
    return (live_CV.exp() * (live_CV - other_CV)).sum(dim=-1).clamp(min=0.0)
