"""Adds terms to the outputs of attention layers that depend on a layer's queries alone.

A prefix shares the softmax of a layer with the text: the more text, the less weight it has. Terms stand outside of it,
take no columns of a mask and no entries of a cache, and treat tokens one by one, so that they are added in any
arrangement of rows. Letters: R adapters, B rows, N tokens of a packed row, T queries, Q query heads, H key/value heads,
P virtual tokens, K and V sizes of a key and a value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softtune.backbone import AttentionLayer
from softtune.backbone.blocked_attention import by_head
from softtune.backbone.interface import Attention, Mask
from softtune.injection.attention_wrapper import PrefixAttention
from softtune.injection.grouped_attention import GroupedAttention
from softtune.methods.prompt import GatedKeyValue, Prompt


@dataclass(frozen=True)
class Term:
    """What one adapter adds to one layer's outputs."""

    memory: Tensor | None = None
    """[Q or H, K, V], as in ``Prompt``."""
    gated: GatedKeyValue | None = None

    def __call__(self, query: Tensor, scaling: float) -> Tensor:
        """[B, T, Q, V] for queries [B, Q, T, K].

        Args:
            query: the queries.
            scaling: the factor of a layer's scores.
        """
        added: Tensor | int = 0
        if self.memory is not None:
            added = by_head(F.elu(query), len(self.memory)) @ self.memory.to(query.dtype)
            added = added.reshape(*query.shape[:3], -1)
        if self.gated is not None:
            added = added + _attend_apart(query, self.gated, scaling)
        assert isinstance(added, Tensor)
        return added.transpose(1, 2)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that it is computed with."""
        return [x for x in (self.memory, *(self.gated or ())) if x is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> Term:
        """The same with other tensors."""
        gated = None if self.gated is None else GatedKeyValue(*map(change, self.gated))
        return Term(None if self.memory is None else change(self.memory), gated)


Terms = Mapping[nn.Module, Term]
"""What one adapter adds, by attention module."""


def layer_terms(prompt: Prompt, layers: Sequence[AttentionLayer]) -> dict[nn.Module, Term]:
    """The terms that a prompt adds to the outputs of these layers."""
    acting = [layer for layer in layers if layer.place in prompt.terms and layer.module is not None]
    return {a.module: Term(prompt.memories.get(a.place), prompt.gated.get(a.place)) for a in acting if a.module}


class TermAttention:
    """An attention wrapper that adds each row's terms to what another wrapper computes.

    Args:
        inner: that wrapper; None for the stock attention function.
        terms: the terms of each of the R adapters.
        rows: [B] or, where the rows stand packed in one, [N] index of each row's or token's adapter; None where there
            is only one.
        packed: whether ``rows`` are those of a packed row's tokens.
    """

    def __init__(
        self,
        inner: PrefixAttention | GroupedAttention | None,
        terms: Sequence[Terms],
        rows: Tensor | None,
        *,
        packed: bool = False,
    ) -> None:
        self.inner = inner
        self.packed = packed
        self.parts = [(of_one, _places(rows, number)) for number, of_one in enumerate(terms) if of_one]
        """The terms of the adapters that have some, and the places of their rows; None where they are all."""
        self._reached: set[int] = set()

    @property
    def reached(self) -> set[int]:
        """The ``id`` of each module that has called the wrapper and got all that it should."""
        return self._reached if self.inner is None else self._reached | self.inner.reached

    def __call__(
        self,
        attend: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Mask,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        states = module, query, key, value, attention_mask
        output, weights = attend(*states, **kwargs) if self.inner is None else self.inner(attend, *states, **kwargs)
        given = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if given is None else given
        for terms, places in self.parts:
            if (term := terms.get(module)) is not None:
                self._reached.add(id(module))
                output = self._add(output, term, query, scaling, places)
        return output, weights

    def _add(self, output: Tensor, term: Term, query: Tensor, scaling: float, places: Tensor | None) -> Tensor:
        if places is None:
            return output + term(query, scaling).to(output.dtype)
        places = places.to(query.device)
        added = term(query.index_select(2 if self.packed else 0, places), scaling)
        return output.index_add(1 if self.packed else 0, places, added.to(output.dtype))


def _places(rows: Tensor | None, number: int) -> Tensor | None:
    return None if rows is None else (rows == number).nonzero().flatten()


def _attend_apart(query: Tensor, gated: GatedKeyValue, scaling: float) -> Tensor:
    """[B, Q, T, V] attention to virtual tokens alone, times the gate."""
    key, value = gated.key.to(query.dtype), gated.value.to(query.dtype)
    scores = by_head(query, len(key)) @ key.transpose(1, 2) * scaling
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    attended = (weights @ value).reshape(*query.shape[:3], -1)
    return attended * gated.gate.to(query.dtype).view(-1, 1, 1)
