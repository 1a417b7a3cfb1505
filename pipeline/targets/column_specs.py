"""The columns that stage one writes, described by their names."""

from collections.abc import Mapping

from coldstill.cache.columns import ArraySpec, Column
from coldstill.cache.tokens import TOKENS, token_column
from coldstill.pipeline.targets.calibrations import code_digest
from coldstill.pipeline.targets.columns import TAIL_PREFIX, Tail, state_form, topk_size
from coldstill.pipeline.targets.encodings import CALIBRATION, state_column
from coldstill.pipeline.targets.token_encodings import tail_column, topk_column
from coldstill.pipeline.targets.transform_coding import TransformCode


def describe_column(name: str, *, width: int, vocab_size: int, codes: Mapping[str, TransformCode]) -> Column:
    """Describe the column of a target by its name.

    Args:
        name: The column's name.
        width: Of the teacher's residual stream.
        vocab_size: Of the teacher.
        codes: The transform code of each coded column, by its name.
    """
    if name == TOKENS:
        return token_column(vocab_size=vocab_size)
    if form := state_form(name):
        code = codes.get(name)
        column = state_column(name, form=form, width=width, code=code)
        if code is None:
            return column
        return Column(name, column.arrays, {**column.attributes, CALIBRATION: code_digest(code)})
    if k := topk_size(name):
        return topk_column(name, k=k, values=name.rsplit("/", 1)[-1], vocab_size=vocab_size)
    if name.startswith(TAIL_PREFIX):
        return tail_column(name, num_draws=Tail.parse(name).num_draws, vocab_size=vocab_size)
    return Column(name, {"values": ArraySpec("float32")})
