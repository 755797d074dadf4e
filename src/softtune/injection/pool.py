"""Keys and values of many texts in one pool, and a forward that reads on in any of them at once.

A pool has slots, one for each token in all layers. A text is a list of slots, and so is a prefix, which all texts of an
adapter have in common. A step takes the next tokens of some texts, one of this and a hundred of that, puts all of them
into one row of the layers and gives attention alone the keys of each text: nothing is padded, and nothing moves where
texts come and go.

Letters: N tokens of a step, G texts of a group, Q of their queries, T of their tokens, P virtual tokens of a prefix,
S = P + T keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softtune.backbone import AttentionLayer, Backbone, Place
from softtune.backbone.interface import WRAPPER, Attention, takes_any_mask
from softtune.errors import UnsupportedModelError
from softtune.injection.attention import PrefixAttention
from softtune.injection.pack import alike_long, order_of, take
from softtune.methods.base import KeyValue

SHORTEST_MASK = 64
"""Tokens of the text that the first mask is made for."""


class Pool:
    """Room for the keys and values of texts and prefixes.

    Args:
        backbone: the base model, a decoder.
        slots: how many tokens it has room for.

    Raises:
        UnsupportedModelError: the model's layers do not take tokens of several texts in one row.
    """

    def __init__(self, backbone: Backbone, slots: int) -> None:
        stack = backbone.stacks[0]
        if not backbone.packs or not takes_any_mask(stack.module.config):
            raise UnsupportedModelError(
                f"{type(backbone.model).__name__} cannot read several texts without padding: use a decoder whose every "
                "layer attends, loaded with attn_implementation='sdpa' or 'eager'"
            )
        self.stack = stack
        self.layers: dict[nn.Module, AttentionLayer] = {a.module: a for a in backbone.attention_layers if a.module}
        dtype, device = stack.module.dtype, stack.device
        # On a CPU, memory that nobody has written to takes none.
        layers = self.layers.items()
        where: dict[str, Any] = {"dtype": dtype, "device": device}
        self.keys = {module: torch.empty(slots, a.heads, a.key_size, **where) for module, a in layers}
        self.values = {module: torch.empty(slots, a.heads, a.value_size, **where) for module, a in layers}
        self._free = list(range(slots - 1, -1, -1))
        self.device = device
        self._masks: tuple[int, Any] = (0, None)

    @property
    def free(self) -> int:
        """How many slots are."""
        return len(self._free)

    @property
    def token_bytes(self) -> int:
        """Bytes of one slot in all layers."""
        return sum(t[0].nbytes for t in (*self.keys.values(), *self.values.values()))

    def take(self, count: int) -> Tensor:
        """[count] slots that nobody has; there are so many free."""
        assert count <= self.free
        kept = len(self._free) - count
        taken, self._free = self._free[kept:], self._free[:kept]
        return torch.tensor(taken[::-1], dtype=torch.long)

    def give(self, slots: Tensor) -> None:
        """Nobody has these any more."""
        self._free += slots.flip(0).tolist()

    def hold(self, prefixes: Mapping[Place, KeyValue], slots: Tensor) -> None:
        """Write a prefix into slots [P]; layers without one get zeros, since what nobody sees must be numbers."""
        for module, layer in self.layers.items():
            prefix = prefixes.get(layer.place)
            for states, own in zip((self.keys, self.values), prefix or (None, None), strict=True):
                states[module][slots] = 0 if own is None else own.transpose(0, 1).to(states[module])

    def masks(self, length: int) -> Any:
        """See ``Stack.causal_masks``, for texts of at least this length; made anew for one longer than all before."""
        if length > self._masks[0]:
            longest = max(SHORTEST_MASK, 2 ** (length - 1).bit_length())
            self._masks = longest, self.stack.causal_masks(longest)
        return self._masks[1]

    @contextmanager
    def reading(self, pieces: Sequence[Piece]) -> Iterator[None]:
        """Let a forward of the pieces' tokens [1, N], one piece after the other, read on in their texts."""
        wrapper, longest = PooledAttention(self, pieces), max(len(piece.slots) for piece in pieces)

        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "attention_mask": self.masks(longest), "use_cache": False, WRAPPER: wrapper}

        handle = self.stack.module.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The next tokens of one text."""

    slots: Tensor
    """[T] of all tokens so far, the next ones at the end."""
    count: int
    """How many of them are next."""
    prefix: Tensor
    """[P] slots of the text's prefix."""
    places: frozenset[Place] = frozenset()
    """The layers that have the prefix."""
    seen_from: int = 0
    """The first token that sees the prefix."""


