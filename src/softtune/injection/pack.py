"""Packs a batch's tokens into one row of the layers, without padding, and with the first tokens that rows share once.

Only attention sees rows, see ``GroupedAttention``. Rows that start alike (a template's first words; one text before
several labels) share their first tokens, which do not depend on what follows. Outputs are those of the padded batch,
and the gradients of shared tokens add up.

Letters: B rows, T columns, L tokens of the longest row, N tokens of the pack, G rows of a group, Q of their queries, S
of their keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softtune.backbone import Stack
from softtune.backbone.interface import takes_any_mask
from softtune.injection.attention_wrapper import PrefixAttention
from softtune.injection.grouped_attention import GroupedAttention, RowGroup, alike_long, take
from softtune.injection.layout import is_contiguous
from softtune.injection.rows import multiplied
from softtune.injection.step import TEXT, Call, Step, features_of
from softtune.injection.trim import each_state


def can_pack(stack: Stack, call: Call) -> bool:
    """Whether a call's tokens can be packed: it requests hidden states alone, and has no cache and no position ids."""
    mask, config = call.get("attention_mask"), stack.module.config
    requests_more = any(
        getattr(config, name, False) if call.get(name) is None else call[name]
        for name in ("output_attentions", "output_router_logits")
    )
    has_places = call.get("cache") is not None or call.get("position_ids") is not None
    is_free = call.get("use_cache") is False and not has_places and not requests_more
    if not (is_free and takes_any_mask(config)):
        return False
    # The last question, since its answer has to be waited for.
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and is_contiguous(mask))


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedGroup(RowGroup):
    """Rows of a pack. Queries are the tokens that a row takes from no other row."""

    rows: Tensor
    """[G] indices of the rows in the batch."""
    keys: Tensor
    """[G, S] indices in the pack of all tokens of each row."""


class Pack:
    """The places of a batch's tokens in one packed row.

    Args:
        mask: [B, T] the attention mask; each row's tokens are contiguous.
        alike: [B, T] numbers, such as token ids; rows that start with the same ones share those tokens. None where rows
            share no tokens.
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
        """[B] number of first tokens that each row takes from another."""
        for row, _, length in shared:
            common[row] = length
        self.rows, indices = (is_token & (numbers >= common[:, None])).nonzero(as_tuple=True)
        self.columns = columns[self.rows, indices]
        self.places = torch.zeros_like(columns)
        """[B, L] index in the pack of each row's tokens."""
        self.places[self.rows, indices] = torch.arange(len(indices), device=mask.device)
        for row, owner, length in shared:
            self.places[row, :length] = self.places[owner, :length]
        self.groups = [self._group(rows, common[rows]) for rows in alike_long(self.lengths, self.lengths - common)]
        self._by_column = self.places.gather(
            1, (torch.arange(mask.shape[1], device=mask.device) - starts) % len(numbers)
        )

    @classmethod
    def from_call(cls, stack: Stack, call: Call, kinds: Tensor | None, *, always: bool) -> Pack | None:
        """Pack a call's tokens; None where that would save nothing.

        Args:
            stack: the stack that is called.
            call: its arguments.
            kinds: [B] a number for each row, the same where prompts do not tell rows apart; None where it is for all.
            always: pack even where it saves nothing.
        """
        ids = None if stack.is_random or features_of(call) else call.get("input_ids")
        if ids is not None and kinds is not None:
            ids = ids + multiplied(kinds, len(ids)).to(ids.device)[:, None] * (int(ids.max()) + 1)
        pack = cls(Step(call).full_mask(), ids)
        return pack if always or 0 < len(pack.rows) < pack.mask.numel() else None

    def _group(self, rows: Tensor, common: Tensor) -> PackedGroup:
        lengths = self.lengths[rows, None]
        numbers = common[:, None] + torch.arange(int((lengths[:, 0] - common).max()), device=rows.device)
        every = torch.arange(int(lengths.max()), device=rows.device)
        places, last = self.places[rows], lengths - 1
        return PackedGroup(
            rows=rows,
            queries=places.gather(1, numbers.minimum(last)),
            keys=places.gather(1, every.minimum(last)),
            numbers=numbers.clamp(max=len(every) - 1),
            is_query=numbers < lengths,
            length=len(every),
        )

    def fill(self, call: dict[str, Any]) -> None:
        """Replace a call's rows [B, T] by the packed tokens [1, N]."""
        for name in (*TEXT, *features_of(call)):
            if call.get(name) is not None and name != "attention_mask":
                call[name] = call[name].expand(len(self.mask), -1, *call[name].shape[2:])[self.rows, self.columns][None]

    def restore(self, output: Any) -> None:
        """Put an output's hidden states [1, N, D] back into the caller's rows and columns; padding gets zeros."""
        each_state(output, self._in_rows)

    def _in_rows(self, states: Tensor) -> Tensor:
        in_rows = states[0].index_select(0, self._by_column.flatten()).view(*self.mask.shape, -1)
        return in_rows.masked_fill(~self.mask[..., None], 0.0)


class PackedAttention(GroupedAttention):
    """An attention wrapper that separates a pack into its rows.

    Args:
        pack: the places of the tokens.
        wrappers: the wrapper that adds each group's prefixes; None where it has none.
    """

    def __init__(self, pack: Pack, wrappers: Sequence[PrefixAttention | None]) -> None:
        super().__init__(list(zip(pack.groups, wrappers, strict=True)), pack.mask.device)
        self.keys = [group.keys for group in pack.groups]

    def keys_and_values(self, module: nn.Module, key: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``GroupedAttention``."""
        return ((take(key, places), take(value, places)) for places in self.keys)


def _common(numbers: Tensor, is_token: Tensor) -> list[tuple[int, int, int]]:
    """Find rows that start as others do: (row, other row, number of common tokens), in lexicographic order.

    In that order, no row has more in common with an earlier row than with the one right before it, which comes first.
    """
    texts = numbers.masked_fill(~is_token, -1)
    order = texts.unique(dim=0, return_inverse=True)[1].argsort(stable=True)
    rows, before = order[1:], order[:-1]
    same = (texts[rows] == texts[before]) & is_token[rows]
    lengths = same.int().cumprod(dim=1).sum(dim=1)
    return [common for common in zip(rows.tolist(), before.tolist(), lengths.tolist(), strict=True) if common[2]]
