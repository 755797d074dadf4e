"""A pool for the keys and values of many sequences, and attention that continues any of them in one forward.

A pool has slots: one slot holds a token's keys and values in all layers. A sequence is a list of slots, and so is a
prefix, which all sequences of an adapter share. A step takes the next tokens of some sequences, such as one token of
the first and a hundred of the second, and packs them into one row of the layers. Only attention sees each sequence's
own keys. Nothing is padded, and nothing is moved when sequences come and go.

Letters: N tokens of a step, G sequences of a group, Q of their queries, T of their tokens, P virtual tokens of a
prefix, S = P + T keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softtune.backbone import AttentionLayer, Backbone, Place
from softtune.backbone.interface import WRAPPER, takes_any_mask
from softtune.errors import UnsupportedModelError
from softtune.injection.attention_terms import TermAttention, Terms
from softtune.injection.attention_wrapper import PrefixAttention
from softtune.injection.grouped_attention import GroupedAttention, RowGroup, alike_long
from softtune.methods.prompt import KeyValue

SHORTEST_MASK = 64
"""Smallest number of tokens that a mask is made for."""


class KVPool:
    """Preallocated keys and values of sequences and prefixes.

    Args:
        backbone: the base model, a decoder.
        slots: number of tokens that the pool has room for.

    Raises:
        UnsupportedModelError: the model's layers do not take tokens of several sequences in one row.
    """

    def __init__(self, backbone: Backbone, slots: int) -> None:
        stack = backbone.stacks[0]
        if not backbone.packs or not takes_any_mask(stack.module.config):
            raise UnsupportedModelError(
                f"{type(backbone.model).__name__} cannot read several texts without padding",
                "use a decoder whose every layer attends, loaded with attn_implementation='sdpa' or 'eager'",
            )
        self.stack = stack
        self.layers: dict[nn.Module, AttentionLayer] = {a.module: a for a in backbone.attention_layers if a.module}
        dtype, device = stack.module.dtype, stack.device
        # On a CPU, memory that has not been written to takes no space.
        layers = self.layers.items()
        where: dict[str, Any] = {"dtype": dtype, "device": device}
        self.keys = {module: torch.empty(slots, a.heads, a.key_size, **where) for module, a in layers}
        self.values = {module: torch.empty(slots, a.heads, a.value_size, **where) for module, a in layers}
        self._free = list(range(slots - 1, -1, -1))
        self.device = device
        self._masks: tuple[int, Any] = (0, None)

    @property
    def num_free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    @property
    def token_bytes(self) -> int:
        """Bytes of one slot in all layers."""
        return sum(t[0].nbytes for t in (*self.keys.values(), *self.values.values()))

    def allocate(self, count: int) -> Tensor:
        """[count] newly allocated slots. At least ``count`` must be free."""
        assert count <= self.num_free
        remaining = len(self._free) - count
        taken, self._free = self._free[remaining:], self._free[:remaining]
        return torch.tensor(taken[::-1], dtype=torch.long)

    def free(self, slots: Tensor) -> None:
        """Return slots to the pool."""
        self._free += slots.flip(0).tolist()

    def write_prefix(self, prefixes: Mapping[Place, KeyValue], slots: Tensor) -> None:
        """Write a prefix into slots [P]; layers without one get zeros, since masked keys and values must not be NaN."""
        slots = slots.to(self.device)
        for module, layer in self.layers.items():
            prefix = prefixes.get(layer.place)
            for states, part in zip((self.keys, self.values), prefix or (None, None), strict=True):
                states[module][slots] = 0 if part is None else part.transpose(0, 1).to(states[module])

    def masks(self, length: int) -> Any:
        """Masks of ``Stack.causal_masks`` for at least this length; made again for one longer than all before."""
        if length > self._masks[0]:
            longest = max(SHORTEST_MASK, 2 ** (length - 1).bit_length())
            self._masks = longest, self.stack.causal_masks(longest)
        return self._masks[1]

    @contextmanager
    def reading(
        self, pieces: Sequence[PooledSequence], terms: Sequence[Terms] = (), rows: Tensor | None = None
    ) -> Iterator[None]:
        """Let a forward of the pieces' tokens [1, N], concatenated, continue their sequences, in a model session.

        Args:
            pieces: the next tokens of each sequence.
            terms: what each adapter adds to the outputs of attention.
            rows: [N] index of each token's adapter; None where there is only one.
        """
        pooled = PooledAttention(self, pieces)
        wrapper = TermAttention(pooled, terms, rows, packed=True) if any(terms) else pooled
        longest = max(len(piece.slots) for piece in pieces)

        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "attention_mask": self.masks(longest), "use_cache": False, WRAPPER: wrapper}

        handle = self.stack.module.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class PooledSequence:
    """The next tokens of one sequence."""

    slots: Tensor
    """[T] slots of all tokens so far, the next ones at the end."""
    count: int
    """Number of next tokens."""
    prefix: Tensor
    """[P] slots of the sequence's prefix."""
    places: frozenset[Place] = frozenset()
    """The layers that have the prefix."""
    seen_from: int = 0
    """Index of the first token that sees the prefix."""


