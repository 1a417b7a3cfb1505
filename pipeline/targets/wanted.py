"""Which targets a recipe wants of the teacher. Both stages ask here, so that one reads what the other wrote."""

from collections.abc import Sequence
from dataclasses import dataclass

from coldstill.cache.manifest import Manifest
from coldstill.pipeline.recipe.sections import HiddenTargetConfig, TargetsConfig
from coldstill.pipeline.targets.encodings import CODED, StateForm
from coldstill.pipeline.targets.forms import FinalForm, LogitsForm
from coldstill.pipeline.targets.logits_kinds import logits_targets
from coldstill.pipeline.targets.states import BlockInput, BlockOutput, FinalState
from coldstill.pipeline.targets.stored_constants import StoredConstants
from coldstill.pipeline.targets.target import Target, TeacherTarget
from coldstill.pipeline.targets.token_logits import LabelLogit, Normaliser
from coldstill.pipeline.targets.tokens import Tokens

# What evaluation reads of the eval rows, whatever the recipe trains on. The last state in half precision makes KL and
# agreement exact; the logit of the token that follows and the normaliser, at temperature 1 as every cross entropy is,
# are the teacher's own loss. Train rows have none of them: the output head need not run over these.
EVAL_STATE = FinalState(StateForm("float16"))
EVAL_NORMALISER = Normaliser(1.0)
EVAL_LABEL = LabelLogit()


def eval_form(constants: StoredConstants) -> LogitsForm:
    """Say how the distribution over eval rows is read."""
    return FinalForm(EVAL_STATE.form, constants.head())


@dataclass(frozen=True)
class WantedTargets:
    """The targets of one split that a recipe asks for.

    Attributes:
        distribution: What its kind of logits target keeps.
        hidden: The output of each mapped teacher block.
        inputs: The inputs of the blocks that the recipe names for it.
        judging: What evaluation reads; empty but for eval rows.
    """

    distribution: Sequence[TeacherTarget]
    hidden: dict[int, BlockOutput]
    inputs: Sequence[BlockInput]
    judging: Sequence[TeacherTarget]

    def all(self) -> list[Target]:
        """Return every target once, in the order in which they are written."""
        return list(dict.fromkeys([Tokens(), *self.distribution, *self.hidden.values(), *self.inputs, *self.judging]))

    def names(self) -> list[str]:
        """Name every column, in that order."""
        return [target.name for target in self.all()]


def wanted_targets(
    targets: TargetsConfig, *, blocks: Sequence[int], split: str, manifest: Manifest, shards: Sequence[str]
) -> WantedTargets:
    """Say which targets a recipe wants of the rows of one split.

    Args:
        targets: Its section.
        blocks: The teacher blocks that are mapped.
        split: `train` or `eval`.
        manifest: Of the store: a column that it has may serve in place of one that it lacks.
        shards: Where the rows lie.
    """
    return WantedTargets(
        distribution=logits_targets(targets.logits).stored(manifest, shards),
        hidden={block: block_output(targets.hidden, block) for block in sorted(set(blocks))},
        inputs=[BlockInput(block_output(targets.hidden, block).form, block) for block in targets.hidden.inputs],
        judging=[EVAL_LABEL, EVAL_NORMALISER, EVAL_STATE] if split == "eval" else [],
    )


def block_output(hidden: HiddenTargetConfig, block: int) -> BlockOutput:
    """Return the target of a block's output in the form in which a recipe keeps them."""
    step = hidden.step if hidden.encoding == CODED else None
    return BlockOutput(StateForm(hidden.encoding, step, hidden.token_fraction), block)
