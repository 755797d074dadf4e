"""Plans a call of one stack: which arguments its layers get, so that each row's prompt reaches them.

A plan is made before the layers run, from the call and the batch's prompts alone, and nothing of it changes afterwards.
Planning changes nothing of the caller's but an empty cache, which gets room for the prompt when all else is checked.
Letters: B rows, T tokens of this call, P virtual tokens, N tokens of a pack, W columns of the whole attention mask, S
slots that the layers see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softtune import compat
from softtune.backbone import Backbone, Site, Stack, is_reentrant
from softtune.backbone.interface import IN_TRAINING, WRAPPER
from softtune.errors import UnsupportedModelError
from softtune.injection.arrangement import Arrangement
from softtune.injection.attention_terms import TermAttention, layer_terms
from softtune.injection.attention_wrapper import PrefixAttention
from softtune.injection.cache import as_long_as, begin_with, make_room, own_cache, virtual_slots
from softtune.injection.columns import Columns
from softtune.injection.frozen_layer_cache import FrozenLayerCache
from softtune.injection.graphs import holds, is_exporting
from softtune.injection.layout import Layout
from softtune.injection.pack import Pack, PackedAttention, can_pack
from softtune.injection.positions import Positions
from softtune.injection.prefix_mask import PrefixMask
from softtune.injection.prefixes import Prefixes
from softtune.injection.reentrant import Anchor
from softtune.injection.rows import RowPrompts, multiplied
from softtune.injection.step import Call, Step, features_of, masks_of
from softtune.injection.trim import Trim
from softtune.methods.prompt import Prompt


@dataclass(frozen=True)
class OuterCall:
    """What the caller gave the model around the stack, which may make something else of it for the stack."""

    attention_mask: Any = None
    has_positions: bool = True
    """Whether there were position ids, so that the model has not made them itself."""


@dataclass(frozen=True, kw_only=True)
class CallPlan:
    """One call of a stack: its new arguments, and all that restores its outputs."""

    call: Call
    """The arguments by softtune's names."""
    arrangement: Arrangement
    shortened: Trim | Pack | None
    """The columns that the layers do not see, or the pack in place of rows and columns."""
    wrapper: PrefixAttention | PackedAttention | TermAttention | None
    anchor: Anchor | None
    """Passes gradients to the prompts through reentrant checkpointing."""
    states: Tensor | None = None
    """[1, N, D] hidden states that reach the first layer that runs."""
    depth: int = 0
    """Number of layers below it."""

    @property
    def starts(self) -> Tensor:
        """[B] the caller's column of each row's first real token."""
        starts = self.arrangement.step.starts
        return starts + self.shortened.left if isinstance(self.shortened, Trim) else starts


