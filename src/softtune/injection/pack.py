"""Runs a batch without its padding, and what rows have in common once: all tokens stand in one row of the layers.

All of a decoder's layer but its attention treats tokens one by one, so it takes them in any arrangement. Attention
alone sees rows: a wrapper gathers each row's queries and keys, and puts the outputs back. Rows that begin alike (a
template's first words; one text before several labels) share the tokens that they begin with, which see nothing of what
follows. Outputs are those of the padded batch, and the gradients of shared tokens add up.

Letters: B rows, T columns, L tokens of the longest row, N tokens of the pack, G rows of a group, Q of their queries, S
of their keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softtune.backbone import Stack
from softtune.backbone.interface import Attention, takes_any_mask
from softtune.injection.attention import PrefixAttention
from softtune.injection.layout import is_contiguous
from softtune.injection.rows import multiplied
from softtune.injection.step import TEXT, Call, Step, features_of
from softtune.injection.trim import each_state


def can_pack(stack: Stack, call: Call) -> bool:
    """Whether tokens may stand in any arrangement: nothing but states is asked for, and there is no cache."""
    mask, config = call.get("attention_mask"), stack.module.config
    is_whole = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and is_contiguous(mask))
    asks = any(
        getattr(config, name, False) if call.get(name) is None else call[name]
        for name in ("output_attentions", "output_router_logits")
    )
    has_places = call.get("cache") is not None or call.get("position_ids") is not None
    is_free = call.get("use_cache") is False and not has_places and not asks
    return is_free and is_whole and takes_any_mask(config)


@dataclass(frozen=True)
class Group:
    """Rows of like length, whose attention runs together. What fills up shorter rows is seen by nobody."""

    rows: Tensor
    """[G] numbers of the rows in the batch."""
    queries: Tensor
    """[G, Q] places in the pack of the tokens that it has from no other row."""
    keys: Tensor
    """[G, S] places of all tokens."""
    numbers: Tensor
    """[G, Q] which of its row's tokens a query is."""
    is_query: Tensor
    """[G, Q] which queries are no filling."""

    def mask(self, whole: Tensor) -> Tensor:
        """[G or 1, 1, Q, S] what the queries see, by the mask [1, 1, L, L] of a row of all keys."""
        numbers = self.numbers[:1] if bool((self.numbers == self.numbers[:1]).all()) else self.numbers
        return whole[0, 0, numbers, : self.keys.shape[1]][:, None]


class Pack:
    """The places of a batch's tokens.

    Args:
        mask: [B, T] the attention mask; each row's tokens stand next to one another.
        alike: [B, T] by which numbers rows know whether they begin alike; None where none may share a token.
    """

    def __init__(self, mask: Tensor, alike: Tensor | None) -> None:
        self.mask = mask != 0
        self.lengths = self.mask.sum(dim=1)
        numbers = torch.arange(int(self.lengths.max()), device=mask.device)
        starts = self.mask.int().argmax(dim=1, keepdim=True)
        columns = (starts + numbers).clamp(max=mask.shape[1] - 1)
        is_token = numbers < self.lengths[:, None]
        shared = [] if alike is None else _common(alike.gather(1, columns), is_token)
        self.common = common = torch.zeros_like(self.lengths)
        """[B] how many first tokens each row has from another."""
        for row, _, length in shared:
            common[row] = length
        self.rows, own = (is_token & (numbers >= common[:, None])).nonzero(as_tuple=True)
        self.columns = columns[self.rows, own]
        self.places = torch.zeros_like(columns)
        """[B, L] where in the pack each row's tokens are."""
        self.places[self.rows, own] = torch.arange(len(own), device=mask.device)
        for row, owner, length in shared:
            self.places[row, :length] = self.places[owner, :length]
        self.groups = [self._group(rows, common[rows]) for rows in alike_long(self.lengths, self.lengths - common)]
        self._by_column = self.places.gather(
            1, (torch.arange(mask.shape[1], device=mask.device) - starts) % len(numbers)
        )

    @classmethod
    def of(cls, stack: Stack, call: Call, rows: Tensor | None, *, always: bool) -> Pack | None:
        """The places of a call's tokens; None where that would save nothing.

        Args:
            stack: the stack that is called.
            call: its arguments.
            rows: [B] which adapter each row has; None where there is only one.
            always: also where it saves nothing.
        """
        ids = None if stack.is_random or features_of(call) else call.get("input_ids")
        if ids is not None and rows is not None:
            ids = ids + multiplied(rows, len(ids)).to(ids.device)[:, None] * (int(ids.max()) + 1)
        pack = cls(Step(call).full_mask(), ids)
        return pack if always or 0 < len(pack.rows) < pack.mask.numel() else None

    @property
    def order(self) -> Tensor:
        """[N] where the groups' queries, one after the other, have each of the pack's tokens."""
        return order_of([(group.queries, group.is_query) for group in self.groups])

    def _group(self, rows: Tensor, common: Tensor) -> Group:
        lengths = self.lengths[rows, None]
        numbers = common[:, None] + torch.arange(int((lengths[:, 0] - common).max()), device=rows.device)
        every = torch.arange(int(lengths.max()), device=rows.device)
        places, last = self.places[rows], lengths - 1
        return Group(
            rows=rows,
            queries=places.gather(1, numbers.minimum(last)),
            keys=places.gather(1, every.minimum(last)),
            numbers=numbers.clamp(max=len(every) - 1),
            is_query=numbers < lengths,
        )

    def fill(self, call: dict[str, Any]) -> None:
        """Put the tokens [1, N] of a call in place of its rows [B, T]."""
        for name in (*TEXT, *features_of(call)):
            if call.get(name) is not None and name != "attention_mask":
                call[name] = call[name].expand(len(self.mask), -1, *call[name].shape[2:])[self.rows, self.columns][None]

    def restore(self, output: Any) -> None:
        """Give an output's states [1, N, D] the caller's rows and columns; padding has zeros."""
        each_state(output, self._in_rows)

    def _in_rows(self, states: Tensor) -> Tensor:
        in_rows = states[0].index_select(0, self._by_column.flatten()).view(*self.mask.shape, -1)
        return in_rows.masked_fill(~self.mask[..., None], 0.0)


