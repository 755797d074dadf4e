"""Rewrites the arguments of one stack of layers, and aligns its outputs with the caller's tokens.

Knows nothing about heads: they see outputs that have one place for each of the caller's tokens. Letters: B rows, T
tokens of this call, P virtual tokens, W columns of the whole attention mask, S slots that the layers see.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from softtune import compat
from softtune.backbone import Backbone, Site, Stack, is_reentrant, skipped
from softtune.backbone.disentangled import wrap_disentangled_attention
from softtune.backbone.interface import WRAPPER, Attention
from softtune.errors import UnsupportedModelError
from softtune.injection.attention_wrapper import PrefixAttention
from softtune.injection.cache import PrefixCache, as_long_as, begin_with, make_room, own_cache, virtual_slots
from softtune.injection.columns import Columns
from softtune.injection.frozen_layer_cache import FrozenLayerCache
from softtune.injection.graphs import holds, is_exporting
from softtune.injection.layout import Layout
from softtune.injection.pack import Pack, PackedAttention, can_pack
from softtune.injection.positions import Positions
from softtune.injection.prefixes import Prefixes
from softtune.injection.reentrant import Anchor
from softtune.injection.rows import RowPrompts, multiplied
from softtune.injection.step import Call, Step, features_of, masks_of
from softtune.injection.trim import Trim
from softtune.methods.base import Prompt


class StackInjection:
    """The prompts of a batch, injected into one stack.

    Args:
        backbone: the base model.
        stack: one of its stacks.
        prompts: as in ``Injection``, like the other arguments.
    """

    def __init__(
        self,
        backbone: Backbone,
        stack: Stack,
        prompts: Sequence[Prompt],
        rows: Tensor | None,
        columns: Tensor | None,
        text_ends: Tensor | None,
        packs: bool,
        layer_cache: FrozenLayerCache | None,
    ) -> None:
        self.stack = stack
        self.adapter_prompts, self.layer_cache = prompts, layer_cache
        self.takes_wrapper = backbone.takes_wrapper
        self.layers_attend = bool(backbone.attention_layers)
        self.rows = rows
        self.columns = Columns(columns, text_ends)
        reads_input = stack is backbone.stacks[0]
        self.feeds_decoder = reads_input and backbone.is_encoder_decoder
        self.shows_first_slot = backbone.judges_whole_texts
        sites = (stack.site, Site.CROSS) if stack.is_causal else (stack.site,)
        places = {place for prompt in prompts for place in prompt.prefixes if place[0] in sites}
        self.layers = [a for a in backbone.attention_layers if a.place in places] if places else []
        self.prompts = RowPrompts.from_prompts(prompts, self.layers, stack, reads=reads_input)
        if self.prompts.vectors is not None:
            _ = stack.word_scale  # measured by forwards, which no hook may change
        is_padded = self.prompts.is_ragged or (self.prompts.is_prefix and not self.takes_wrapper)
        if is_padded and not (compat.is_tested(backbone.model) or stack.ignores_padding):
            raise UnsupportedModelError(
                f"{type(stack.module).__name__} does not ignore padding, which rows with different numbers of virtual "
                "tokens need: run them in batches of their own"
            )
        self.prefixes = Prefixes(stack, self.layers, self.columns)
        self.positions = Positions(stack, self.columns, has_prefix=bool(self.layers))
        self.starts = torch.zeros(0, dtype=torch.long)
        self.layout: Layout | None = None
        self.trim: Trim | None = None
        self.pack: Pack | None = None
        self.outer_mask: Any = None
        """The attention mask that the model around the stack was called with."""
        self.has_outer_positions = True
        """Whether the caller gave the model around the stack position ids, so that it has not made them itself."""
        self.has_run = False
        self.packs = packs and backbone.packs and self.prompts.vectors is None and not self.prompts.has_infix
        self.depth = 0
        self._skipping = ExitStack()
        self.wrapper: PrefixAttention | PackedAttention | None = None
        self.shares_keys = is_reentrant(stack.module) and any(a.is_shared for a in backbone.attention_layers)
        self.anchor: Anchor | None = None

    @property
    def acts(self) -> bool:
        """Whether any prompt must reach the stack."""
        return bool(self.layers) or self.prompts.vectors is not None

    def hooks(self) -> list[RemovableHandle]:
        """Register hooks on the stack; remove the handles to detach."""
        module, table = self.stack.module, self.stack.position_table
        handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True),
            module.get_input_embeddings().register_forward_hook(self._tie),
        ]
        if self.prompts.shifts and table is not None:
            handles.append(table.register_forward_hook(self.positions.move_table, with_kwargs=True))
        return handles

    def attention(self) -> AbstractContextManager[None]:
        """Let disentangled attention, which does not use the attention interface, call the running call's wrapper."""

        def call_wrapper(attend: Attention, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            return attend(*args, **kwargs) if self.wrapper is None else self.wrapper(attend, *args, **kwargs)

        return wrap_disentangled_attention(self.stack.module, call_wrapper)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[()], Call]:
        call = self.stack.arguments(args, kwargs)
        call.pop("logits_to_keep", None)  # for the head; Gemma 4's stack would return only those tokens
        self.has_run = True
        self.layout, self.trim, self.columns.trim, self.pack = None, None, None, None
        self.stop_skipping()
        self._check_states(call)
        if self.stack.module.training and torch.is_grad_enabled() and "use_cache" in self.stack.signature.parameters:
            call["use_cache"] = bool(call.get("use_cache"))  # nothing continues from a training step's cache
        if self.packs and not is_exporting() and can_pack(self.stack, call):
            self.depth = 0 if self.layer_cache is None else self.layer_cache.depth(call, self.adapter_prompts)
            self.pack = Pack.from_call(self.stack, call, self.rows, always=self.depth > 0)
        elif not self.feeds_decoder and not is_exporting():
            self._trim(call)
        step = Step(call, self.outer_mask)
        self.starts = step.starts + (self.trim.left if self.trim else 0)
        row_prompts = self._prompts_of(step)
        if self.acts and not self.has_outer_positions:
            self.positions.count_text(call, step, row_prompts)
        self.positions.shift = row_prompts.shift
        if is_reentrant(module):
            row_prompts = self._anchor(call, row_prompts)
        if row_prompts.vectors is not None:
            self._add_vectors(call, step, row_prompts)
        elif not self.stack.is_causal and not step.has_ready_mask and holds(step.starts.any(), when_exporting=True):
            self._lay_out(call, step, row_prompts)
        self.positions.check(call, step, row_prompts)
        self.positions.place(call, step, row_prompts, self.layout)
        if self.pack is not None:
            self._pack(self.pack, call, step, row_prompts)
        elif self.layers:
            self._add_prefix(call, step, row_prompts)
        elif (slots := self._open_slots(call, step, row_prompts)) is not None:
            call[WRAPPER] = PrefixAttention({}, visible={}, biases={}, cached=(), open_slots=slots)
        self.wrapper = call.get(WRAPPER)
        if self.stack.is_disentangled:
            call.pop(WRAPPER, None)
        return (), self.stack.keywords(call, kwargs)

    def _check_states(self, call: Call) -> None:
        """Check that the stack keeps no recurrent states: these reset at position 0, but the text may start at another.

        Raises:
            UnsupportedModelError: it keeps states, and the call has a cache.
        """
        if self.acts and self.stack.keeps_states and call.get("cache") is not None:
            raise UnsupportedModelError(
                f"{type(self.stack.module).__name__} keeps states beside its cache, which know nothing of virtual "
                "tokens: pass use_cache=False"
            )

    def _open_slots(self, call: Call, step: Step, row_prompts: RowPrompts) -> Tensor | None:
        """[B, Q or 1, S] which virtual tokens this call's Q slots see, beyond sliding windows too; None without any."""
        if row_prompts.vectors is None or not (self.takes_wrapper and self.layers_attend):
            return None
        if self.layout is None:
            is_virtual = virtual_slots(call["cache"], step.cached + step.length, step.rows)
        else:
            is_virtual = self._is_virtual(self.layout, row_prompts)
        if not self.stack.is_causal:
            return is_virtual[:, None, :]
        slots = torch.arange(is_virtual.shape[1], device=step.device)
        return is_virtual[:, None, :] & (slots <= slots[step.cached :, None])

    def _is_virtual(self, layout: Layout, row_prompts: RowPrompts) -> Tensor:
        """[B, S] which slots are virtual tokens."""
        return layout.merge(torch.zeros_like(layout.token_slots, dtype=torch.bool), row_prompts.is_vector)

    def _anchor(self, call: Call, row_prompts: RowPrompts) -> RowPrompts:
        """Let gradients reach the prompts through reentrant checkpointing.

        Raises:
            UnsupportedModelError: layers share keys, whose gradients it loses.
        """
        if self.shares_keys:
            raise UnsupportedModelError(
                "layers share keys, whose gradients reentrant checkpointing loses: enable it with use_reentrant=False"
            )
        self.anchor = Anchor(dict(row_prompts.prefixes))
        if call.get("inputs_embeds") is not None:
            call["inputs_embeds"] = self.anchor.tie(call["inputs_embeds"])
        return replace(row_prompts, prefixes=self.anchor.prefixes)

    def _tie(self, module: nn.Module, args: Any, embeds: Tensor) -> Tensor:
        return embeds if self.anchor is None or not torch.is_grad_enabled() else self.anchor.tie(embeds)

    def _prompts_of(self, step: Step) -> RowPrompts:
        """Each row's prompt; beams and returned sequences multiply the rows."""
        if self.rows is None:
            return self.prompts.pick(torch.zeros(step.rows, dtype=torch.long))
        return self.prompts.pick(multiplied(self.rows, step.rows))

    def _trim(self, call: Call) -> None:
        """Leave out the columns that are padding in every row, where nothing later depends on them."""
        mask = call.get("attention_mask")
        cached = call.get("cache") is not None or call.get("use_cache") is not False
        counts_on_columns = (self.stack.is_causal and cached) or masks_of(call)
        if isinstance(mask, Tensor) and mask.dim() == 2 and not counts_on_columns:
            self.trim = self.columns.trim = Trim.from_mask(mask, keep_left=self.stack.position_table is not None)
            self.trim.cut(call)

    def _pack(self, pack: Pack, call: Call, step: Step, row_prompts: RowPrompts) -> None:
        """Pack the tokens into one row, and add each row's prefixes in the attention wrapper."""
        if call.get("position_ids") is None:
            call["position_ids"] = step.positions() + self.stack.first_position
        if self.layer_cache is not None and self.depth:
            self._skip(self.layer_cache.states(call, pack, self.depth))
        pack.fill(call)
        call["attention_mask"] = self.stack.causal_masks(int(pack.lengths.max()))
        prefixes = [
            self.prefixes.attention(step, row_prompts.pick(group.rows), None) if self.layers else None
            for group in pack.groups
        ]
        call[WRAPPER] = PackedAttention(pack, prefixes)

    def _skip(self, states: Tensor) -> None:
        """Pass hidden states [1, N, D] to the first layer that a prompt reaches; layers below it don't run."""
        tied = states if self.anchor is None else self.anchor.tie(states)
        self._skipping.enter_context(skipped(self.stack.layers[: self.depth], lambda _: tied))

    def stop_skipping(self) -> None:
        """Let all layers run again."""
        self._skipping.close()

    def _add_vectors(self, call: Call, step: Step, row_prompts: RowPrompts) -> None:
        """Insert the virtual tokens at the input, or extend the mask to those that are in the cache already.

        Raises:
            UnsupportedModelError: the attention mask is not [B, W], or another argument is a mask with a row for each
                token.
        """
        if step.has_ready_mask:
            raise UnsupportedModelError(
                "virtual tokens among the words need the 2-D attention mask [B, W], not a ready one, yours or the "
                "model's: pass that, or use PrefixTuningConfig"
            )
        if not step.is_continued:
            if masks := masks_of(call):
                raise UnsupportedModelError(
                    f"{masks[0]} says what each token sees, and nothing of virtual tokens among the words: use "
                    "PrefixTuningConfig"
                )
            self._lay_out(call, step, row_prompts)
            self._make_room(call, row_prompts)
        elif step.mask is not None or (row_prompts.is_ragged and step.cached):
            mask = step.full_mask()
            if step.mask is None:
                mask = mask[:, row_prompts.is_vector.shape[1] :]  # the cache counts the virtual tokens too
            columns = step.starts[:, None].expand(row_prompts.is_vector.shape)
            layout = Layout.from_columns(step.starts, mask.shape[1], columns, row_prompts.is_vector, causal=True)
            call["attention_mask"] = layout.merge(mask, row_prompts.is_vector)
        if not self.takes_wrapper and call.get("attention_mask") is not None:
            call["attention_mask"] = as_long_as(call.get("cache"), call["attention_mask"])

    def _make_room(self, call: Call, row_prompts: RowPrompts) -> None:
        """Start a decoder's cache, with room for the virtual tokens."""
        if self.stack.is_causal and self.layers_attend and self.layout is not None:
            call["cache"] = own_cache(self.stack.module, call)
            if call["cache"] is not None:
                make_room(call["cache"], self._is_virtual(self.layout, row_prompts))

    def with_virtual(self, mask: Tensor | None, states: Tensor) -> Tensor | None:
        """[B, S] the attention mask [B, T] of an input, extended to its virtual tokens. ``states`` [B, S, D] are the
        stack's outputs for both."""
        if self.prompts.vectors is None or (mask is None and not self.prompts.is_ragged):
            return mask
        if mask is None:
            mask = states.new_ones(len(states), states.shape[1] - self.prompts.vectors.shape[1], dtype=torch.long)
        step = Step({"input_ids": mask, "attention_mask": mask})
        row_prompts = self._prompts_of(step)
        return self._layout_of(step, row_prompts).merge(mask, row_prompts.is_vector)

    def _layout_of(self, step: Step, row_prompts: RowPrompts) -> Layout:
        """The layout of the tokens and the virtual tokens of ``row_prompts``."""
        columns = self.columns.of_vectors(step, row_prompts)[:, : row_prompts.is_vector.shape[1]]
        return Layout.from_columns(
            step.starts, step.length, columns, row_prompts.is_vector, causal=self.stack.is_causal
        )

    def _lay_out(self, call: Call, step: Step, row_prompts: RowPrompts) -> None:
        """Put the tokens, the virtual tokens, the mask and the tokens' features in their slots."""
        self.layout, features = self._layout_of(step, row_prompts), features_of(call)
        if row_prompts.vectors is not None:
            embeds = call["inputs_embeds"] if call.get("input_ids") is None else self.stack.embed(call["input_ids"])
            call["inputs_embeds"], call["input_ids"] = self.layout.merge(embeds, row_prompts.vectors), None
        else:
            name = "inputs_embeds" if call.get("input_ids") is None else "input_ids"
            call[name] = self.layout.merge(call[name], call[name][:, :0])
        if step.mask is not None or row_prompts.is_ragged:
            call["attention_mask"] = self.layout.merge(step.full_mask(), row_prompts.is_vector)
        for name in features:
            feature = call[name].expand(step.rows, *call[name].shape[1:])
            zeros = feature.new_zeros(*row_prompts.is_vector.shape, *feature.shape[2:])
            call[name] = self.layout.merge(feature, zeros)

    def _add_prefix(self, call: Call, step: Step, row_prompts: RowPrompts) -> None:
        if self.layers[0].module is None:
            self.prefixes.add_cache(call, step, row_prompts)
            return
        in_cache = {
            a.module: row_prompts.prefixes[a.place] for a in self.layers if a.module is not None and a.is_cached
        }
        cached_modules = begin_with(in_cache, call.get("cache"), step, self.stack.module.dtype)
        call[WRAPPER] = self.prefixes.attention(
            step, row_prompts, self.layout, cached=cached_modules, open_slots=self._open_slots(call, step, row_prompts)
        )

    def _after(self, module: nn.Module, args: Any, kwargs: Call, output: Any) -> Any:
        self.anchor = None
        self.stop_skipping()
        if self.wrapper is not None:
            self.prefixes.check_reached(self.wrapper, kwargs)
        if isinstance(cache := compat.cache_of(kwargs), PrefixCache):
            compat.set_cache(output, cache.inner)
            if output.attentions is not None:
                output.attentions = tuple(cache.align_keys(weights) for weights in output.attentions)
        first = output.last_hidden_state[:, :1] if self.shows_first_slot else None
        if self.layout is not None and not (self.feeds_decoder and self.prompts.vectors is not None):
            align_outputs(output, self.layout, "last_hidden_state", "hidden_states", "attentions")
        if (shortened := self.trim or self.pack) is not None:
            shortened.restore(output)
        if first is not None:  # heads read the first column, even where it is padding, or the text's first
            columns = torch.arange(output.last_hidden_state.shape[1], device=first.device)
            read = (columns == 0) | (columns == self.starts[:, None])
            output.last_hidden_state = torch.where(read[..., None], first, output.last_hidden_state)
        return output


def align_outputs(output: Any, layout: Layout, states: str, all_states: str, attentions: str) -> None:
    """Align the named fields of an output with the caller's tokens, where they have a value."""
    if getattr(output, states, None) is not None:
        output[states] = layout.align(output[states])
    if getattr(output, all_states, None) is not None:
        output[all_states] = tuple(layout.align(h) for h in output[all_states])
    if getattr(output, attentions, None) is not None:
        output[attentions] = tuple(a if a is None else layout.align_attention(a) for a in output[attentions])
