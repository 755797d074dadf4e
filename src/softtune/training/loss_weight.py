"""How much each batch of an update counts.

A batch's loss is the mean over its labels. An update that accumulates several batches, or whose batches several
processes share, weighs them by their numbers of labels, so that they have together the loss and gradients of one batch
with all their rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from softtune.data.encoding import IGNORED
from softtune.training import ranks

Batch = Mapping[str, Tensor]
SPANS = ("start_positions", "end_positions")


def loss_divisors(batches: Sequence[Batch], *, shifts_labels: bool, surplus: int = 0) -> list[float]:
    """What to divide each batch's mean loss by, so that their sum is the mean over the labels of the whole update.

    Where several processes share the batches, the mean of their sums is.

    Args:
        batches: those of one update, or this process's parts of them.
        shifts_labels: whether the loss compares each label with the logits of the token before, so that the first
            column of labels does not count.
        surplus: rows at the end of the last batch that do not count; see ``without_labels``.

    Returns:
        A divisor for each batch, infinite for one without labels; NaN if the update has none.
    """
    if len(batches) < 2 and ranks.world_size() == 1:
        return [1.0] * len(batches)  # without a look at the labels, which a device would have to wait for
    counts = torch.stack([num_labels(batch, shifts_labels=shifts_labels) for batch in batches])
    if surplus == num_rows(batches[-1]):
        counts[-1] = 0
    divisors: list[float] = (ranks.all_reduce(counts.sum()) / ranks.world_size() / counts).tolist()
    return divisors


def num_labels(batch: Batch, *, shifts_labels: bool) -> Tensor:
    """The number of labels that a batch's loss is the mean over; of spans, which have no ``labels``, its rows."""
    labels = batch.get("labels")
    if labels is not None:
        return (labels[:, 1:] if shifts_labels else labels).ne(IGNORED).sum()
    starts = batch.get(SPANS[0])
    return torch.tensor(num_rows(batch)) if starts is None else starts.lt(_width(batch)).sum()


def without_labels(batch: Batch, surplus: int) -> Batch:
    """A batch whose last ``surplus`` rows have no label; the batch itself if it would have none then."""
    if surplus in (0, num_rows(batch)):
        return batch
    blanks = {"labels": IGNORED, **dict.fromkeys(SPANS, _width(batch))}
    blanked = {name: batch[name].clone() for name in blanks if name in batch}
    for name, labels in blanked.items():
        labels[-surplus:] = blanks[name]
    return {**batch, **blanked}


def with_a_label(batch: Batch) -> Batch:
    """A batch with a label, for a loss that is a number; where it has none of its own, it counts nothing."""
    labels = batch.get("labels")
    if labels is None or bool(labels.ne(IGNORED).any()):
        return batch
    labels = labels.clone()
    labels[..., -1] = 0
    return {**batch, "labels": labels}


def num_rows(batch: Batch) -> int:
    """The number of a batch's rows."""
    return len(next(iter(batch.values())))


def _width(batch: Batch) -> int:
    """The number of columns, which a span's loss ignores as a position."""
    text = batch.get("input_ids", batch.get("inputs_embeds"))
    assert text is not None
    return text.shape[1]
