"""Which targets fit a number of bytes, the most faithful first. Pure arithmetic over measured options."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# From here on two logits targets count as equally faithful, and the bytes are better spent on hidden states.
FAITHFUL_COSINE = 0.999
_MOST_PROPOSALS = 5
# A fraction of the mapped blocks that is worth a proposal of its own.
_BLOCK_SHARES = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class LogitsOption:
    """A logits target.

    Attributes:
        setting: The overrides that choose it.
        bytes_per_token: On disk.
        grad_cosine: Of its gradient with the one of live distillation.
    """

    setting: str
    bytes_per_token: float
    grad_cosine: float


@dataclass(frozen=True)
class HiddenOption:
    """A form of hidden states.

    Attributes:
        setting: The overrides that choose it.
        bytes_per_block: Bytes a token of one block.
        relative_error: Squared error, as a share of the variance.
        num_blocks: Blocks that the recipe maps.
    """

    setting: str
    bytes_per_block: float
    relative_error: float
    num_blocks: int


@dataclass(frozen=True)
class Proposal:
    """Targets that fit.

    Attributes:
        overrides: What to change in the recipe, as on the command line.
        bytes_per_token: Of all columns.
        total_bytes: For all rows.
        grad_cosine: Of the logits target's gradient with live distillation's.
        num_blocks: Blocks whose hidden states are kept.
        hidden_error: Their squared error, as a share of their variance; None without blocks.
    """

    overrides: str
    bytes_per_token: float
    total_bytes: int
    grad_cosine: float
    num_blocks: int
    hidden_error: float | None


def proposals(
    budget_bytes: float,
    num_tokens: int,
    fixed_bytes_per_token: float,
    logits: Sequence[LogitsOption],
    hidden: Sequence[HiddenOption],
) -> list[Proposal]:
    """Return the best few combinations that fit; where none does, the smallest of all, which says how much is too much.

    Args:
        budget_bytes: For all columns of all rows.
        num_tokens: Tokens of all rows.
        fixed_bytes_per_token: Of columns that every run has.
        logits: What can be kept of the distribution.
        hidden: What can be kept of hidden states; empty where the recipe keeps none.
    """
    combined = [
        _proposal(fixed_bytes_per_token, num_tokens, of_logits, of_hidden, num_blocks)
        for of_logits in logits
        for of_hidden, num_blocks in _hidden_choices(hidden)
    ]
    fitting = [proposal for proposal in combined if proposal.total_bytes <= budget_bytes]
    if not fitting:
        return [min(combined, key=lambda proposal: proposal.total_bytes)]
    return sorted(fitting, key=_rank)[:_MOST_PROPOSALS]


def parse_bytes(text: str) -> int:
    """Read a size as people write it: 50GB, 1.5 TB, 800MB, in powers of 1000.

    Raises:
        ValueError: It is none.
    """
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number = text.strip().upper().rstrip("KMGTB ")
    unit = text.strip().upper().removeprefix(number).strip()
    try:
        value = float(number) * units[unit or "B"]
    except (ValueError, KeyError):
        raise ValueError(f"{text!r} is no size; expected one such as 50GB or 800MB") from None
    if value <= 0:
        raise ValueError(f"{text!r} is no size; expected more than nothing")
    return int(value)


def _hidden_choices(hidden: Sequence[HiddenOption]) -> Iterator[tuple[HiddenOption | None, int]]:
    for option in hidden:
        counts = {max(1, round(option.num_blocks * share)) for share in _BLOCK_SHARES}
        yield from ((option, count) for count in counts)
    yield None, 0


def _proposal(
    fixed: float, num_tokens: int, logits: LogitsOption, hidden: HiddenOption | None, num_blocks: int
) -> Proposal:
    per_token = fixed + logits.bytes_per_token + (hidden.bytes_per_block * num_blocks if hidden else 0.0)
    overrides = [logits.setting]
    if hidden is None:
        overrides.append("targets.hidden.blocks=none loss.gamma=0")
    else:
        overrides.append(hidden.setting)
        if num_blocks < hidden.num_blocks:
            overrides.append(f"mapping.num_pairs={num_blocks}")
    return Proposal(
        overrides=" ".join(overrides),
        bytes_per_token=per_token,
        total_bytes=round(per_token * num_tokens),
        grad_cosine=logits.grad_cosine,
        num_blocks=num_blocks,
        hidden_error=hidden.relative_error if hidden else None,
    )


def _rank(proposal: Proposal) -> tuple[float, ...]:
    error = 1.0 if proposal.hidden_error is None else proposal.hidden_error
    return (
        -min(proposal.grad_cosine, FAITHFUL_COSINE),
        -proposal.num_blocks,
        error,
        -proposal.grad_cosine,
        proposal.total_bytes,
    )
