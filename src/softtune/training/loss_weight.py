"""How much each batch of an update counts.

A batch's loss is the mean over its labels. An update that accumulates several batches weighs them by their numbers of
labels, so that they have together the loss and gradients of one batch with all their rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from softtune.data.encoding import IGNORED

Batch = Mapping[str, Tensor]


def loss_divisors(batches: Sequence[Batch], *, shifts_labels: bool) -> list[Tensor]:
    """What to divide each batch's mean loss by, so that their sum is the mean over the labels of the whole update.

    Args:
        batches: those of one update.
        shifts_labels: whether the loss compares each label with the logits of the token before, so that the first
            column of labels does not count.
    """
    if not batches:
        return []
    counts = torch.stack([num_labels(batch, shifts_labels=shifts_labels) for batch in batches])
    return [*(counts.sum() / counts)]


def num_labels(batch: Batch, *, shifts_labels: bool) -> Tensor:
    """The number of labels that a batch's loss is the mean over; of spans, which have no ``labels``, its rows."""
    labels = batch.get("labels")
    if labels is None:
        return torch.tensor(len(next(iter(batch.values()))))
    return (labels[:, 1:] if shifts_labels else labels).ne(IGNORED).sum()
