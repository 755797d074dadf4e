"""How much each batch of an update counts.

A batch's loss is the mean over its labels, CPT's also over the prompt's labels, once a row. An update that accumulates
several batches, or whose batches several processes share, weighs them by their numbers of labels, so that they have
together the loss and gradients of one batch with all their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from softtune.data.encoding import IGNORED
from softtune.methods.prompt import Supervision
from softtune.training import ranks

Batch = Mapping[str, Tensor]
Supervise = Callable[[Tensor, Tensor | None], Supervision]
"""``supervision`` of a method with a loss of its own: from labels [B, T], and the tokens' types or None."""
SPANS = ("start_positions", "end_positions")


def loss_divisors(
    batches: Sequence[Batch], *, shifts_labels: bool, own: Supervise | None = None, is_spare: bool = False
) -> list[float]:
    """What to divide each batch's mean loss by, so that their sum is the mean over the labels of the whole update.

    Where several processes share the batches, the mean of their sums is.

    Args:
        batches: those of one update, or this process's parts of them.
        shifts_labels: whether the loss compares each label with the logits of the token before, so that the first
            column of labels does not count.
        own: what the adapter's own loss is over; None where the loss is over the batch's labels.
        is_spare: whether no row of the last batch counts, whose labels are left in it; see ``without_labels``.

    Returns:
        A divisor for each batch, infinite for one without labels; NaN if the update has none.
    """
    if len(batches) < 2 and ranks.world_size() == 1:
        return [1.0] * len(batches)  # without a look at the labels, which a device would have to wait for
    counts = torch.stack([num_labels(batch, shifts_labels=shifts_labels, own=own) for batch in batches])
    if is_spare:
        counts[-1] = 0
    divisors: list[float] = (ranks.all_reduce(counts.sum()) / ranks.world_size() / counts).tolist()
    return divisors


def num_labels(batch: Batch, *, shifts_labels: bool, own: Supervise | None = None) -> Tensor:
    """The number of labels that a batch's loss is the mean over; of spans, which have no ``labels``, its rows."""
    labels = batch.get("labels")
    if own is not None and labels is not None:
        return own(labels, batch.get("input_type_mask")).num_labels
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


def without_rows(batch: Batch, surplus: int) -> Batch:
    """A batch without its last ``surplus`` rows, for a loss of which a row without labels has a part; the batch itself
    if it would have no row then."""
    return batch if surplus in (0, num_rows(batch)) else {name: value[:-surplus] for name, value in batch.items()}


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
