"""What a batch's labels mean: what they mean to transformers, the ids themselves, not shifted.

Position t predicts token t + 1, and the shift is written here, and nowhere else.
Shapes: B rows, T positions.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from coldstill.pipeline.runtime.errors import DataError

# The label of a token that nothing is to be learned from.
IGNORED = -100


def next_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Return the token that follows each position, [B, T] in int64; `IGNORED` at the last, and where it does not count.

    Raises:
        DataError: The labels are not one for each token id.
    """
    return F.pad(labels_of(batch)[:, 1:], (0, 1), value=IGNORED)


def counts_of(batch: Mapping[str, Any]) -> Tensor:
    """Say at which positions the token that follows counts in the loss, [B, T]; one that weighs 0 does not."""
    weights_BT = weights_of(batch)
    return next_tokens(batch) != IGNORED if weights_BT is None else weights_BT > 0


def weights_of(batch: Mapping[str, Any]) -> Tensor | None:
    """Return what each position, by the token that follows it, weighs in the loss; 0 where nothing counts.

    A batch may hold `weights` [B, T], one for each token and not shifted, as labels are. Without them every token that
    counts weighs 1, and there is nothing to return.

    Returns:
        Shifted as `next_tokens` is, [B, T] in float32; None where the batch has no weights.

    Raises:
        DataError: The weights, or the labels, are not one for each token id.
    """
    weights_BT = batch.get("weights")
    if weights_BT is None:
        return None
    if weights_BT.shape != batch["input_ids"].shape:
        raise DataError(
            f"a batch has weights of shape {list(weights_BT.shape)} for input_ids of shape "
            f"{list(batch['input_ids'].shape)}; expected one weight for each token: what it counts as something to be "
            "predicted"
        )
    shifted_BT = F.pad(weights_BT[:, 1:].float(), (0, 1))
    return shifted_BT.masked_fill(next_tokens(batch) == IGNORED, 0.0)


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """Return a batch's labels [B, T], with `IGNORED` at the first position, which no other one predicts.

    Where the batch has none, they are its token ids, but for padding and for what would be predicted from padding.

    Raises:
        DataError: The labels are not one for each token id.
    """
    ids_BT, labels_BT, mask_BT = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
    if labels_BT is None:
        labels_BT = ids_BT
        if mask_BT is not None:
            padded_BT = mask_BT == 0
            labels_BT = labels_BT.masked_fill(padded_BT | F.pad(padded_BT[:, :-1], (1, 0)), IGNORED)
    elif labels_BT.shape != ids_BT.shape:
        raise DataError(
            f"a batch has labels of shape {list(labels_BT.shape)} for input_ids of shape {list(ids_BT.shape)}; "
            "expected one label for each token: the ids themselves, -100 where they do not count"
        )
    labels_BT = labels_BT.clone()
    labels_BT[:, 0] = IGNORED
    return labels_BT
