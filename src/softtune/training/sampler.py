"""The order of training rows in which neighbours have similar lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from softtune import compat


class LengthGroupedSampler(Sampler[int]):
    """The Trainer's length-grouped order, drawn from the seed and the epoch alone.

    The Trainer's own sampler draws from the global random state, which a resumed run has only from its step on.

    Args:
        lengths: the rows' numbers of tokens.
        batch_size: rows of an update.
        seed: seed of the order, to which the epoch is added.
        epoch: the number of the epoch that begins.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths = [*lengths]
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(compat.length_grouped_indices(self.lengths, self.batch_size, generator))
