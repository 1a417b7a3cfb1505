"""A teacher beside the student, as a source of targets: it runs over each batch, and gives what a store would hold.

The reference that training from a store is held against, and a way for those who have the memory and train once. Loads
nothing, and knows no store. The teacher's logits never exist at once: its last states and its head stand for them.
Shapes: B rows, T positions, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from coldstill.pipeline.models import all_finite, find_structure, head_problem, rope_switches, text_config
from coldstill.pipeline.models.forward import model_inputs, run_body, what_to_try
from coldstill.pipeline.models.output_head import OutputHead
from coldstill.pipeline.runtime.errors import ModelError, NonFiniteError
from coldstill.pipeline.stage_two.distiller import Distiller, TargetForms
from coldstill.pipeline.targets.encodings import StateForm
from coldstill.pipeline.targets.forms import FINAL, LABEL, NORMALISER, FinalForm, HiddenForm

_EXACT = StateForm("float32")


class LiveTargets:
    """Gives the targets of each batch from a teacher in memory, in its own dtype, without gradients.

    Args:
        teacher: The teacher, where it is to run; it is put in evaluation mode, and not changed otherwise.
        blocks: The teacher blocks whose outputs are learned from.
        with_logits: Whether its distribution is learned from.
        with_numbers: Whether the logit of the token that follows and the normaliser at temperature 1 are given too,
            of which its own loss is made.

    Attributes:
        forms: How these targets are read.

    Raises:
        ModelError: Its logits are to be learned from, and are not its output head over its last state.
    """

    def __init__(
        self, teacher: PreTrainedModel, *, blocks: Sequence[int], with_logits: bool, with_numbers: bool = False
    ) -> None:
        structure = find_structure(teacher)
        teacher.eval()
        problem = head_problem(teacher, structure) if with_logits else None
        if problem is not None:
            raise ModelError(f"teacher_model: {problem}")
        self._body = teacher.get_submodule(structure.body_name)
        self._blocks = teacher.get_submodule(structure.blocks_name)
        self._wanted = tuple(blocks)
        self._switches = rope_switches(teacher.config)
        self._with_logits = with_logits
        self._with_numbers = with_numbers
        self._head = head = OutputHead.of_model(teacher.get_output_embeddings(), text_config(teacher.config))
        self.forms = TargetForms(
            logits=FinalForm(_EXACT, head) if with_logits else None,
            hidden=HiddenForm(_EXACT) if self._wanted else None,
            is_live=True,
        )

    @classmethod
    def beside(cls, distiller: Distiller, teacher: PreTrainedModel, device: torch.device) -> "LiveTargets":
        """Bring a teacher to a device, unless a device map spread it already, and let a distiller read its targets."""
        if getattr(teacher, "hf_device_map", None) is None:
            teacher.to(device)
        objective = distiller.objective
        blocks = list(distiller.layer_map.values()) if objective.needs("hidden") else []
        targets = cls(teacher, blocks=blocks, with_logits=objective.needs("logits"))
        distiller.forms = targets.forms
        return targets

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Run the teacher over a batch, and return its targets by the distiller's names, on the batch's device.

        Args:
            batch: `input_ids` [B, T], and `attention_mask` and `position_ids` where it has them.

        Raises:
            NonFiniteError: The teacher gives a NaN or an infinity at a real position.
        """
        home = batch["input_ids"].device
        device = next(self._body.parameters()).device
        mask_BT, positions_BT = (
            None if batch.get(name) is None else batch[name].to(device) for name in ("attention_mask", "position_ids")
        )
        assert isinstance(self._blocks, nn.ModuleList)
        # As stage one runs it: whatever autocast does to the student ends here.
        with torch.autocast(device.type, enabled=False):
            inputs = model_inputs(batch["input_ids"].to(device), mask_BT, positions_BT)
            outputs, state_BTD = run_body(self._body, self._blocks, inputs, self._wanted, switches=self._switches)
        states = {f"block {block}": outputs[block].to(home) for block in self._wanted}
        if self._with_logits:
            states["final norm"] = state_BTD.to(home)
        _check_finite(states, batch.get("attention_mask"))
        targets: dict[str, Any] = {}
        if self._with_logits:
            targets["logits"] = {FINAL: {"values": states["final norm"]}}
        if self._with_numbers:
            targets["logits"] |= self._numbers(batch["input_ids"], states["final norm"])
        if self._wanted:
            targets["hidden"] = {str(block): {"values": states[f"block {block}"]} for block in self._wanted}
        return targets

    def _numbers(self, ids_BT: Tensor, state_BTD: Tensor) -> dict[str, dict[str, Tensor]]:
        """Return the logit of the token that follows, 0 at the end, and the logsumexp of all, [B, T] in float32."""
        head = self._head.to(state_BTD.device)
        following_N = F.pad(ids_BT[:, 1:], (0, 1)).flatten()
        state_ND = state_BTD.flatten(0, 1)
        labels, normalisers = [], []
        for chunk in head.chunks(len(state_ND)):
            logits_CV = head(state_ND[chunk])
            labels.append(logits_CV.gather(-1, following_N[chunk].unsqueeze(-1)).squeeze(-1))
            normalisers.append(logits_CV.logsumexp(dim=-1))
        named = {LABEL: labels, NORMALISER: normalisers}
        return {role: {"values": torch.cat(values).view(ids_BT.shape)} for role, values in named.items()}


def _check_finite(states: Mapping[str, Tensor], mask_BT: Tensor | None) -> None:
    if all_finite(states.values()):
        return
    for name, values_BTD in states.items():
        broken_BT = ~values_BTD.isfinite().all(dim=-1)
        if mask_BT is not None:
            broken_BT &= mask_BT.bool()
        if bool(broken_BT.any()):
            row, position = broken_BT.nonzero()[0].tolist()
            raise NonFiniteError(
                f"teacher gave a non-finite value: row {row} of a batch, {name}, position {position}; "
                f"{what_to_try(values_BTD.dtype)}"
            )
