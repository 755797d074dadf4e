"""Rewrites the call of one stack of layers on its way in, and aligns its outputs with the caller's tokens on the way
out.

Knows nothing about heads: they see outputs that have one place for each of the caller's tokens. Letters: B rows, T
tokens of this call, P virtual tokens, W columns of the whole attention mask, S slots that the layers see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from softtune.backbone import Backbone, Site, Stack
from softtune.backbone.interface import WRAPPER
from softtune.errors import DataError, UnsupportedModelError
from softtune.injection.attention import PrefixAttention
from softtune.injection.cache import PrefixCache, hold, own_cache
from softtune.injection.layout import Layout
from softtune.injection.step import Call, Step
from softtune.injection.trim import Trim
from softtune.methods.base import Prompt


class StackInjection:
    """A prompt's part in one stack.

    Args:
        backbone: the base model.
        stack: one of its stacks.
        prompt: what the adapter contributes.
        columns: see ``Injection``.
    """

    def __init__(self, backbone: Backbone, stack: Stack, prompt: Prompt, columns: Tensor | None) -> None:
        self.stack = stack
        self.prompt = prompt
        self.columns = columns
        reads_input = stack is backbone.stacks[0]
        self.vectors = prompt.vectors if reads_input else None
        self.feeds_decoder = reads_input and backbone.is_encoder_decoder
        self.shows_first_slot = backbone.judges_whole_texts
        sites = (stack.site, Site.CROSS) if stack.is_causal else (stack.site,)
        layers = backbone.attention_layers if prompt.prefixes else []
        self.layers = [a for a in layers if a.site in sites and (a.site, a.index) in prompt.prefixes]
        shifts = prompt.shifts_positions and any(a.site is stack.site for a in self.layers)
        self.shift = prompt.num_virtual_tokens if shifts else 0
        self.layout: Layout | None = None
        self.trim: Trim | None = None
        self.has_run = False

    @property
    def acts(self) -> bool:
        """Whether the prompt has anything for this stack."""
        return self.vectors is not None or bool(self.layers)

    def hooks(self) -> list[RemovableHandle]:
        """Attach to the stack; remove the handles to detach."""
        module, table = self.stack.module, self.stack.position_table
        handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True),
        ]
        if self.shift and table is not None:
            handles.append(table.register_forward_pre_hook(self._shift_table, with_kwargs=True))
        return handles

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[()], Call]:
        call = self.stack.arguments(args, kwargs)
        self.layout, self.trim, self.has_run = None, None, True
        if self.stack.module.training and torch.is_grad_enabled() and "use_cache" in self.stack.signature.parameters:
            call["use_cache"] = bool(call.get("use_cache"))  # no one goes on from a training step's cache
        if not self.feeds_decoder:
            self._trim(call)
        step = Step(call)
        if self.vectors is not None:
            self._add_vectors(call, step)
        elif not self.stack.is_causal and bool(step.starts.any()):
            self._lay_out(call, step, step.starts[:, None][:, :0])
        self._check_length(step)
        self._place(call, step)
        if self.layers:
            self._add_prefix(call, step)
        return (), call

    def _trim(self, call: Call) -> None:
        """Leave out what is padding in every row, where nothing later counts on its columns."""
        mask = call.get("attention_mask")
        cached = call.get("past_key_values") is not None or call.get("use_cache") is not False
        if isinstance(mask, Tensor) and mask.dim() == 2 and not (self.stack.is_causal and cached):
            self.trim = Trim.of(mask, keep_left=self.stack.position_table is not None)
            self.trim.cut(call)

    def _add_vectors(self, call: Call, step: Step) -> None:
        """Put the virtual tokens among the words, or open the mask for those that the cache already holds."""
        if step.has_ready_mask:
            raise UnsupportedModelError(
                "virtual tokens need the 2-D attention mask [B, W]: pass it instead of a 4-D one"
            )
        if not step.is_continued:
            self._lay_out(call, step, self._columns(step, self.prompt.num_virtual_tokens))
        elif step.mask is not None:
            columns = step.starts[:, None].expand(-1, self.prompt.num_virtual_tokens)
            layout = Layout.of(step.starts, step.mask.shape[1], columns, causal=True)
            call["attention_mask"] = layout.merge(step.mask, torch.ones_like(columns))

    def widen(self, mask: Tensor) -> Tensor:
        """[B, S] the attention mask [B, T] of an input together with its virtual tokens."""
        step = Step({"input_ids": mask, "attention_mask": mask})
        columns = self._columns(step, self.prompt.num_virtual_tokens)
        layout = Layout.of(step.starts, step.length, columns, causal=self.stack.is_causal)
        return layout.merge(mask, torch.ones_like(columns))

    def _columns(self, step: Step, size: int) -> Tensor:
        """[B, size] the column before which each virtual token stands."""
        cut = self.trim.left if self.trim else 0
        if self.columns is None:  # kept, since decoding without a cache calls again with a longer text
            self.columns = cut + (step.ends if self.prompt.after_text else step.starts)
        columns = self.columns.to(step.device).reshape(len(self.columns), -1)
        columns = columns.repeat_interleave(max(step.rows // len(columns), 1), dim=0)  # beams multiply the rows
        columns = columns.expand(-1, size) if columns.shape[1] == 1 else columns
        length = step.length + (self.trim.left + self.trim.right if self.trim else 0)
        if columns.shape != (step.rows, size) or not 0 <= int(columns.min()) <= int(columns.max()) <= length:
            raise DataError(
                f"prompt_positions {list(columns.shape)} from {int(columns.min())} to {int(columns.max())} do not fit: "
                f"give {size} for each of {step.rows} rows, from 0 to {length}"
            )
        return (columns - cut).clamp(0, step.length)

    def _infix_column(self, step: Step) -> Tensor:
        """[B, 1] the column before which the infix stands."""
        columns = self._columns(step, self.prompt.num_virtual_tokens)
        if bool((columns != columns[:, :1]).any()):
            raise DataError("an infix stands at one place of a text: write its virtual tokens next to one another")
        return columns[:, :1]

    def _lay_out(self, call: Call, step: Step, columns: Tensor) -> None:
        """Put everything that comes with a token in its slot."""
        self.layout = Layout.of(step.starts, step.length, columns, causal=self.stack.is_causal)
        words = call["inputs_embeds"] if call.get("input_ids") is None else self.stack.embed(call["input_ids"])
        vectors = words.new_zeros(0, words.shape[-1]) if self.vectors is None else self.vectors
        call["inputs_embeds"] = self.layout.merge(words, vectors.expand(step.rows, -1, -1))
        call["input_ids"] = None
        ones = torch.ones_like(columns)
        if step.mask is not None:
            call["attention_mask"] = self.layout.merge(step.mask, ones)
        if call.get("token_type_ids") is not None:
            call["token_type_ids"] = self.layout.merge(call["token_type_ids"], 0 * ones)

    def _place(self, call: Call, step: Step) -> None:
        """Count positions from each row's first real token, and past the virtual tokens in front of it."""
        if not self.stack.takes_position_ids:
            return
        positions = call.get("position_ids")
        if positions is None:
            if not self.shift and not (self.stack.is_causal and step.mask is not None):
                return  # the model's own count is right
            positions = step.positions() + self.stack.first_position
        positions = positions.expand(step.rows, -1)
        if self.layout is not None:
            positions = self.layout.merge_positions(positions) + self.shift
        elif self.vectors is not None:
            positions = positions + self.prompt.num_virtual_tokens
        elif self.prompt.after_text and self.shift and not step.is_continued:
            if step.mask is None and call.get("position_ids") is None:
                # Without a mask, transformers takes the jump in the positions for the next of several packed texts.
                call["attention_mask"] = torch.ones_like(positions)
            positions = positions + self.shift * step.is_from(self._infix_column(step))
        else:
            positions = positions + self.shift
        call["position_ids"] = positions

    def _shift_table(self, module: nn.Module, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[Any, ...], Call]:
        """Move the positions that BART's kin look up by themselves."""
        if kwargs.get("position_ids") is not None:
            return args, {**kwargs, "position_ids": kwargs["position_ids"] + self.shift}
        return args, {**kwargs, "past_key_values_length": kwargs.get("past_key_values_length", 0) + self.shift}

    def _check_length(self, step: Step) -> None:
        limit, virtual = self.stack.table_size, self.shift if self.vectors is None else len(self.vectors)
        if limit is not None and step.width + virtual > limit:
            raise DataError(
                f"{step.width} tokens and {virtual} virtual ones exceed the model's {limit} positions: shorten the text"
            )

    def _add_prefix(self, call: Call, step: Step) -> None:
        prefixes = [self.prompt.prefixes[a.site, a.index] for a in self.layers]
        if self.layers[0].module is None:
            layout = None
            if step.mask is not None:
                columns = step.starts[:, None].expand(-1, self.prompt.num_virtual_tokens)
                layout = Layout.of(step.starts, step.width, columns, causal=True)
                call["attention_mask"] = layout.merge(step.mask, torch.ones_like(columns))
            cache = own_cache(self.stack.module, call)
            call["past_key_values"] = PrefixCache(prefixes, cache, layout if bool(step.starts.any()) else None)
            return
        modules = [a.module for a in self.layers if a.module is not None]
        own = [a.module for a in self.layers if a.module is not None and a.site is self.stack.site]
        visible = None
        if self.prompt.after_text and not step.is_continued:
            # The token that the answer is predicted from is the first to see an infix.
            visible = step.is_from(self._infix_column(step) - 1)[..., None].expand(
                -1, -1, self.prompt.num_virtual_tokens
            )
        biases = {}
        if own and self.stack.relative_bias is not None:
            positions = step.positions()
            positions = positions if self.layout is None else self.layout.merge_positions(positions)
            bias = self.stack.prefix_bias(positions, self.prompt.num_virtual_tokens)
            biases = dict.fromkeys(own, bias)
        by_module = dict(zip(modules, prefixes, strict=True))
        in_cache = {a.module: by_module[a.module] for a in self.layers if a.module is not None and a.is_cached}
        held = hold(in_cache, call.get("past_key_values"), step, self.stack.module.dtype)
        call[WRAPPER] = PrefixAttention(by_module, visible=visible, biases=biases, held=held)

    def _after(self, module: nn.Module, args: Any, kwargs: Call, output: Any) -> Any:
        if (wrapper := kwargs.get(WRAPPER)) is not None:
            self._check_reached(wrapper, kwargs)
        if isinstance(cache := kwargs.get("past_key_values"), PrefixCache):
            output.past_key_values = cache.inner
            if output.attentions is not None:
                output.attentions = tuple(cache.align_keys(weights) for weights in output.attentions)
        first = output.last_hidden_state[:, :1] if self.shows_first_slot else None
        if self.layout is not None and not (self.feeds_decoder and self.vectors is not None):
            align_outputs(output, self.layout, "last_hidden_state", "hidden_states", "attentions")
        if self.trim is not None:
            self.trim.restore(output)
        if first is not None:  # a head reads the first column, be it padding
            output.last_hidden_state = torch.cat([first, output.last_hidden_state[:, 1:]], dim=1)
        return output

    def _check_reached(self, wrapper: PrefixAttention, call: Call) -> None:
        crossing = call.get("encoder_hidden_states") is not None
        expected = {a.module for a in self.layers if a.site is not Site.CROSS or crossing}
        if expected - wrapper.reached:
            raise UnsupportedModelError(
                "the prefix did not reach every layer: call set_attn_implementation before the adapter is added"
            )


def align_outputs(output: Any, layout: Layout, states: str, all_states: str, attentions: str) -> None:
    """Give the named fields of an output one place for each of the caller's tokens, where they have a value."""
    if getattr(output, states, None) is not None:
        output[states] = layout.align(output[states])
    if getattr(output, all_states, None) is not None:
        output[all_states] = tuple(layout.align(h) for h in output[all_states])
    if getattr(output, attentions, None) is not None:
        output[attentions] = tuple(a if a is None else layout.align_attention(a) for a in output[attentions])