class PooledAttention(GroupedAttention):
    """An attention wrapper that writes a step's keys and values into the pool, and reads each sequence's own from it.

    Args:
        pool: the pool.
        pieces: the next tokens of each sequence, in the step's order.
    """

    def __init__(self, pool: KVPool, pieces: Sequence[PooledSequence]) -> None:
        self.pool = pool
        self.written = torch.cat([piece.slots[-piece.count :] for piece in pieces]).to(pool.device)
        ends = torch.tensor([piece.count for piece in pieces]).cumsum(0)
        lengths, counts = (torch.tensor(x) for x in ([len(p.slots) for p in pieces], [p.count for p in pieces]))
        self.pooled = [
            PooledGroup.from_pieces(pool, [pieces[i] for i in rows.tolist()], (ends - counts)[rows])
            for rows in alike_long(lengths, counts)
        ]
        super().__init__([(group, group.wrapper) for group in self.pooled], pool.device)

    def keys_and_values(self, module: nn.Module, key: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``GroupedAttention``; keys of prefixes stand in front of the tokens' own."""
        keys, values = self.pool.keys[module], self.pool.values[module]
        keys[self.written] = key[0].transpose(0, 1)
        values[self.written] = value[0].transpose(0, 1)
        for group in self.pooled:
            slots = group.slots[module in group.wrapper.prefixes]
            yield _read(keys, slots), _read(values, slots)


@dataclass(frozen=True, kw_only=True, eq=False)
class PooledGroup(RowGroup):
    """The next tokens of sequences of similar length."""

    slots: dict[bool, Tensor]
    """[G, S] slots of all keys, by whether a layer has a prefix: S = T, or P + T."""
    wrapper: PrefixAttention

    @classmethod
    def from_pieces(cls, pool: KVPool, pieces: Sequence[PooledSequence], starts: Tensor) -> PooledGroup:
        """Make a group of sequences.

        Args:
            pool: their pool.
            pieces: their next tokens.
            starts: [G] index in the step of each sequence's first next token.
        """
        counts = torch.tensor([piece.count for piece in pieces])
        lengths = torch.tensor([len(piece.slots) for piece in pieces])
        offsets = torch.arange(int(counts.max()))
        numbers = (lengths - counts)[:, None] + offsets.minimum(counts[:, None] - 1)
        firsts = torch.stack([piece.slots[0] for piece in pieces])  # the padding must not be NaN
        texts = _filled([piece.slots for piece in pieces], firsts, front=False)
        prefixes = _filled([piece.prefix for piece in pieces], firsts, front=True)
        return cls(
            queries=starts[:, None] + offsets.minimum(counts[:, None] - 1),
            numbers=numbers,
            is_query=offsets < counts[:, None],
            length=texts.shape[1],
            slots={False: texts.to(pool.device), True: torch.cat([prefixes, texts], dim=1).to(pool.device)},
            wrapper=_showing(pool, pieces, _seen(pieces, numbers, prefixes.shape[1])),
        )


def _showing(pool: KVPool, pieces: Sequence[PooledSequence], seen: Tensor) -> PrefixAttention:
    """The wrapper that shows prefixes to the queries that see them [G, Q, P], in the layers that have them."""
    # The keys from the pool contain the prefixes already: only their length matters here.
    nothing = KeyValue(*[torch.empty(1, 1, seen.shape[2], 0)] * 2)
    having = {layer.place: tuple(layer.place in piece.places for piece in pieces) for layer in pool.layers.values()}
    prefixes = {module: nothing for module, layer in pool.layers.items() if any(having[layer.place])}
    visible = {
        pattern: seen & torch.tensor(pattern)[:, None, None]
        for pattern in {having[pool.layers[module].place] for module in prefixes}
    }
    hiding = {pattern: shown.to(pool.device) for pattern, shown in visible.items() if not bool(shown.all())}
    patterns = {module: having[pool.layers[module].place] for module in prefixes}
    hidden = {module: hiding[pattern] for module, pattern in patterns.items() if pattern in hiding}
    return PrefixAttention(prefixes, visible=hidden, biases={}, cached=prefixes)


def _seen(pieces: Sequence[PooledSequence], numbers: Tensor, length: int) -> Tensor:
    """[G, Q, P] which virtual tokens queries with these numbers [G, Q] see in layers that have a prefix."""
    sizes = torch.tensor([len(piece.prefix) for piece in pieces])
    starts = torch.tensor([piece.seen_from for piece in pieces])
    is_real = torch.arange(length) >= length - sizes[:, None]
    return is_real[:, None, :] & (numbers >= starts[:, None])[:, :, None]


def _read(states: Tensor, slots: Tensor) -> Tensor:
    """[G, H, S, K] the states of slots [G, S]."""
    return states.index_select(0, slots.flatten()).view(*slots.shape, *states.shape[1:]).transpose(1, 2)


def _filled(parts: Sequence[Tensor], fillings: Tensor, *, front: bool) -> Tensor:
    """[G, S] lists of slots, each padded to the longest with its filling out of [G]."""
    width = max(len(part) for part in parts)
    filled = fillings[:, None].repeat(1, width)
    for row, part in zip(filled, parts, strict=True):
        first = width - len(part) if front else 0
        row[first : first + len(part)] = part
    return filled
