"""Attention of rows in one packed row, against attention row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softtune.backbone.interface import Attention, MaskForm
from softtune.injection.attention_wrapper import PrefixAttention
from softtune.injection.grouped_attention import GroupedAttention, RowGroup, alike_long, take
from softtune.methods.prompt import KeyValue

HEADS, SIZE = 2, 3


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, is_causal: bool
) -> tuple[Tensor, None]:
    """Attention by a softmax; [G, Q, H, K], as transformers returns it."""
    assert not is_causal
    scores = (query @ key.transpose(2, 3)).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def added(prefixes: dict[nn.Module, KeyValue], rows: int) -> PrefixAttention:
    """A wrapper that adds the same prefixes [1, H, P, K] to all rows."""
    repeated = {m: KeyValue(*(part.expand(rows, -1, -1, -1) for part in prefix)) for m, prefix in prefixes.items()}
    return PrefixAttention(repeated, visible={}, biases={})


class RowsOfTheirOwn(GroupedAttention):
    """Rows whose tokens stand one behind the other."""

    def __init__(self, lengths: list[int], prefixes: dict[nn.Module, KeyValue] | None = None) -> None:
        self.places, groups = [], []
        firsts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        for rows in alike_long(torch.tensor(lengths), torch.tensor(lengths)):
            sizes = torch.tensor(lengths)[rows, None]
            numbers = torch.arange(int(sizes.max())).expand(len(rows), -1)
            places = firsts[rows, None] + numbers.minimum(sizes - 1)
            self.places.append(places)
            group = RowGroup(queries=places, numbers=numbers, is_query=numbers < sizes, length=int(sizes.max()))
            groups.append((group, None if prefixes is None else added(prefixes, len(rows))))
        super().__init__(groups, torch.device("cpu"))

    def keys_and_values(self, module: nn.Module, key: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return ((take(key, places), take(value, places)) for places in self.places)


def states(length: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, HEADS, length, SIZE, dtype=torch.float64).unbind()
    return query, key, value


def causal(length: int) -> Tensor:
    return torch.ones(1, 1, length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("lengths", [[1], [3, 3], [2, 5, 1, 9, 4], [7, 1, 1]])
def test_rows_are_told_apart(lengths: list[int]) -> None:
    query, key, value = (x.requires_grad_() for x in states(sum(lengths)))
    grouped = RowsOfTheirOwn(lengths)
    found, _ = grouped(Attention(attend, MaskForm.DENSE), nn.Identity(), query, key, value, causal(max(lengths)))
    rows = [tuple(x.split(lengths, dim=2)[i] for x in (query, key, value)) for i in range(len(lengths))]
    expected = torch.cat([attend(nn.Identity(), *row, causal(row[0].shape[2]), False)[0] for row in rows], dim=1)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((x * weights).sum(), (query, key, value)) for x in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_prefixes_stand_before_each_rows_keys() -> None:
    lengths, module = [2, 5, 1], nn.Identity()
    query, key, value = states(sum(lengths))
    prefix = KeyValue(*torch.randn(2, 1, HEADS, 4, SIZE, dtype=torch.float64).unbind())
    grouped = RowsOfTheirOwn(lengths, {module: prefix})
    found, _ = grouped(Attention(attend, MaskForm.DENSE), module, query, key, value, causal(5))
    for row, (q, k, v) in enumerate(zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)):
        mask = torch.cat([torch.ones(1, 1, q.shape[2], 4, dtype=torch.bool), causal(q.shape[2])], dim=3)
        expected, _ = attend(module, q, torch.cat([prefix.key, k], 2), torch.cat([prefix.value, v], 2), mask, False)
        torch.testing.assert_close(found.split(lengths, dim=1)[row], expected)
    assert grouped.reached == {id(module)}


def test_a_mask_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    own = RowGroup.mask
    monkeypatch.setattr(RowGroup, "mask", lambda self, whole: made.append(whole) or own(self, whole))
    grouped, mask = RowsOfTheirOwn([2, 2, 9]), causal(9)
    for _ in range(3):
        grouped(Attention(attend, MaskForm.DENSE), nn.Identity(), *states(13), mask)
    assert len(made) == 2
    grouped(Attention(attend, MaskForm.DENSE), nn.Identity(), *states(13), mask.clone())
    assert len(made) == 4


def test_groups_are_of_similar_length() -> None:
    lengths = torch.tensor([16, 1, 8, 7, 2, 3])
    groups = [sorted(rows.tolist()) for rows in alike_long(lengths, torch.ones_like(lengths))]
    assert groups == [[0, 2], [3], [4, 5], [1]]


def test_rows_without_queries_are_in_no_group() -> None:
    groups = alike_long(torch.tensor([5, 5, 5]), torch.tensor([2, 0, 2]))
    assert [rows.tolist() for rows in groups] == [[0, 2]]
