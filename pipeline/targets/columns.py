"""Which columns a recipe needs of the teacher, and what each is called.

Both stages ask here, so that what stage one writes under a name is what stage two reads under it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from coldstill.cache.manifest import Manifest
from coldstill.cache.tokens import TOKENS
from coldstill.pipeline.recipe.sections import HiddenTargetConfig, LogitsTargetConfig, TargetsConfig
from coldstill.pipeline.targets.encodings import CODED, StateForm

LABEL_LOGIT = "label_logit"
FINAL_PREFIX = "logits/final/"
TAIL_PREFIX = "logits/tail/"
HIDDEN_PREFIX = "hidden/"
OUTPUT_HEAD = "output_head"
# Eval rows keep their final state in this form, whatever the recipe trains on: KL and agreement are exact then.
EVAL_FORM = StateForm("float16")
# The teacher's own loss is a cross entropy at temperature 1, whatever temperatures the recipe trains at.
LOSS_TEMPERATURE = 1.0


@dataclass(frozen=True)
class TargetColumns:
    """The columns of one split that a recipe asks for.

    Attributes:
        topk: The name of the column of largest logits, or None.
        k: How many of its tokens the recipe reads; the column may hold more.
        tail: The name of the column of draws from the tail, or None.
        final: The name of the column of the final state that the loss reads, or None.
        temperatures: Where the normaliser is kept.
        hidden: The column of each mapped teacher block.
        is_eval: Whether these are eval rows, which keep the final state for evaluation.
    """

    topk: str | None
    k: int
    tail: str | None
    final: str | None
    temperatures: tuple[float, ...]
    hidden: dict[int, str]
    is_eval: bool

    def names(self) -> list[str]:
        """Name every column, in the order in which it is written."""
        named = [
            TOKENS,
            LABEL_LOGIT,
            self.topk,
            *(logsumexp_name(temperature) for temperature in self.temperatures),
            self.tail,
            self.final,
            *self.hidden.values(),
            final_name(EVAL_FORM) if self.is_eval else None,
        ]
        return list(dict.fromkeys(name for name in named if name))


@dataclass(frozen=True)
class Tail:
    """What a column of draws from the tail holds, by its name.

    Attributes:
        k: The tail begins behind so many likeliest tokens.
        num_draws: Draws a position.
        temperatures: What the draws are fit for.
    """

    k: int
    num_draws: int
    temperatures: tuple[float, ...]

    def __str__(self) -> str:
        temperatures = "_".join(f"{temperature:g}" for temperature in self.temperatures)
        return f"{TAIL_PREFIX}{self.k}_{self.num_draws}/{temperatures}"

    @classmethod
    def parse(cls, name: str) -> "Tail":
        """Read the name of a column."""
        counts, temperatures = name.removeprefix(TAIL_PREFIX).split("/")
        k, num_draws = counts.split("_")
        return cls(int(k), int(num_draws), tuple(map(float, temperatures.split("_"))))


def logsumexp_name(temperature: float) -> str:
    """Name the column of the teacher's logsumexp of logits / temperature."""
    return f"logsumexp/{temperature:g}"


def hidden_name(block: int, form: StateForm) -> str:
    """Name the column of a decoder block's output."""
    return f"{HIDDEN_PREFIX}{block}/{form}"


def hidden_block(name: str) -> int | None:
    """Give the decoder block of a column by its name; None for any other column."""
    return int(name.split("/")[1]) if name.startswith(HIDDEN_PREFIX) else None


def final_name(form: StateForm) -> str:
    """Name the column of the post-norm last state."""
    return f"{FINAL_PREFIX}{form}"


def state_form(name: str) -> StateForm | None:
    """Give the form of a column of states by its name; None for any other column."""
    return StateForm.parse(name.rsplit("/", 1)[-1]) if name.startswith((FINAL_PREFIX, HIDDEN_PREFIX)) else None


def calibration_name(column: str) -> str | None:
    """Name the calibration that a column needs: that of its states, whatever the step. None where it needs none."""
    form = state_form(column)
    return f"calibration/{column.rsplit('/', 1)[0]}" if form is not None and form.encoding == CODED else None


def topk_name(k: int, values: str) -> str:
    """Name the column of the k largest logits."""
    return f"logits/topk/{k}/{values}"


def topk_size(name: str) -> int:
    """Give the k of a column of largest logits by its name; 0 for any other column."""
    parts = name.split("/")
    return int(parts[2]) if parts[:2] == ["logits", "topk"] else 0


def hidden_form(hidden: HiddenTargetConfig) -> StateForm:
    """Give the form in which a recipe keeps block outputs."""
    step = hidden.step if hidden.encoding == CODED else None
    return StateForm(hidden.encoding, step, hidden.token_fraction)


def final_form(logits: LogitsTargetConfig) -> StateForm:
    """Give the form in which a recipe's kind `final` keeps the final state."""
    return StateForm(logits.encoding, logits.step if logits.encoding == CODED else None)


def columns_of(
    targets: TargetsConfig, *, blocks: Sequence[int], split: str, manifest: Manifest, shards: Sequence[str]
) -> TargetColumns:
    """Say which columns a recipe's targets are, for the rows of one split.

    A stored column with more tokens than the recipe asks for serves it: of those that would do, the one that the fewest
    shards still lack is taken. Draws from the tail belong to a column of exactly their number of likeliest tokens.
    """
    is_eval, logits = split == "eval", targets.logits
    has_top = logits.kind in ("topk", "topk_sampled")
    temperatures = set(logits.temperatures) if has_top else set()
    form = hidden_form(targets.hidden)
    return TargetColumns(
        topk=_serving_topk(logits, manifest, shards) if has_top else None,
        k=logits.k,
        tail=str(tail_of(logits)) if logits.kind == "topk_sampled" else None,
        final=final_name(final_form(logits)) if logits.kind == "final" else None,
        temperatures=tuple(sorted(temperatures | ({LOSS_TEMPERATURE} if is_eval else set()))),
        hidden={block: hidden_name(block, form) for block in sorted(set(blocks))},
        is_eval=is_eval,
    )


def tail_of(logits: LogitsTargetConfig) -> Tail:
    """Say which draws a recipe's kind `topk_sampled` keeps."""
    return Tail(logits.k, logits.samples, tuple(sorted(logits.temperatures)))


def _serving_topk(logits: LogitsTargetConfig, manifest: Manifest, shards: Sequence[str]) -> str:
    candidates = {topk_name(logits.k, logits.values): logits.k}
    for name in manifest.columns() if logits.kind == "topk" else ():
        k = topk_size(name)
        if k >= logits.k and name == topk_name(k, logits.values):
            candidates[name] = k
    wanted = set(shards)
    num_lacking = {name: len(wanted.difference(manifest.shards(name))) for name in candidates}
    return min(candidates, key=lambda name: (num_lacking[name], candidates[name]))
