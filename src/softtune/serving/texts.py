"""Texts that a decoder reads in a pool, some tokens of some of them in each step.

Letters: N tokens of a step, R rows of logits, V words, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softtune.backbone import Backbone, Place, turn
from softtune.injection.modules import Additions, ModuleChanges
from softtune.injection.pool import Piece, Pool
from softtune.methods.base import Prompt


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """An adapter's prompt, its prefix in the pool."""

    slots: Tensor
    """[P] of the prefix."""
    places: frozenset[Place]
    """The layers that have it."""
    shift: int
    """Positions that it takes."""
    vectors: Tensor | None
    """[P, D] virtual tokens among the words."""
    after_text: bool
    """Whether virtual tokens stand behind the text."""
    additions: Additions

    @classmethod
    def of(cls, pool: Pool, prompt: Prompt) -> Held:
        """Put a prompt's prefix into the pool, which has room for it."""
        slots = pool.take(prompt.num_virtual_tokens if prompt.prefixes else 0)
        if prompt.prefixes:
            pool.hold(prompt.prefixes, slots)
        return cls(
            slots=slots,
            places=frozenset(prompt.prefixes),
            shift=len(slots) if prompt.shifts_positions else 0,
            vectors=prompt.vectors,
            after_text=prompt.after_text,
            additions=prompt.additions,
        )


VIRTUAL = -1
"""Less than this number are the virtual tokens among a text's: -1 - n is the vector n."""


@dataclass(eq=False)
class Text:
    """A text of an adapter, and how much of it has been read."""

    held: Held
    tokens: list[int]
    """Words, and virtual tokens among them."""
    end: int
    """Where the answer begins, among the tokens."""
    slots: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """Of the tokens that have been read."""

    @classmethod
    def of(cls, held: Held, words: Sequence[int], places: Sequence[int] | None = None) -> Text:
        """The words of a text, with the adapter's virtual tokens among them: before the words of the given numbers, or
        by default at the text's beginning or end."""
        if held.vectors is None:
            return cls(held, [*words], len(words))
        if places is None:
            places = [len(words) if held.after_text else 0] * len(held.vectors)
        tokens: list[int] = []
        virtual = iter(range(len(places)))
        for number in range(len(words) + 1):
            tokens += [VIRTUAL - next(virtual) for place in places if place == number]
            tokens += words[number : number + 1]
        return cls(held, tokens, len(tokens))

    @property
    def pending(self) -> int:
        """Tokens that have not been read."""
        return len(self.tokens) - len(self.slots)

    def positions(self, first: int, count: int) -> list[int]:
        """Of ``count`` tokens from the number ``first`` on, without what the stack counts from."""
        behind = self.end if self.held.after_text else 0
        return [number + (self.held.shift if number >= behind else 0) for number in range(first, first + count)]

    def piece(self, count: int) -> Piece:
        """The last ``count`` tokens that have slots, as the pool reads them."""
        held = self.held
        seen_from = max(self.end - 1, 0) if held.after_text else 0
        return Piece(slots=self.slots, count=count, prefix=held.slots, places=held.places, seen_from=seen_from)


@dataclass(frozen=True, eq=False)
class Reading:
    """What a step reads of one text."""

    text: Text
    count: int
    """How many of its pending tokens."""
    keep: int
    """Of how many of these, the last ones, logits are wanted."""


@torch.no_grad()
def read(backbone: Backbone, pool: Pool, readings: Sequence[Reading]) -> list[Tensor]:
    """Read on in some texts.

    Args:
        backbone: the base model.
        pool: with as many free slots as tokens are read.
        readings: what to read.

    Returns:
        For each reading the logits [keep, V].
    """
    ids, positions, pieces, kept = list[int](), list[int](), list[Piece](), list[int]()
    for reading in readings:
        text, first = reading.text, len(reading.text.slots)
        text.slots = torch.cat([text.slots, pool.take(reading.count)])
        ids += text.tokens[first : first + reading.count]
        positions += text.positions(first, reading.count)
        pieces.append(text.piece(reading.count))
        kept += range(len(ids) - reading.keep, len(ids))
    owners = [reading.text.held for reading in readings for _ in range(reading.count)]
    device = backbone.model.device
    call: dict[str, Any] = {
        **_words(backbone, torch.tensor([ids]), owners),
        "position_ids": torch.tensor([positions], device=device) + backbone.stacks[0].first_position,
        "logits_to_keep": torch.tensor(kept, dtype=torch.long, device=device),
    }
    with turn(backbone.model) as own:
        own.attach(partial(pool.reading, pieces))
        own.attach(_changes(backbone, owners).acting)
        logits = backbone.model(**call, use_cache=False).logits[0]
    return list(logits.split([reading.keep for reading in readings]))


def _words(backbone: Backbone, ids: Tensor, owners: Sequence[Held]) -> dict[str, Tensor]:
    """Words [1, N], or vectors [1, N, D] where there are virtual tokens among them."""
    places = (ids[0] <= VIRTUAL).nonzero().flatten().tolist()
    words = ids.clamp(min=0).to(backbone.model.device)
    if not places:
        return {"input_ids": words}
    vectors = backbone.stacks[0].embed(words)
    for place in places:
        own = owners[place].vectors
        assert own is not None
        vectors[0, place] = own[VIRTUAL - int(ids[0, place])]
    return {"inputs_embeds": vectors}


def _changes(backbone: Backbone, owners: Sequence[Held]) -> ModuleChanges:
    """What adapters add to the outputs of modules for each token."""
    if not any(held.additions for held in owners):
        return ModuleChanges(backbone, [], [])
    numbers = {held: number for number, held in enumerate(dict.fromkeys(owners))}
    rows = torch.tensor([numbers[held] for held in owners]) if len(numbers) > 1 else None
    return ModuleChanges(backbone, [held.additions for held in numbers], [{}] * len(numbers), rows)
