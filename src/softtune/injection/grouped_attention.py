"""Attention of many rows whose tokens stand in one packed row: rows of similar length run as one batch.

Everything in a decoder layer but attention treats tokens one by one, so it takes them in any arrangement. Only
attention sees rows: the wrapper gathers each row's queries and keys, and puts the outputs back.

Letters: N tokens of the packed row, G rows of a group, Q of their queries, T of their tokens, S of their keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softtune.backbone.interface import Attention
from softtune.injection.attention_wrapper import PrefixAttention


@dataclass(frozen=True, kw_only=True, eq=False)
class RowGroup:
    """Rows of similar length, whose attention runs as one batch. The padding of shorter rows is masked."""

    queries: Tensor
    """[G, Q] index of each query in the packed row."""
    numbers: Tensor
    """[G, Q] index of each query among its row's tokens."""
    is_query: Tensor
    """[G, Q] which queries are not padding."""
    length: int
    """T, the number of tokens of the longest row."""

    def mask(self, whole: Tensor) -> Tensor:
        """[G or 1, 1, Q, T] the queries' mask, from the mask [1, 1, L, L] of a row of at least T tokens."""
        numbers = self.numbers[:1] if bool((self.numbers == self.numbers[:1]).all()) else self.numbers
        return whole[0, 0, numbers, : self.length][:, None]


class GroupedAttention(ABC):
    """An attention wrapper that calls attention for each group of rows. A subclass says where their keys are.

    Args:
        groups: the groups, each with the wrapper that adds its rows' prefixes; None where they have none.
        device: where the layers compute. Indices move there once, rather than once a layer.
    """

    def __init__(self, groups: Sequence[tuple[RowGroup, PrefixAttention | None]], device: torch.device) -> None:
        self.groups = groups
        self.queries = [group.queries.to(device) for group, _ in groups]
        self.order = _order([group for group, _ in groups]).to(device)
        """[N] index of each token in the groups' concatenated queries."""
        self._masks: dict[int, tuple[Tensor, list[Tensor]]] = {}

    @property
    def reached(self) -> set[int]:
        """The ``id`` of each module that has called the wrappers of all groups."""
        reached = [wrapper.reached for _, wrapper in self.groups if wrapper is not None]
        return set.intersection(*reached) if reached else set()

    @abstractmethod
    def keys_and_values(self, module: nn.Module, key: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each group's keys [G, H, S, K] and values, given those [1, H, N, K] of the packed row's tokens."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no types here
    def __call__(
        self,
        attend: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention outputs [1, N, H, V] of queries [1, H, N, K], by the mask [1, 1, L, L] of the longest row."""
        assert attention_mask is not None
        kwargs = {**kwargs, "is_causal": False}
        gathered, masks = self.keys_and_values(module, key, value), self._group_masks(attention_mask)
        outputs = []
        for (_, wrapper), queries, (keys, values), mask in zip(self.groups, self.queries, gathered, masks, strict=True):
            rows = module, take(query, queries), keys, values, mask
            output, _ = attend(*rows, **kwargs) if wrapper is None else wrapper(attend, *rows, **kwargs)
            outputs.append(output.flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.order)[None], None

    def _group_masks(self, mask: Tensor) -> list[Tensor]:
        """Each group's mask, from the layer's; made once for all layers that share a mask."""
        if id(mask) not in self._masks:
            self._masks[id(mask)] = (mask, [group.mask(mask) for group, _ in self.groups])
        return self._masks[id(mask)][1]


def take(states: Tensor, places: Tensor) -> Tensor:
    """[G, H, Q, K] gathered from a packed row's [1, H, N, K] by places [G, Q]."""
    taken = states.transpose(1, 2)[0].index_select(0, places.flatten().to(states.device))
    return taken.view(*places.shape, *taken.shape[1:]).transpose(1, 2)


def alike_long(lengths: Tensor, queries: Tensor) -> list[Tensor]:
    """Indices of the rows that have queries, in groups with similar numbers of queries and of tokens."""
    with_queries = queries.nonzero().flatten().tolist()
    groups = [g for some in _halved(with_queries, queries.tolist()) for g in _halved(some, lengths.tolist())]
    return [torch.tensor(rows, device=lengths.device) for rows in groups]


def _order(groups: Sequence[RowGroup]) -> Tensor:
    places = torch.cat([group.queries[group.is_query] for group in groups])
    is_token = torch.cat([group.is_query.flatten() for group in groups])
    return is_token.nonzero().flatten()[places.argsort()]


def _halved(rows: list[int], sizes: list[int]) -> list[list[int]]:
    """Split rows into groups whose smallest is at least half as large as the largest."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=sizes.__getitem__, reverse=True):
        if not groups or 2 * sizes[row] < sizes[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups
