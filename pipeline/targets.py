"""Which columns a recipe needs of the teacher, and what each is called.

Both stages ask here, so that what stage one writes under a name is what stage two reads under it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cache.manifest import Manifest
from cache.tokens import TOKENS
from pipeline.config import LogitsTargetConfig, TargetsConfig

LABEL_LOGIT = "label_logit"
FINAL_STATE = "logits/final"
HIDDEN_PREFIX = "hidden/"
OUTPUT_HEAD = "output_head"
# The teacher's own loss is a cross entropy at temperature 1, whatever temperatures the recipe trains at.
LOSS_TEMPERATURE = 1.0


@dataclass(frozen=True)
class TargetColumns:
    """The columns of one split that a recipe asks for.

    Attributes:
        topk: The name of the column of largest logits, or None.
        k: How many of its tokens the recipe reads; the column may hold more.
        temperatures: Where the normaliser is kept.
        hidden: The column of each mapped teacher block.
        final_state: Whether the post-norm last state is kept, as it is for eval rows.
    """

    topk: str | None
    k: int
    temperatures: tuple[float, ...]
    hidden: dict[int, str]
    final_state: bool

    def names(self) -> list[str]:
        """Name every column, in the order in which it is written."""
        return [
            TOKENS,
            LABEL_LOGIT,
            *([self.topk] if self.topk else []),
            *(logsumexp_name(temperature) for temperature in self.temperatures),
            *self.hidden.values(),
            *([FINAL_STATE] if self.final_state else []),
        ]


def logsumexp_name(temperature: float) -> str:
    """Name the column of the teacher's logsumexp of logits / temperature."""
    return f"logsumexp/{temperature:g}"


def hidden_name(block: int, encoding: str) -> str:
    """Name the column of a decoder block's output."""
    return f"{HIDDEN_PREFIX}{block}/{encoding}"


def topk_name(k: int, values: str) -> str:
    """Name the column of the k largest logits."""
    return f"logits/topk/{k}/{values}"


def topk_size(name: str) -> int:
    """Give the k of a column of largest logits by its name; 0 for any other column."""
    parts = name.split("/")
    return int(parts[2]) if parts[:2] == ["logits", "topk"] else 0


def columns_of(
    targets: TargetsConfig, *, blocks: Sequence[int], split: str, manifest: Manifest, shards: Sequence[str]
) -> TargetColumns:
    """Say which columns a recipe's targets are, for the rows of one split.

    A stored column with more tokens than the recipe asks for serves it: of those that would do, the one that the fewest
    shards still lack is taken.
    """
    is_eval = split == "eval"
    wanted = {*targets.logits.temperatures} if targets.logits.kind == "topk" else set()
    encoding = targets.hidden.encoding
    return TargetColumns(
        topk=_serving_topk(targets.logits, manifest, shards) if targets.logits.kind == "topk" else None,
        k=targets.logits.k,
        temperatures=tuple(sorted(wanted | ({LOSS_TEMPERATURE} if is_eval else set()))),
        hidden={block: hidden_name(block, encoding) for block in sorted(set(blocks))},
        final_state=is_eval,
    )


def _serving_topk(logits: LogitsTargetConfig, manifest: Manifest, shards: Sequence[str]) -> str:
    candidates = {topk_name(logits.k, logits.values): logits.k}
    for name in manifest.columns():
        k = topk_size(name)
        if k >= logits.k and name == topk_name(k, logits.values):
            candidates[name] = k
    wanted = set(shards)
    num_lacking = {name: len(wanted.difference(manifest.shards(name))) for name in candidates}
    return min(candidates, key=lambda name: (num_lacking[name], candidates[name]))
