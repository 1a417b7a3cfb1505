"""The column that every shard begins with: its token ids. It is committed with the shard, before any target."""

from dataclasses import dataclass

from coldstill.cache.columns import Column
from coldstill.cache.tokens import TOKENS, token_column
from coldstill.pipeline.models.sizes import ModelSizes
from coldstill.pipeline.targets.target import Target
from coldstill.pipeline.targets.transform_coding import TransformCode


@dataclass(frozen=True)
class Tokens(Target):
    """The token ids and the lengths of the rows: nothing of the teacher's."""

    @property
    def name(self) -> str:
        """The column's name."""
        return TOKENS

    @classmethod
    def parse(cls, name: str) -> "Tokens | None":
        """Read the column's name."""
        return cls() if name == TOKENS else None

    @property
    def written_share(self) -> float:
        """As measured: docs/plan.md."""
        return 0.24

    def describe(self, sizes: ModelSizes, code: TransformCode | None = None) -> Column:  # noqa: ARG002
        """Describe the column for a teacher's vocabulary."""
        return token_column(vocab_size=sizes.vocab_size)
