"""A transformers Trainer whose eval rows may be of several sources: each is judged by itself, then all together."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from coldstill.pipeline.recipe.training_keys import OTHERS_METRIC
from coldstill.pipeline.stage_two.fed_trainer import FedTrainer

_DIVERGENCE = "loss_logits"


class DomainsTrainer(FedTrainer):
    """A Trainer that gives, of a dict of eval sets, the losses over all of their rows too.

    Transformers gives those of each set, as `eval_<label>_loss`; so there is `eval_loss` in any case, and what goes by
    it need not ask how many sets there are.

    Attributes:
        others: Labels of the sets whose mean divergence is given too, as `OTHERS_METRIC` calls it; none mostly.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.others: Sequence[str] = ()
        self._num_rows: dict[str, int] = {}
        super().__init__(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Note how many rows there were."""
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        self._num_rows[metric_key_prefix] = int(output.num_samples or 0)
        return output

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate; of several eval sets, log and return the losses over all of their rows behind those of each."""
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        judged = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(judged, dict):
            overall = self._over_all([str(label) for label in judged], metrics, metric_key_prefix)
            self.log(overall)
            metrics |= overall
        return metrics

    def _over_all(self, labels: Sequence[str], metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
        counts = {label: self._num_rows[f"{prefix}_{label}"] for label in labels}
        of_first = f"{prefix}_{labels[0]}_loss"
        names = [name.removeprefix(of_first) for name in metrics if name.startswith(of_first)]
        overall = {
            f"{prefix}_loss{name}": sum(
                count * metrics[f"{prefix}_{label}_loss{name}"] for label, count in counts.items()
            )
            / sum(counts.values())
            for name in names
        }
        if self.others:
            divergences = [metrics[f"{prefix}_{label}_{_DIVERGENCE}"] for label in self.others]
            overall[OTHERS_METRIC] = sum(divergences) / len(divergences)
        return overall
