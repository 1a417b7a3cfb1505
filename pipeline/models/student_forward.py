"""A student's forward pass as training needs it: mapped block outputs, and what its logits are made of.

Shapes: B rows, T positions, D width, V vocabulary.
"""

import warnings
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from coldstill.pipeline.models import find_structure, head_problem, rope_switches, text_config
from coldstill.pipeline.models.forward import model_inputs, run_body
from coldstill.pipeline.models.output_head import Head, OutputHead, PlainLogits


class StudentForward:
    """Runs a student so that its logits need never exist at once, where its output head allows that.

    A student whose head does something unknown gives its plain logits [B, T, V], with one warning.

    Args:
        student: Any causal language model, with or without adapters. What wraps its blocks afterwards is found anew in
            each call.
    """

    def __init__(self, student: PreTrainedModel) -> None:
        self._student = student
        self._structure = find_structure(student)
        self._switches = rope_switches(student.config)
        problem = head_problem(student, self._structure)
        self._has_known_head = problem is None
        if problem is not None:
            warnings.warn(f"{problem}: the student's logits are computed whole, which takes more memory", stacklevel=2)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        blocks: Sequence[int],
        position_ids: Tensor | None = None,
    ) -> tuple[dict[int, Tensor], Tensor, Head]:
        """Run the student.

        Args:
            input_ids: Token ids [B, T].
            attention_mask: 1 at real positions [B, T]; None where nothing is padded.
            blocks: Whose outputs to give.
            position_ids: Of each token [B, T]; the model's own where it is None.

        Returns:
            These outputs [B, T, D], by block; the post-norm last state [B, T, D] and the head that makes logits of it,
            or the logits [B, T, V] and the head that takes them as they are.
        """
        of_student = cast("nn.ModuleList", self._student.get_submodule(self._structure.blocks_name))
        inputs = model_inputs(input_ids, attention_mask, position_ids)
        if not self._has_known_head:
            outputs, logits_BTV = run_body(
                self._student, of_student, inputs, blocks, switches=self._switches, take=lambda output: output.logits
            )
            return outputs, logits_BTV, PlainLogits(logits_BTV.shape[-1], logits_BTV.device)
        body = self._student.get_submodule(self._structure.body_name)
        outputs, state_BTD = run_body(body, of_student, inputs, blocks, switches=self._switches)
        head = OutputHead.of_model(self._student.get_output_embeddings(), text_config(self._student.config))
        return outputs, state_BTD, head