class PooledAttention:
    """An attention wrapper that writes a step's keys and values into the pool, and gives every group of texts a call of
    its own.

    Args:
        pool: the pool.
        pieces: the step's tokens, in their order.
    """

    def __init__(self, pool: Pool, pieces: Sequence[Piece]) -> None:
        self.pool = pool
        self.written = torch.cat([piece.slots[-piece.count :] for piece in pieces]).to(pool.device)
        ends = torch.tensor([piece.count for piece in pieces]).cumsum(0)
        lengths, counts = (torch.tensor(x) for x in ([len(p.slots) for p in pieces], [p.count for p in pieces]))
        self.groups = [
            _Group(pool, [pieces[i] for i in rows.tolist()], (ends - counts)[rows])
            for rows in alike_long(lengths, counts)
        ]
        self.order = order_of([(group.queries, group.is_query) for group in self.groups]).to(pool.device)
        """[N] where the groups' queries, one after the other, have each of the step's tokens."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no types here
    def __call__(
        self,
        attend: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        keys, values = self.pool.keys[module], self.pool.values[module]
        keys[self.written] = key[0].transpose(0, 1)
        values[self.written] = value[0].transpose(0, 1)
        outputs = [group(attend, module, query, keys, values, attention_mask, **kwargs) for group in self.groups]
        return torch.cat(outputs).index_select(0, self.order)[None], None


class _Group:
    """Texts of like length, whose attention runs together. What fills up shorter ones is seen by nobody.

    Args:
        pool: their pool.
        pieces: their next tokens.
        starts: [G] places of the first of these in the step.
    """

    def __init__(self, pool: Pool, pieces: Sequence[Piece], starts: Tensor) -> None:
        counts = torch.tensor([piece.count for piece in pieces])
        lengths = torch.tensor([len(piece.slots) for piece in pieces])
        offsets = torch.arange(int(counts.max()))
        self.is_query = offsets < counts[:, None]
        """[G, Q] which queries are no filling."""
        self.queries = starts[:, None] + offsets.minimum(counts[:, None] - 1)
        """[G, Q] places of the queries in the step."""
        self.numbers = (lengths - counts)[:, None] + offsets.minimum(counts[:, None] - 1)
        """[G, Q] which of its text's tokens a query is."""
        firsts = torch.stack([piece.slots[0] for piece in pieces])  # what fills up must be numbers
        texts = _filled([piece.slots for piece in pieces], firsts, front=False)
        own = _filled([piece.prefix for piece in pieces], firsts, front=True)
        self.slots = {False: texts.to(pool.device), True: torch.cat([own, texts], dim=1).to(pool.device)}
        """[G, S] slots of all keys, by whether a layer has a prefix."""
        # The pool brings the prefixes along: what counts of them here is their length.
        nothing = KeyValue(*[torch.empty(1, 1, own.shape[1], 0)] * 2)
        having = {layer.place: [layer.place in piece.places for piece in pieces] for layer in pool.layers.values()}
        prefixes = {module: nothing for module, layer in pool.layers.items() if any(having[layer.place])}
        seen = self._seen(pieces, own.shape[1]).to(pool.device)
        visible = {}
        for pattern in {tuple(having[pool.layers[module].place]) for module in prefixes}:
            visible[pattern] = seen & torch.tensor(pattern, device=pool.device)[:, None, None]
        self.wrapper = PrefixAttention(
            prefixes,
            visible={m: v for m in prefixes if not bool((v := visible[(*having[pool.layers[m].place],)]).all())},
            biases={},
            held=prefixes,
        )
        self._masks: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(
        self,
        attend: Attention,
        module: nn.Module,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """[G·Q, heads, V]"""
        slots = self.slots[module in self.wrapper.prefixes]
        states = (part.index_select(0, slots.flatten()).view(*slots.shape, *part.shape[1:]) for part in (keys, values))
        key, value = (part.transpose(1, 2) for part in states)
        own = take(query, self.queries.to(query.device))
        output, _ = self.wrapper(attend, module, own, key, value, self._mask(mask), **{**kwargs, "is_causal": False})
        return output.flatten(0, 1)

    def _seen(self, pieces: Sequence[Piece], length: int) -> Tensor:
        """[G, Q, P] which virtual tokens the queries see in layers that have them."""
        sizes = torch.tensor([len(piece.prefix) for piece in pieces])
        starts = torch.tensor([piece.seen_from for piece in pieces])
        is_real = torch.arange(length) >= length - sizes[:, None]
        return is_real[:, None, :] & (self.numbers >= starts[:, None])[:, :, None]

    def _mask(self, whole: Tensor) -> Tensor:
        """[G, 1, Q, T] what the queries see of the texts, by the mask [1, 1, L, L] of a long one; made once for all
        layers that share it."""
        if id(whole) not in self._masks:
            self._masks[id(whole)] = (whole, whole[0, 0, self.numbers, : self.slots[False].shape[1]][:, None])
        return self._masks[id(whole)][1]


def _filled(parts: Sequence[Tensor], fillings: Tensor, *, front: bool) -> Tensor:
    """[G, S] of lists of slots, shorter ones filled up with one of the fillings [G]."""
    width = max(len(part) for part in parts)
    filled = fillings[:, None].repeat(1, width)
    for row, part in zip(filled, parts, strict=True):
        first = width - len(part) if front else 0
        row[first : first + len(part)] = part
    return filled
