"""A trainer that knows what each term's share of the gradient is, and keeps the shares as the weights have them.

Norms are measured at a few steps that the step's number alone names, over an eighth of the step's rows. What follows
from them is the same on every process, and goes on behind a checkpoint as it would have without.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from coldstill.pipeline.losses.gradient_balance import balance_factors, gradient_shares, smoothed
from coldstill.pipeline.recipe.loss import SHARES
from coldstill.pipeline.runtime.errors import RecipeError
from coldstill.pipeline.stage_two.distiller import Distiller
from coldstill.pipeline.stage_two.resumable_trainer import ResumableTrainer
from coldstill.pipeline.stage_two.term_norms import first_rows, term_norms, why_no_norms

_EVERY = 64
# Fresh projectors and fresh students change fast.
_EARLY = (4, 16)
# Of the rows of a step, the part that is measured on.
_PART = 8


class BalancedTrainer(ResumableTrainer):
    """A Trainer of a distiller that measures the gradients of its terms now and then.

    Takes what `transformers.Trainer` takes.

    Raises:
        RecipeError: The loss is to be balanced, and gradients cannot be told apart here.
    """

    def __init__(self, distiller: Distiller, *args: Any, **kwargs: Any) -> None:
        self._distiller = distiller
        self._norms: dict[str, float] = {}
        self._shares: dict[str, float] = {}
        self._measured_step = -1
        super().__init__(distiller, *args, **kwargs)
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        why_not = why_no_norms(self.args, is_sharded=is_sharded)
        if why_not and self._is_balanced:
            raise RecipeError(f"loss.balance gradient cannot measure the terms: {why_not}; use none")
        self._is_measured = why_not is None and len(distiller.objective.terms) > 1

    @property
    def _is_balanced(self) -> bool:
        return self._distiller.objective.is_balanced

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | float | None = None
    ) -> Tensor:
        """Measure the terms' gradients first, where it is time, at the first batch of a step."""
        step = self.state.global_step
        if self._is_measured and step != self._measured_step and self._is_due(step):
            self._measured_step = step
            model.train()
            self._measure(self._prepare_inputs(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each term's share of the gradient, where it was measured since the last log."""
        if "loss" in logs:
            logs |= {SHARES[name]: share for name, share in self._shares.items()}
            self._shares = {}
        super().log(logs, start_time)

    def sums(self) -> dict[str, Any]:
        """Return what was measured too."""
        return {**super().sums(), "norms": self._norms, "shares": self._shares}

    def take_up(self, sums: dict[str, Any]) -> None:
        """Go on with what was measured too."""
        super().take_up(sums)
        self._norms, self._shares = sums.get("norms", {}), sums.get("shares", {})
        self._balance()

    def with_all_it_takes(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch as the distiller takes it."""
        return batch

    def _is_due(self, step: int) -> bool:
        return step % _EVERY == 0 or (self._is_balanced and step in _EARLY)

    def _measure(self, batch: Mapping[str, Any]) -> None:
        rows_of_step = len(batch["input_ids"]) * self.current_gradient_accumulation_steps
        few = self.with_all_it_takes(first_rows(batch, max(rows_of_step // _PART, 1)))
        with self.compute_loss_context_manager():
            norms_K = term_norms(self._distiller, few)
        # Of all processes, and on each of them the same: every one gathers them in one order.
        norms_K = self.accelerator.gather(norms_K.unsqueeze(0)).square().mean(dim=0).sqrt()
        names = [term.name for term in self._distiller.objective.terms]
        norms = dict(zip(names, norms_K.tolist(), strict=True))
        self._norms = smoothed(self._norms, norms)
        self._balance()
        self._distiller.set_step(self.state.global_step, self.state.max_steps)
        weights: dict[str, float] = {term.name: term.weight for term in self._distiller.now.terms}
        self._shares = gradient_shares(norms, weights)

    def _balance(self) -> None:
        objective = self._distiller.objective
        if objective.is_balanced:
            self._distiller.factors = balance_factors(self._norms, objective.anchor.name)
