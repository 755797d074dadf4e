"""Passes prefixes to a stack's attention layers: by the attention interface, or as a cache where there is none.

Letters: B rows, T queries, P virtual tokens of a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softtune import compat
from softtune.backbone import AttentionLayer, Site, Stack
from softtune.errors import UnsupportedModelError
from softtune.injection.arrangement import Arrangement
from softtune.injection.attention_terms import TermAttention
from softtune.injection.attention_wrapper import PrefixAttention
from softtune.injection.cache import PrefixCache, own_cache
from softtune.injection.graphs import holds
from softtune.injection.layout import Layout, row_starts
from softtune.injection.masks import widen
from softtune.injection.pack import PackedAttention
from softtune.injection.rows import Lengths, RowPrompts
from softtune.injection.step import Call


@dataclass(frozen=True)
class Prefixes:
    """The prefixes of one stack's calls."""

    stack: Stack
    layers: Sequence[AttentionLayer]
    """The stack's attention layers that get a prefix."""

    def attention(self, arrangement: Arrangement, **options: Any) -> PrefixAttention:
        """The attention wrapper that adds each row's prefixes."""
        prefixes = {a.module: arrangement.prompts.prefixes[a.place] for a in self.layers if a.module is not None}
        visible, biases = self._visible(arrangement), self._biases(arrangement)
        crossing = {a.module for a in self.layers if a.module is not None and a.site is Site.CROSS}
        return PrefixAttention(prefixes, visible=visible, biases=biases, crossing=crossing, **options)

    def add_cache(self, call: Call, arrangement: Arrangement) -> None:
        """Pass the prefix as a cache, to layers that call no attention wrapper."""
        step, row_prompts = arrangement.step, arrangement.prompts
        prefixes = [row_prompts.prefixes[a.place] for a in self.layers]
        self._check_rows(row_prompts)
        is_prefix = row_prompts.is_prefix.get(row_prompts.lengths[self.layers[0].place])
        mask, layout = call.get("attention_mask"), None
        if mask is None and is_prefix is not None:
            mask = step.full_mask()
        if step.has_ready_mask and mask is not None:
            visible = None if is_prefix is None else is_prefix[:, None]
            call["attention_mask"] = widen(mask, visible, prefixes[0].key.shape[2])
        elif mask is not None:
            starts = row_starts(mask, step.rows, step.device)
            columns = starts[:, None].expand(-1, prefixes[0].key.shape[2])
            is_prefix = torch.ones_like(columns, dtype=torch.bool) if is_prefix is None else is_prefix
            beside = Layout.from_columns(starts, mask.shape[1], columns, is_prefix, causal=True)
            call["attention_mask"] = beside.merge(mask, is_prefix)
            layout = beside if holds(starts.any(), when_exporting=True) else None
        call["cache"] = PrefixCache(prefixes, own_cache(self.stack.module, call), layout)

    def _check_rows(self, row_prompts: RowPrompts) -> None:
        """Check that each row's text starts behind the whole prefix, where the model counts by the cache's length.

        Raises:
            UnsupportedModelError: a row's prefix is shorter, or takes no positions.
        """
        counts_itself = self.stack.position_table is not None
        goes_by_length = counts_itself or compat.has_picture_in_cache(self.stack.module)
        others = (row_prompts.shift != max(row_prompts.lengths[self.layers[0].place])).any()
        if goes_by_length and holds(others, when_exporting=False):
            raise UnsupportedModelError(
                f"{type(self.stack.module).__name__} goes by the length of its cache",
                "run rows with other prefixes in batches of their own, and leave out shift_positions",
            )

    def _visible(self, arrangement: Arrangement) -> dict[nn.Module, Tensor]:
        """[B or 1, T or 1, P] which tokens see a module's prefix; no entry where all see all of it."""
        step, row_prompts, layout = arrangement.step, arrangement.prompts, arrangement.layout
        queries = None
        if row_prompts.has_infix and not step.is_continued:
            # The token that the answer is predicted from is the first to see an infix.
            queries = (
                step.is_from(arrangement.columns.infix_column(step, row_prompts) - 1) | ~row_prompts.after_text[:, None]
            )
            queries = queries if layout is None else layout.merge(queries, row_prompts.is_vector)
        by_lengths: dict[Lengths, Tensor] = {}
        for lengths in {*row_prompts.lengths.values()}:
            keys = row_prompts.is_prefix.get(lengths)
            if keys is None and queries is not None:
                keys = torch.ones(1, max(lengths), dtype=torch.bool, device=step.device)
            if keys is not None:
                by_lengths[lengths] = keys[:, None, :] if queries is None else queries[:, :, None] & keys[:, None, :]
        pairs = [(a.module, by_lengths.get(row_prompts.lengths[a.place])) for a in self.layers]
        return {module: seen for module, seen in pairs if module is not None and seen is not None}

    def _biases(self, arrangement: Arrangement) -> dict[nn.Module, Tensor]:
        """[B, heads, T, P] T5's position biases of the prefix, for each self-attention module."""
        self_attention = [a for a in self.layers if a.site is self.stack.site and a.module is not None]
        if not self_attention or self.stack.relative_bias is None:
            return {}
        positions = arrangement.step.positions()
        positions = positions if arrangement.layout is None else arrangement.layout.merge_positions(positions)
        kinds = {
            a.module: (self.stack.bias_owner(a.module), max(arrangement.prompts.lengths[a.place]))
            for a in self_attention
            if a.module
        }
        biases = {kind: self.stack.prefix_bias(kind[0], positions, kind[1]) for kind in {*kinds.values()}}
        return {module: biases[kind] for module, kind in kinds.items()}


def check_reached(
    stack: Stack,
    layers: Sequence[AttentionLayer],
    wrapper: PrefixAttention | PackedAttention | TermAttention,
    call: Call,
) -> None:
    """Check that each layer for which there is a prompt has called the wrapper, unless layers are dropped at random.

    Raises:
        UnsupportedModelError: a layer has not.
    """
    crossing = call.get("encoder_hidden_states") is not None
    expected = {id(a.module) for a in layers if a.site is not Site.CROSS or crossing}
    if expected - wrapper.reached and not stack.drops_layers:
        raise UnsupportedModelError(
            "the prompt did not reach every layer", "add the adapter after all changes to the base model's modules"
        )
