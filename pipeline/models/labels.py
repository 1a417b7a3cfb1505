"""What a batch's labels mean: what they mean to transformers, the ids themselves, not shifted.

Position t predicts token t + 1, and the shift is written here, and nowhere else.
Shapes: B rows, T positions.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from coldstill.pipeline.runtime.errors import DataError
from torch import Tensor

# The label of a token that nothing is to be learned from.
IGNORED = -100


def next_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Give the token that follows each position, [B, T] in int64; `IGNORED` at the last, and where it does not count.

    Raises:
        DataError: The labels are not one for each token id.
    """
    return F.pad(labels_of(batch)[:, 1:], (0, 1), value=IGNORED)


def counts_of(batch: Mapping[str, Any]) -> Tensor:
    """Say at which positions the token that follows counts in the loss, [B, T]."""
    return next_tokens(batch) != IGNORED


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """Give a batch's labels [B, T], with `IGNORED` at the first position, which no other one predicts.

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
