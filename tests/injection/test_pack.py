"""What a pack shares between rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softtune.injection.pack import Pack


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        self.numbers = max(self.numbers, *(x.numel() for x in tree_leaves(output) if isinstance(x, Tensor)), 0)
        return output


def beginnings(ids: Tensor, mask: Tensor) -> set[tuple[int, ...]]:
    """Every different beginning of a row: what is to be computed once."""
    rows = [row[real != 0].tolist() for row, real in zip(ids, mask, strict=True)]
    return {tuple(row[: n + 1]) for row in rows for n in range(len(row))}


@pytest.mark.parametrize("words", [1, 2, 3, 50])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_beginning_is_there_once(side: str, words: int) -> None:
    ids = torch.randint(words, (9, 6))
    columns = torch.arange(6)
    lengths = torch.randint(1, 7, (9, 1))
    mask = (columns < lengths if side == "right" else columns >= 6 - lengths).long()
    pack = Pack(mask, ids)
    assert len(pack.rows) == len(beginnings(ids, mask))
    tokens = ids[pack.rows, pack.columns]
    for row, real, places in zip(ids, mask, pack.places, strict=True):
        assert torch.equal(tokens[places[: int(real.sum())]], row[real != 0])
    queries = torch.cat([group.queries[group.is_query] for group in pack.groups])
    assert queries.sort().values.tolist() == list(range(len(tokens)))


def test_no_row_is_compared_with_every_other() -> None:
    ids = torch.randint(1000, (64, 16))
    with Largest() as largest:
        Pack(torch.ones_like(ids), ids)
    assert largest.numbers <= 2 * ids.numel()