class CallPlanner:
    """Plans the calls of one stack for the prompts of a batch.

    Args:
        backbone: the base model.
        stack: one of its stacks.
        prompts: as in ``Injection``, like the other arguments but one.
        prefix_mask: which virtual tokens rows see; by default as dropout leaves them.

    Raises:
        UnsupportedModelError: there are virtual tokens at the input, and the stack takes no vectors there; or rows have
            different numbers of them, and it does not ignore padding.
    """

    def __init__(
        self,
        backbone: Backbone,
        stack: Stack,
        prompts: Sequence[Prompt],
        rows: Tensor | None,
        packs: bool,
        layer_cache: FrozenLayerCache | None,
        prefix_mask: PrefixMask | None = None,
    ) -> None:
        self.stack = stack
        self.rows = rows
        self.prefix_mask = prefix_mask or PrefixMask(backbone, prompts, rows, None)
        self.takes_wrapper = backbone.takes_wrapper
        self.layers_attend = bool(backbone.attention_layers)
        reads_input = stack is backbone.stacks[0]
        self.feeds_decoder = reads_input and backbone.is_encoder_decoder
        sites = (stack.site, Site.CROSS) if stack.is_causal else (stack.site,)
        places = {place for prompt in prompts for place in prompt.prefixes if place[0] in sites}
        self.layers = [a for a in backbone.attention_layers if a.place in places] if places else []
        terms = {place for prompt in prompts for place in prompt.terms if place[0] in sites}
        self.term_layers = [a for a in backbone.attention_layers if a.place in terms] if terms else []
        self.terms = [layer_terms(prompt, self.term_layers) for prompt in prompts]
        self.prompts = RowPrompts.from_prompts(prompts, self.layers, stack, reads=reads_input)
        self._check_support(backbone)
        self.prefixes = Prefixes(stack, self.layers)
        self.positions = Positions(stack, has_prefix=bool(self.layers))
        self.packs = packs and backbone.packs and self.prompts.vectors is None and not self.prompts.has_infix
        self.adapter_prompts, self.layer_cache = prompts, layer_cache
        self.shares_keys = is_reentrant(stack.module) and any(a.is_shared for a in backbone.attention_layers)

    def _check_support(self, backbone: Backbone) -> None:
        """Check what the stack takes, by forwards of it that are over before the layers run for a call."""
        if self.prompts.vectors is not None and self.stack.word_scale is None:
            raise UnsupportedModelError(
                f"{type(self.stack.module).__name__} takes no inputs_embeds, for virtual tokens among the words",
                "use PrefixTuningConfig",
            )
        is_padded = self.prompts.is_ragged or (self.prompts.is_prefix and not self.takes_wrapper)
        if is_padded and not (compat.is_tested(backbone.model) or self.stack.ignores_padding):
            raise UnsupportedModelError(
                f"{type(self.stack.module).__name__} does not ignore padding, which rows with different numbers of "
                "virtual tokens need",
                "run them in batches of their own",
            )

    @property
    def acts(self) -> bool:
        """Whether any prompt must reach the stack."""
        return self.has_virtual_tokens or bool(self.term_layers)

    @property
    def has_virtual_tokens(self) -> bool:
        """Whether any prompt has virtual tokens here, which take positions of the text."""
        return bool(self.layers) or self.prompts.vectors is not None

    def plan(self, call: Call, columns: Columns, outer: OuterCall) -> CallPlan:
        """Plan a call.

        Args:
            call: the stack's arguments by softtune's names.
            columns: the columns of the batch's virtual tokens.
            outer: the call of the model around the stack.

        Raises:
            AdapterError: the cache was begun with another prefix.
            DataError: a row needs more positions than the model has, or the columns do not fit.
            UnsupportedModelError: the stack or the call takes no such prompts.
        """
        self._check_states(call)
        # The logits to keep are for the head; Gemma 4's stack would return only those tokens.
        call = {name: value for name, value in call.items() if name != "logits_to_keep"}
        if self.stack.module.training and torch.is_grad_enabled() and "use_cache" in self.stack.signature.parameters:
            call["use_cache"] = bool(call.get("use_cache"))  # nothing continues from a training step's cache
        shortened, depth = self._shorten(call)
        step = Step(call, outer.attention_mask)
        prompts = self.pick_prompts(step)
        columns = columns.in_call(step, prompts, shortened if isinstance(shortened, Trim) else None)
        arrangement = Arrangement(step, prompts, columns)
        if self.has_virtual_tokens and not outer.has_positions:
            self.positions.count_text(call, arrangement)
        anchor, terms = None, self.terms
        if is_reentrant(self.stack.module):
            anchor = self._anchor(prompts)
            arrangement = replace(arrangement, prompts=replace(prompts, prefixes=anchor.prefixes))
            terms = [{module: term.map(anchor.leaf) for module, term in of_one.items()} for of_one in terms]
        arrangement = replace(arrangement, layout=self._lay_out(call, arrangement))
        if anchor is not None and call.get("inputs_embeds") is not None:
            call["inputs_embeds"] = anchor.tie(call["inputs_embeds"])
        self.positions.check(call, arrangement)
        self.positions.place(call, arrangement)
        self._make_room(call, arrangement)
        states: Tensor | None = None
        wrapper: PrefixAttention | PackedAttention | TermAttention | None
        if isinstance(shortened, Pack):
            states = self._fill(shortened, call, step, depth, anchor)
            wrapper = self._packed_attention(shortened, arrangement)
        else:
            wrapper = self._prefix_attention(call, arrangement)
        if self.term_layers:
            rows = None if self.rows is None else multiplied(self.rows, step.rows)
            if rows is not None and isinstance(shortened, Pack):
                rows = rows[shortened.rows]
            wrapper = TermAttention(wrapper, terms, rows, packed=isinstance(shortened, Pack))
        if wrapper is not None and not self.stack.is_disentangled:
            call |= {WRAPPER: wrapper, IN_TRAINING: self.stack.module.training}
        return CallPlan(
            call=call,
            arrangement=arrangement,
            shortened=shortened,
            wrapper=wrapper,
            anchor=anchor,
            states=states,
            depth=depth,
        )

    def pick_prompts(self, step: Step) -> RowPrompts:
        """Each row's prompt; beams and returned sequences multiply the rows."""
        rows = torch.zeros(step.rows, dtype=torch.long) if self.rows is None else multiplied(self.rows, step.rows)
        shown = self.prefix_mask.for_rows(step.rows, step.device)
        return self.prompts.pick(rows) if shown is None else self.prompts.pick(rows).seeing(shown)

    def compute_layout(self, arrangement: Arrangement) -> Layout:
        """The layout of a call's tokens and virtual tokens."""
        step, row_prompts = arrangement.step, arrangement.prompts
        columns = arrangement.columns.vector_columns(step, row_prompts)[:, : row_prompts.is_vector.shape[1]]
        return Layout.from_columns(
            step.starts, step.length, columns, row_prompts.is_vector, causal=self.stack.is_causal
        )

    def _check_states(self, call: Call) -> None:
        """Check that the stack keeps no recurrent states: these reset at position 0, but the text may start at another.

        Raises:
            UnsupportedModelError: it keeps states, and the call has a cache.
        """
        if self.has_virtual_tokens and self.stack.keeps_states and call.get("cache") is not None:
            raise UnsupportedModelError(
                f"{type(self.stack.module).__name__} keeps states beside its cache, which know nothing of virtual "
                "tokens",
                "pass use_cache=False",
            )

    # Padding

    def _shorten(self, call: Call) -> tuple[Trim | Pack | None, int]:
        """Pack the call's tokens, or cut the columns that are padding in every row off the call.

        Returns:
            The pack or what was cut, if either saves work, and the number of layers that need not run.
        """
        if is_exporting():
            return None, 0
        if self.packs and can_pack(self.stack, call):
            depth = 0 if self.layer_cache is None else self.layer_cache.depth(call, self.adapter_prompts)
            step = Step(call)
            kinds = self.prefix_mask.kinds(step.rows, step.device)
            return Pack.from_call(self.stack, call, kinds, always=depth > 0), depth
        return None if self.feeds_decoder else self._trim(call), 0

    def _trim(self, call: Call) -> Trim | None:
        """Cut the columns that are padding in every row off a call, where nothing later depends on them."""
        mask = call.get("attention_mask")
        cached = call.get("cache") is not None or call.get("use_cache") is not False
        counts_on_columns = (self.stack.is_causal and cached) or masks_of(call)
        if not (isinstance(mask, Tensor) and mask.dim() == 2) or counts_on_columns:
            return None
        trim = Trim.from_mask(mask, keep_left=self.stack.position_table is not None)
        trim.cut(call)
        return trim

    def _fill(self, pack: Pack, call: Call, step: Step, depth: int, anchor: Anchor | None) -> Tensor | None:
        """Replace the call's rows by the pack's tokens.

        Returns:
            [1, N, D] the hidden states of the pack's tokens above the first ``depth`` layers, if there are any.
        """
        if call.get("position_ids") is None:
            call["position_ids"] = step.positions() + self.stack.first_position
        states = None
        if self.layer_cache is not None and depth:
            states = self.layer_cache.states(call, pack, depth)
            states = states if anchor is None else anchor.tie(states)
        pack.fill(call)
        call["attention_mask"] = self.stack.causal_masks(int(pack.lengths.max()))
        return states

    # Gradients

    def _anchor(self, row_prompts: RowPrompts) -> Anchor:
        """Let gradients reach the prompts through reentrant checkpointing.

        Raises:
            UnsupportedModelError: layers share keys, whose gradients it loses.
        """
        if self.shares_keys:
            raise UnsupportedModelError(
                "layers share keys, whose gradients reentrant checkpointing loses", "enable it with use_reentrant=False"
            )
        of_terms = [part for of_one in self.terms for term in of_one.values() for part in term.tensors]
        return Anchor(row_prompts.prefixes, of_terms)

    # Virtual tokens among the words

    def _lay_out(self, call: Call, arrangement: Arrangement) -> Layout | None:
        """Lay out the call's tokens and virtual tokens, where the layers see other slots than the caller's columns."""
        step = arrangement.step
        if arrangement.prompts.vectors is not None:
            return self._add_vectors(call, arrangement)
        if not self.stack.is_causal and not step.has_ready_mask and holds(step.starts.any(), when_exporting=True):
            return self._insert_tokens(call, arrangement)
        return None

    def _add_vectors(self, call: Call, arrangement: Arrangement) -> Layout | None:
        """Insert the virtual tokens at the input, or extend the mask to those that are in the cache already.

        Raises:
            UnsupportedModelError: the attention mask is not [B, W], or another argument is a mask with a row for each
                token.
        """
        step, row_prompts, layout = arrangement.step, arrangement.prompts, None
        if step.has_ready_mask:
            raise UnsupportedModelError(
                "virtual tokens among the words need the 2-D attention mask [B, W], not a ready one, yours or the "
                "model's",
                "pass that, or use PrefixTuningConfig",
            )
        if not step.is_continued:
            if masks := masks_of(call):
                raise UnsupportedModelError(
                    f"{masks[0]} says what each token sees, and nothing of virtual tokens among the words",
                    "use PrefixTuningConfig",
                )
            layout = self._insert_tokens(call, arrangement)
        elif step.mask is not None or (row_prompts.is_ragged and step.cached):
            call["attention_mask"] = self._continued_mask(step, row_prompts)
        return layout

    def _continued_mask(self, step: Step, row_prompts: RowPrompts) -> Tensor:
        """[B, W + P] the attention mask of a call that continues from a cache with virtual tokens."""
        mask = step.full_mask()
        if step.mask is None:
            mask = mask[:, row_prompts.is_vector.shape[1] :]  # the cache counts the virtual tokens too
        columns = step.starts[:, None].expand(row_prompts.is_vector.shape)
        layout = Layout.from_columns(step.starts, mask.shape[1], columns, row_prompts.is_vector, causal=True)
        return layout.merge(mask, row_prompts.is_vector)

    def _make_room(self, call: Call, arrangement: Arrangement) -> None:
        """Start a decoder's cache with room for the virtual tokens among the words."""
        if arrangement.prompts.vectors is None:
            return
        if arrangement.layout is not None and self.stack.is_causal and self.layers_attend:
            call["cache"] = own_cache(self.stack.module, call)
            if call["cache"] is not None:
                make_room(call["cache"], _is_virtual(arrangement.layout, arrangement.prompts))
        if not self.takes_wrapper and call.get("attention_mask") is not None:
            call["attention_mask"] = as_long_as(call.get("cache"), call["attention_mask"])

    def _insert_tokens(self, call: Call, arrangement: Arrangement) -> Layout:
        """Put the tokens, the virtual tokens, the mask and the tokens' features in their slots."""
        step, row_prompts = arrangement.step, arrangement.prompts
        layout, features = self.compute_layout(arrangement), features_of(call)
        if row_prompts.vectors is not None:
            embeds = call["inputs_embeds"] if call.get("input_ids") is None else self.stack.embed(call["input_ids"])
            call["inputs_embeds"], call["input_ids"] = layout.merge(embeds, row_prompts.vectors), None
        else:
            name = "inputs_embeds" if call.get("input_ids") is None else "input_ids"
            call[name] = layout.merge(call[name], call[name][:, :0])
        if step.mask is not None or row_prompts.is_ragged:
            call["attention_mask"] = layout.merge(step.full_mask(), row_prompts.is_vector)
        for name in features:
            feature = call[name].expand(step.rows, *call[name].shape[1:])
            zeros = feature.new_zeros(*row_prompts.is_vector.shape, *feature.shape[2:])
            call[name] = layout.merge(feature, zeros)
        return layout

    # Prefixes

    def _packed_attention(self, pack: Pack, arrangement: Arrangement) -> PackedAttention:
        """The attention wrapper that separates a pack into rows, and adds each row's prefixes."""
        of_rows = [replace(arrangement, prompts=arrangement.prompts.pick(group.rows)) for group in pack.groups]
        return PackedAttention(pack, [self.prefixes.attention(rows) if self.layers else None for rows in of_rows])

    def _prefix_attention(self, call: Call, arrangement: Arrangement) -> PrefixAttention | None:
        """The attention wrapper that adds each row's prefixes, and shows virtual tokens beyond sliding windows. None
        where it would change nothing, or the prefixes are in a cache, which is put into the call."""
        step, row_prompts = arrangement.step, arrangement.prompts
        if not self.layers:
            slots = self._open_slots(call, arrangement)
            return None if slots is None else PrefixAttention({}, visible={}, biases={}, open_slots=slots)
        if self.layers[0].module is None:
            self.prefixes.add_cache(call, arrangement)
            return None
        in_cache = {
            a.module: row_prompts.prefixes[a.place] for a in self.layers if a.module is not None and a.is_cached
        }
        cached_modules = begin_with(in_cache, call.get("cache"), step, self.stack.module.dtype)
        return self.prefixes.attention(
            arrangement, cached=cached_modules, open_slots=self._open_slots(call, arrangement)
        )

    def _open_slots(self, call: Call, arrangement: Arrangement) -> Tensor | None:
        """[B, Q or 1, S] which virtual tokens this call's Q slots see, beyond sliding windows too; None without any."""
        step, row_prompts, layout = arrangement.step, arrangement.prompts, arrangement.layout
        if row_prompts.vectors is None or not (self.takes_wrapper and self.layers_attend):
            return None
        if layout is None:
            is_virtual = virtual_slots(call["cache"], step.cached + step.length, step.rows)
        else:
            is_virtual = _is_virtual(layout, row_prompts)
        if not self.stack.is_causal:
            return is_virtual[:, None, :]
        slots = torch.arange(is_virtual.shape[1], device=step.device)
        return is_virtual[:, None, :] & (slots <= slots[step.cached :, None])


def _is_virtual(layout: Layout, row_prompts: RowPrompts) -> Tensor:
    """[B, S] which slots are virtual tokens."""
    return layout.merge(torch.zeros_like(layout.token_slots, dtype=torch.bool), row_prompts.is_vector)
