"""A recipe's kinds of logits target: what each keeps of the teacher's distribution, and how it is read.

One class for each value of `targets.logits.kind`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coldstill.cache.manifest import Manifest
from coldstill.pipeline.recipe.sections import LogitsKind, LogitsTargetConfig
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.targets.chosen_tokens import LargestLogits, TailDraws
from coldstill.pipeline.targets.encodings import CODED, StateForm
from coldstill.pipeline.targets.forms import (
    FINAL,
    NORMALISER,
    TAIL,
    TOPK,
    BucketedForm,
    FinalForm,
    LogitsForm,
    SampledForm,
)
from coldstill.pipeline.targets.kinds import stored_targets
from coldstill.pipeline.targets.states import FinalState
from coldstill.pipeline.targets.stored_constants import StoredConstants
from coldstill.pipeline.targets.target import TeacherTarget
from coldstill.pipeline.targets.token_logits import Normaliser

# The columns that a distribution is read from, by what a batch calls them.
Roles = dict[str, TeacherTarget]


@dataclass(frozen=True)
class LogitsTargets(ABC):
    """What a recipe keeps of the distribution.

    Attributes:
        section: The recipe's `targets.logits`.
    """

    section: LogitsTargetConfig

    @abstractmethod
    def stored(self, manifest: Manifest, shards: Sequence[str]) -> list[TeacherTarget]:
        """Return the targets that stage one stores, in the order in which they are written.

        A column of the store that serves the recipe is taken in place of its own, where some shards have it already.
        """

    @abstractmethod
    def read_at(self, temperature: float, manifest: Manifest, shards: Sequence[str]) -> Roles:
        """Return those that the distribution at a temperature is read from, by role."""

    @abstractmethod
    def form(self, roles: Roles, constants: StoredConstants) -> LogitsForm:
        """Say how they are read.

        Raises:
            StoreError: A calibration or the output head is missing, or another one.
        """

    def check(self, vocab_size: int) -> None:  # noqa: B027 - most kinds ask nothing of it
        """Refuse what a teacher with so many entries in its vocabulary does not have.

        Raises:
            RecipeError: It has fewer.
        """


class TopkTargets(LogitsTargets):
    """Kind `topk`: the k likeliest tokens, and one bucket for the rest, whose mass the normalisers give exactly."""

    def stored(self, manifest: Manifest, shards: Sequence[str]) -> list[TeacherTarget]:
        """Return the largest logits and the normalisers."""
        return [self._largest(manifest, shards), *self._normalisers()]

    def read_at(self, temperature: float, manifest: Manifest, shards: Sequence[str]) -> Roles:
        """Return the largest logits, and the normaliser at the temperature."""
        return {TOPK: self._largest(manifest, shards), NORMALISER: Normaliser(temperature)}

    def form(self, roles: Roles, constants: StoredConstants) -> LogitsForm:  # noqa: ARG002
        """Return the form with a bucket."""
        return BucketedForm(self.section.k, constants.vocab_size)

    def check(self, vocab_size: int) -> None:
        """Refuse more tokens than there are."""
        self._check(vocab_size, most=vocab_size)

    def _check(self, vocab_size: int, *, most: int) -> None:
        if self.section.k > most:
            tail = ": no tail is left to draw from" if self.section.k == vocab_size else ""
            raise RecipeError(
                f"targets.logits.k is {self.section.k}, but the teacher's vocabulary has {vocab_size} entries{tail}"
            )

    def _normalisers(self) -> list[Normaliser]:
        return [Normaliser(temperature) for temperature in sorted(set(self.section.temperatures))]

    def _largest(self, manifest: Manifest, shards: Sequence[str]) -> LargestLogits:
        """Choose the column of largest logits: one with more tokens serves as well; the fewest shards must lack it."""
        own = LargestLogits(self.section.k, self.section.values)
        serving = [
            target
            for target in stored_targets(manifest)
            if isinstance(target, LargestLogits) and target.k >= own.k and target.values == own.values
        ]
        wanted = set(shards)
        return min(
            [own, *serving],
            key=lambda target: (len(wanted.difference(manifest.shards(target.name))), target.k),
        )


class SampledTargets(TopkTargets):
    """Kind `topk_sampled`: the k likeliest tokens exactly, and draws from the tail with importance weights.

    Draws belong to exactly their number of likeliest tokens, so no column with more serves.
    """

    def stored(self, manifest: Manifest, shards: Sequence[str]) -> list[TeacherTarget]:
        """Return the largest logits, the normalisers and the draws."""
        return [*super().stored(manifest, shards), self._draws()]

    def read_at(self, temperature: float, manifest: Manifest, shards: Sequence[str]) -> Roles:
        """Return the largest logits, the draws, and the normaliser at the temperature."""
        return {
            TOPK: self._largest(manifest, shards),
            TAIL: self._draws(),
            NORMALISER: Normaliser(temperature),
        }

    def form(self, roles: Roles, constants: StoredConstants) -> LogitsForm:  # noqa: ARG002
        """Return the form with draws."""
        return SampledForm(self.section.k)

    def check(self, vocab_size: int) -> None:
        """Refuse a head that leaves no tail."""
        self._check(vocab_size, most=vocab_size - 1)

    def _largest(self, manifest: Manifest, shards: Sequence[str]) -> LargestLogits:  # noqa: ARG002
        return LargestLogits(self.section.k, self.section.values)

    def _draws(self) -> TailDraws:
        section = self.section
        return TailDraws(section.k, section.samples, tuple(sorted(section.temperatures)))


class FinalTargets(LogitsTargets):
    """Kind `final`: the post-norm last state, which with the output head gives every token at every temperature."""

    @property
    def state(self) -> FinalState:
        """The one target."""
        step = self.section.step if self.section.encoding == CODED else None
        return FinalState(StateForm(self.section.encoding, step))

    def stored(self, manifest: Manifest, shards: Sequence[str]) -> list[TeacherTarget]:  # noqa: ARG002
        """Return the last state."""
        return [self.state]

    def read_at(self, temperature: float, manifest: Manifest, shards: Sequence[str]) -> Roles:  # noqa: ARG002
        """Return the last state, whatever the temperature."""
        return {FINAL: self.state}

    def form(self, roles: Roles, constants: StoredConstants) -> LogitsForm:
        """Return the form with the store's output head, and the state's transform code where it is coded."""
        state = self.state
        code, head = constants.code(roles[FINAL]), constants.head()
        return FinalForm(state.form, head, code, state.correction(head, code))


class NoTargets(LogitsTargets):
    """Kind `none`."""

    def stored(self, manifest: Manifest, shards: Sequence[str]) -> list[TeacherTarget]:  # noqa: ARG002
        """Return nothing."""
        return []

    def read_at(self, temperature: float, manifest: Manifest, shards: Sequence[str]) -> Roles:  # noqa: ARG002
        """Return nothing: the recipe allows no loss that would read it."""
        return {}

    def form(self, roles: Roles, constants: StoredConstants) -> LogitsForm:
        """Never asked: nothing is read."""
        raise NotImplementedError("kind none keeps nothing of the distribution")


_CLASSES: Mapping[LogitsKind, type[LogitsTargets]] = {
    "topk": TopkTargets,
    "topk_sampled": SampledTargets,
    "final": FinalTargets,
    "none": NoTargets,
}


def logits_targets(section: LogitsTargetConfig) -> LogitsTargets:
    """Return what a recipe's `targets.logits` is made of."""
    return _CLASSES[section.kind](section)
