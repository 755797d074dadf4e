"""The prompts of a batch's rows in one stack: stacked, padded to the longest, and selected row by row.

Letters: R prompts (before ``pick``) or rows of a batch (after it), N virtual tokens at the input, P virtual tokens of a
prefix, H key/value heads, K key size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from softtune.backbone import AttentionLayer, Place, Stack
from softtune.errors import DataError
from softtune.methods.prompt import KeyValue, Prompt

Lengths = tuple[int, ...]
"""How many virtual tokens each prompt has in one layer."""


@dataclass(frozen=True, kw_only=True)
class RowPrompts:
    """Each row's prompt. Shorter prompts are padded: prefixes in front, so that they end next to the text; virtual
    tokens at the input where padding does no harm, before a causal model's text and behind an encoder's."""

    vectors: Tensor | None
    """[R, N, D] virtual tokens at the input; None where no row has any."""
    is_vector: Tensor
    """[R, N] which of them are not padding."""
    prefixes: Mapping[Place, KeyValue]
    """Keys [R, H, P, K] and values in front of a layer's own."""
    lengths: Mapping[Place, Lengths]
    is_prefix: Mapping[Lengths, Tensor]
    """[R, P] which virtual tokens of layers with these lengths are neither padding nor hidden; no entry where none
    is."""
    after_text: Tensor
    """[R] whether the virtual tokens stand behind the text."""
    shift: Tensor
    """[R] number of positions that a row's prefix takes."""
    has_suffix: bool
    """Whether any row's virtual tokens stand behind the text."""
    has_infix: bool
    """Whether any row has an infix: a prefix behind the text."""
    is_ragged: bool
    """Whether any virtual token at the input is padding."""
    shifts: bool
    """Whether any row's prefix takes positions."""

    @classmethod
    def from_prompts(
        cls, prompts: Sequence[Prompt], layers: Sequence[AttentionLayer], stack: Stack, *, reads: bool
    ) -> RowPrompts:
        """Stack prompts.

        Args:
            prompts: R of them, one for each adapter of the batch.
            layers: the stack's attention layers that get a prefix from any of them.
            stack: the stack.
            reads: whether it reads the input, where ``vectors`` go.
        """
        device = _device(prompts)
        counts = [len(p.vectors) if reads and p.vectors is not None else 0 for p in prompts]
        has_prefix = [any(a.place in p.prefixes for a in layers if a.site is stack.site) for p in prompts]
        shift = [p.prefix_length if h and p.shifts_positions else 0 for p, h in zip(prompts, has_prefix, strict=True)]
        lengths = {a.place: tuple(_length(p, a) for p in prompts) for a in layers}
        return cls(
            vectors=_stack_vectors(prompts, counts, front=stack.is_causal) if any(counts) else None,
            is_vector=_is_real(counts, device, front=stack.is_causal),
            prefixes={a.place: _stack_prefixes(prompts, a) for a in layers},
            lengths=lengths,
            is_prefix={n: _is_real(n, device, front=True) for n in lengths.values() if len(set(n)) > 1},
            after_text=torch.tensor([p.after_text for p in prompts], device=device),
            shift=torch.tensor(shift, device=device),
            has_suffix=any(p.after_text for p in prompts),
            has_infix=any(p.after_text and bool(p.prefixes) for p in prompts),
            is_ragged=len(set(counts)) > 1,
            shifts=any(shift),
        )

    def pick(self, rows: Tensor) -> RowPrompts:
        """Select each row's prompt by its index in ``rows`` [B]. Views, where all rows have the same one."""

        def one(x: Tensor) -> Tensor:
            return x.expand(len(rows), *x.shape[1:]) if len(x) == 1 else x.index_select(0, rows.to(x.device))

        return replace(
            self,
            vectors=None if self.vectors is None else one(self.vectors),
            is_vector=one(self.is_vector),
            prefixes={place: KeyValue(one(prefix.key), one(prefix.value)) for place, prefix in self.prefixes.items()},
            is_prefix={lengths: one(real) for lengths, real in self.is_prefix.items()},
            after_text=one(self.after_text),
            shift=one(self.shift),
        )

    def seeing(self, shown: Tensor) -> RowPrompts:
        """The prompts of B rows that see of their prefixes the virtual tokens ``shown`` [B, P] alone; those of shorter
        prefixes are the last columns."""
        is_prefix = {}
        for lengths in {*self.lengths.values()}:
            own, real = shown[:, shown.shape[1] - max(lengths) :], self.is_prefix.get(lengths)
            is_prefix[lengths] = own if real is None else own & real
        return replace(self, is_prefix=is_prefix)


def _device(prompts: Sequence[Prompt]) -> torch.device:
    parts = [p.vectors for p in prompts] + [kv.key for p in prompts for kv in p.prefixes.values()]
    parts += [part for p in prompts for part in (*p.memories.values(), *(kv.key for kv in p.gated.values()))]
    parts += [tensor for p in prompts for _, tensor in (*p.additions, *p.scalings)]
    return next((part.device for part in parts if part is not None), torch.device("cpu"))


def _length(prompt: Prompt, layer: AttentionLayer) -> int:
    return prompt.prefixes[layer.place].key.shape[1] if layer.place in prompt.prefixes else 0


def _is_real(counts: Sequence[int], device: torch.device, *, front: bool) -> Tensor:
    """[R, longest] which places are not padding, where the padding is in front or behind."""
    places = torch.arange(max(counts), device=device)
    sizes = torch.tensor(counts, device=device)[:, None]
    return places >= max(counts) - sizes if front else places < sizes


def _stack_vectors(prompts: Sequence[Prompt], counts: Sequence[int], *, front: bool) -> Tensor:
    """[R, N, D], padded with zeros."""
    some = next(p.vectors for p in prompts if p.vectors is not None)
    parts = [some[:0] if p.vectors is None else p.vectors for p in prompts]
    return torch.stack([_fill(part, max(counts), front=front) for part in parts])


def _stack_prefixes(prompts: Sequence[Prompt], layer: AttentionLayer) -> KeyValue:
    """Keys [R, H, P, K] and values, padded with zeros."""
    pairs = [p.prefixes.get(layer.place) for p in prompts]
    some = next(pair for pair in pairs if pair is not None)
    length = max(pair.key.shape[1] for pair in pairs if pair is not None)
    pairs = [KeyValue(some.key[:, :0], some.value[:, :0]) if pair is None else pair for pair in pairs]
    keys, values = ([_fill(part, length, front=True) for part in parts] for parts in zip(*pairs, strict=True))
    return KeyValue(torch.stack(keys), torch.stack(values))


def _fill(part: Tensor, length: int, *, front: bool) -> Tensor:
    """[..., length, N] from [..., n, N], padded with zeros in front or behind."""
    missing = length - part.shape[-2]
    return F.pad(part, (0, 0, missing, 0) if front else (0, 0, 0, missing)) if missing else part


def multiplied(per_row: Tensor, rows: int) -> Tensor:
    """Repeat what is given for each row of the batch for ``rows`` rows: beams and returned sequences multiply them.

    Raises:
        DataError: ``rows`` is no multiple of the rows given.
    """
    if rows % len(per_row):
        raise DataError(
            f"the batch has {rows} rows, adapter_names or prompt_positions {len(per_row)}", "give one a row"
        )
    return per_row.repeat_interleave(rows // len(per_row), dim=0)
