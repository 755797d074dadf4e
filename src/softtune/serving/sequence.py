"""Sequences with keys and values in the KV pool, and the forward pass that runs chunks of several of them.

Letters: N tokens of a step, P virtual tokens, V vocabulary size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softtune.backbone import Backbone, Place, model_session
from softtune.injection.attention_terms import Terms, layer_terms
from softtune.injection.kv_pool import KVPool, PooledSequence
from softtune.injection.modules import Additions, ModuleChanges, Scalings
from softtune.methods.prompt import Prompt


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedPrompt:
    """An adapter's prompt, with its prefix in the KV pool."""

    slots: Tensor
    """[P] KV slots of the prefix; empty where there is none."""
    places: frozenset[Place]
    """The layers that have it."""
    shift: int
    """Number of positions that the prefix takes."""
    vectors: Tensor | None
    """[P, D] virtual tokens among a text's tokens."""
    after_text: bool
    """Whether virtual tokens follow the text."""
    additions: Additions
    scalings: Scalings = ()
    terms: Terms = field(default_factory=dict)
    """What is added to the outputs of attention layers."""

    @classmethod
    def from_prompt(cls, pool: KVPool, prompt: Prompt) -> LoadedPrompt:
        """Write a prompt's prefix into the KV pool, which must have room for it."""
        slots = pool.allocate(prompt.prefix_length)
        if prompt.prefixes:
            pool.write_prefix(prompt.prefixes, slots)
        return cls(
            slots=slots,
            places=frozenset(prompt.prefixes),
            shift=len(slots) if prompt.shifts_positions else 0,
            vectors=prompt.vectors,
            after_text=prompt.after_text,
            additions=prompt.additions,
            terms=layer_terms(prompt, [*pool.layers.values()]),
            scalings=prompt.scalings,
        )


VIRTUAL = -1
"""Token ids up to this one stand for virtual tokens: -1 - n for the vector n."""


@dataclass(eq=False)
class TokenSequence:
    """A request's sequence of tokens, and the KV slots of those that have been run."""

    prompt: LoadedPrompt
    tokens: list[int]
    """Token ids, with virtual tokens among them."""
    end: int
    """Index among the tokens where the answer begins."""
    slots: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """KV slots of the tokens that have been run."""

    @classmethod
    def from_input_ids(
        cls, prompt: LoadedPrompt, input_ids: Sequence[int], places: Sequence[int] | None = None
    ) -> TokenSequence:
        """A text with the adapter's virtual tokens, each before the token id at its index in ``places``.

        By default they stand at the text's beginning or end.
        """
        if prompt.vectors is None:
            return cls(prompt, [*input_ids], len(input_ids))
        if places is None:
            places = [len(input_ids) if prompt.after_text else 0] * len(prompt.vectors)
        tokens: list[int] = []
        virtual = iter(range(len(places)))
        for number in range(len(input_ids) + 1):
            tokens += [VIRTUAL - next(virtual) for place in places if place == number]
            tokens += input_ids[number : number + 1]
        return cls(prompt, tokens, len(tokens))

    @property
    def num_pending_tokens(self) -> int:
        """Number of tokens that have not been run."""
        return len(self.tokens) - len(self.slots)

    def positions(self, first: int, count: int) -> list[int]:
        """Positions of ``count`` tokens from index ``first`` on, without the stack's ``first_position``."""
        behind = self.end if self.prompt.after_text else 0
        return [number + (self.prompt.shift if number >= behind else 0) for number in range(first, first + count)]

    def piece(self, count: int) -> PooledSequence:
        """The last ``count`` tokens that have slots, as the KV pool takes them."""
        prompt = self.prompt
        seen_from = max(self.end - 1, 0) if prompt.after_text else 0
        return PooledSequence(
            slots=self.slots, count=count, prefix=prompt.slots, places=prompt.places, seen_from=seen_from
        )


@dataclass(frozen=True, eq=False)
class ScheduledChunk:
    """The tokens of one sequence that a step runs."""

    sequence: TokenSequence
    count: int
    """Number of its pending tokens to run."""
    keep: int
    """Number of last tokens among these whose logits are returned."""


@torch.no_grad()
def run_chunks(backbone: Backbone, pool: KVPool, chunks: Sequence[ScheduledChunk]) -> list[Tensor]:
    """Run chunks of several sequences in one forward pass.

    Args:
        backbone: the base model.
        pool: the KV pool, with a free slot for each token to run.
        chunks: the chunks.

    Returns:
        For each chunk the logits [keep, V].
    """
    ids, positions, pieces, logits_to_keep = list[int](), list[int](), list[PooledSequence](), list[int]()
    for chunk in chunks:
        sequence, first = chunk.sequence, len(chunk.sequence.slots)
        sequence.slots = torch.cat([sequence.slots, pool.allocate(chunk.count)])
        ids += sequence.tokens[first : first + chunk.count]
        positions += sequence.positions(first, chunk.count)
        pieces.append(sequence.piece(chunk.count))
        logits_to_keep += range(len(ids) - chunk.keep, len(ids))
    prompts = [chunk.sequence.prompt for chunk in chunks for _ in range(chunk.count)]
    device = backbone.device
    call: dict[str, Any] = {
        **_inputs(backbone, torch.tensor([ids]), prompts),
        "position_ids": torch.tensor([positions], device=device) + backbone.stacks[0].first_position,
        "logits_to_keep": torch.tensor(logits_to_keep, dtype=torch.long, device=device),
    }
    changes = any(prompt.additions or prompt.scalings or prompt.terms for prompt in prompts)
    distinct, rows = _distinct(prompts, device) if changes else ([], None)
    with model_session(backbone.model) as session:
        session.attach(partial(pool.reading, pieces, [prompt.terms for prompt in distinct], rows))
        session.attach(_changes(backbone, distinct, rows).applied)
        logits = backbone.model(**call, use_cache=False).logits[0]
    return list(logits.split([chunk.keep for chunk in chunks]))


def _inputs(backbone: Backbone, ids: Tensor, prompts: Sequence[LoadedPrompt]) -> dict[str, Tensor]:
    """``input_ids`` [1, N], or ``inputs_embeds`` [1, N, D] where there are virtual tokens among them."""
    places = (ids[0] <= VIRTUAL).nonzero().flatten().tolist()
    input_ids = ids.clamp(min=0).to(backbone.device)
    if not places:
        return {"input_ids": input_ids}
    vectors = backbone.stacks[0].embed(input_ids)
    for place in places:
        virtual_tokens = prompts[place].vectors
        assert virtual_tokens is not None
        vectors[0, place] = virtual_tokens[VIRTUAL - int(ids[0, place])]
    return {"inputs_embeds": vectors}


def _distinct(prompts: Sequence[LoadedPrompt], device: torch.device) -> tuple[list[LoadedPrompt], Tensor | None]:
    """The distinct prompts of tokens, and [N] the index of each token's among them; None where there is only one."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    rows = [numbers[prompt] for prompt in prompts]
    return list(numbers), torch.tensor(rows, device=device) if len(numbers) > 1 else None


def _changes(backbone: Backbone, prompts: Sequence[LoadedPrompt], rows: Tensor | None) -> ModuleChanges:
    """The adapters' changes at modules, for each token."""
    additions, scalings = [prompt.additions for prompt in prompts], [prompt.scalings for prompt in prompts]
    return ModuleChanges(backbone, additions, [{}] * len(prompts), rows, scalings=scalings)