class PackedAttention:
    """An attention wrapper that gives every group of a pack its own call.

    Args:
        pack: the places of the tokens.
        wrappers: each group's prefixes; None where there are none.
    """

    def __init__(self, pack: Pack, wrappers: Sequence[PrefixAttention | None]) -> None:
        self.groups = list(zip(pack.groups, wrappers, strict=True))
        self.order = pack.order
        self._masks: dict[int, tuple[Tensor, list[Tensor]]] = {}

    @property
    def reached(self) -> set[Any]:
        """Modules whose every group has called."""
        reached = [wrapper.reached for _, wrapper in self.groups if wrapper is not None]
        return set.intersection(*reached) if reached else set()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no types here
    def __call__(
        self,
        attend: Attention,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert attention_mask is not None
        outputs = []
        for (group, wrapper), mask in zip(self.groups, self._of_groups(attention_mask), strict=True):
            rows = take(query, group.queries), take(key, group.keys), take(value, group.keys)
            if wrapper is None:
                output, _ = attend(module, *rows, mask, **{**kwargs, "is_causal": False})
            else:
                output, _ = wrapper(attend, module, *rows, mask, **kwargs)
            outputs.append(output.flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.order)[None], None

    def _of_groups(self, mask: Tensor) -> list[Tensor]:
        """Each group's part of a layer's mask; made once for all layers that share a mask."""
        if id(mask) not in self._masks:
            self._masks[id(mask)] = (mask, [group.mask(mask) for group, _ in self.groups])
        return self._masks[id(mask)][1]


def order_of(groups: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """[N] where groups' queries, one after the other, have each token, by their places [G, Q] and which of them are no
    filling [G, Q]."""
    places = torch.cat([queries[is_query] for queries, is_query in groups])
    is_token = torch.cat([is_query.flatten() for _, is_query in groups])
    return is_token.nonzero().flatten()[places.argsort()]


def take(states: Tensor, places: Tensor) -> Tensor:
    """[G, H, Q, K] of a pack's [1, H, N, K], by places [G, Q]."""
    taken = states.transpose(1, 2)[0].index_select(0, places.flatten())
    return taken.view(*places.shape, *taken.shape[1:]).transpose(1, 2)


def _common(numbers: Tensor, is_token: Tensor) -> list[tuple[int, int, int]]:
    """Rows that begin as others do, with which other, and for how many tokens; a row that others begin as comes first.

    In lexical order, no row has more in common with those before it than with the last of them.
    """
    texts = numbers.masked_fill(~is_token, -1)
    order = texts.unique(dim=0, return_inverse=True)[1].argsort(stable=True)
    rows, before = order[1:], order[:-1]
    same = (texts[rows] == texts[before]) & is_token[rows]
    lengths = same.int().cumprod(dim=1).sum(dim=1)
    return [common for common in zip(rows.tolist(), before.tolist(), lengths.tolist(), strict=True) if common[2]]


def alike_long(lengths: Tensor, queries: Tensor) -> list[Tensor]:
    """Numbers of the rows with queries, in groups of like many queries and tokens."""
    asking = queries.nonzero().flatten().tolist()
    groups = [g for some in _halved(asking, queries.tolist()) for g in _halved(some, lengths.tolist())]
    return [torch.tensor(rows, device=lengths.device) for rows in groups]


def _halved(rows: list[int], sizes: list[int]) -> list[list[int]]:
    """Rows in groups whose smallest is at least half as large as the largest."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=sizes.__getitem__, reverse=True):
        if not groups or 2 * sizes[row] < sizes[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups
