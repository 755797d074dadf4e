"""Applies a plan to each call of one stack of layers, and aligns its outputs with the caller's tokens.

Knows nothing about heads: they see outputs that have one place for each of the caller's tokens. Letters: B rows, T
tokens of this call, S slots that the layers see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from softtune import compat
from softtune.backbone import Backbone, Stack, skipped
from softtune.backbone.disentangled import wrap_disentangled_attention
from softtune.backbone.interface import Attention
from softtune.backbone.positions import look_up_shifted
from softtune.injection.arrangement import Arrangement
from softtune.injection.cache import PrefixCache
from softtune.injection.call_plan import CallPlan, CallPlanner, OuterCall
from softtune.injection.columns import Columns
from softtune.injection.frozen_layer_cache import FrozenLayerCache
from softtune.injection.layout import Layout
from softtune.injection.prefix_mask import PrefixMask
from softtune.injection.prefixes import check_reached
from softtune.injection.step import Call, Step
from softtune.methods.prompt import Prompt


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
        prefix_mask: PrefixMask | None = None,
    ) -> None:
        self.stack = stack
        self.planner = CallPlanner(backbone, stack, prompts, rows, packs, layer_cache, prefix_mask)
        self.prompts = self.planner.prompts
        self.columns = Columns(columns, text_ends)
        self.running: CallPlan | None = None
        """The plan of the call that runs."""
        self.finished: CallPlan | None = None
        """The plan of the last call that has run."""
        self._model, self._outer = backbone.model, OuterCall()
        self._is_whole_model = backbone.is_encoder_decoder or stack.module is backbone.model
        self._shows_first_slot = backbone.judges_whole_texts
        self._skipping = ExitStack()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Plan, apply and restore each call of the stack, for the length of the block."""
        module, table = self.stack.module, self.stack.position_table
        handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True),
            module.get_input_embeddings().register_forward_hook(self._tie),
        ]
        if self.prompts.shifts and table is not None:
            handles.append(table.register_forward_hook(self._shift, with_kwargs=True))
        if not self._is_whole_model:
            handles.append(self._model.register_forward_pre_hook(self._note_outer, with_kwargs=True))
        with ExitStack() as block:
            for handle in handles:
                block.callback(handle.remove)
            block.callback(self._skipping.close)
            if self.stack.is_disentangled:
                block.enter_context(wrap_disentangled_attention(module, self._attend))
            yield

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[()], Call]:
        plan = self.planner.plan(self.stack.arguments(args, kwargs), self.columns, self._outer)
        return (), self.stack.keywords(self._apply(plan), kwargs)

    def _after(self, module: nn.Module, args: Any, kwargs: Call, output: Any) -> Any:
        plan, self.running = self.running, None
        assert plan is not None
        self.finished = plan
        self._skipping.close()
        if plan.wrapper is not None:
            planner = self.planner
            check_reached(self.stack, [*planner.layers, *planner.term_layers], plan.wrapper, kwargs)
        return self._restore(plan, kwargs, output)

    def _apply(self, plan: CallPlan) -> Call:
        """Let the stack run by a plan. Where texts end is known from the first call on."""
        self.running, self.columns = plan, replace(self.columns, text_ends=plan.arrangement.columns.text_ends)
        if (states := plan.states) is not None:
            self._skipping.enter_context(skipped(self.stack.layers[: plan.depth], lambda _: states))
        return plan.call

    def _restore(self, plan: CallPlan, kwargs: Call, output: Any) -> Any:
        """Give an output one place for each of the caller's tokens."""
        if isinstance(cache := compat.cache_of(kwargs), PrefixCache):
            compat.set_cache(output, cache.inner)
            if output.attentions is not None:
                output.attentions = tuple(cache.align_keys(weights) for weights in output.attentions)
        first = output.last_hidden_state[:, :1] if self._shows_first_slot else None
        layout = plan.arrangement.layout
        if layout is not None and not (self.planner.feeds_decoder and self.prompts.vectors is not None):
            align_outputs(output, layout, "last_hidden_state", "hidden_states", "attentions")
        if plan.shortened is not None:
            plan.shortened.restore(output)
        if first is not None:  # heads read the first column, even where it is padding, or the text's first
            columns = torch.arange(output.last_hidden_state.shape[1], device=first.device)
            read = (columns == 0) | (columns == plan.starts[:, None])
            output.last_hidden_state = torch.where(read[..., None], first, output.last_hidden_state)
        return output

    def _note_outer(self, module: nn.Module, args: Any, kwargs: Call) -> None:
        """Note the mask of the model around the stack, which may turn it into one that no longer says which tokens are
        padding, and whether the caller gave position ids."""
        self._outer = OuterCall(kwargs.get("attention_mask"), kwargs.get("position_ids") is not None)

    def _tie(self, module: nn.Module, args: Any, embeds: Tensor) -> Tensor:
        anchor = None if self.running is None else self.running.anchor
        return embeds if anchor is None or not torch.is_grad_enabled() else anchor.tie(embeds)

    def _shift(self, module: nn.Module, args: tuple[Any, ...], kwargs: Call, output: Tensor) -> Tensor:
        if self.running is None:
            return output
        return look_up_shifted(self.stack.module, module, args, kwargs, output, self.running.arrangement.prompts.shift)

    def _attend(self, attend: Attention, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Call the running call's wrapper in disentangled attention, which does not use the attention interface."""
        plan = self.running or self.finished  # a layer may run again in the backward pass
        wrapper = None if plan is None else plan.wrapper
        return attend(*args, **kwargs) if wrapper is None else wrapper(attend, *args, **kwargs)

    def with_virtual(self, mask: Tensor | None, states: Tensor) -> Tensor | None:
        """[B, S] the attention mask [B, T] of an input, extended to its virtual tokens. ``states`` [B, S, D] are the
        stack's outputs for both."""
        if self.prompts.vectors is None or (mask is None and not self.prompts.is_ragged):
            return mask
        if mask is None:
            mask = states.new_ones(len(states), states.shape[1] - self.prompts.vectors.shape[1], dtype=torch.long)
        step = Step({"input_ids": mask, "attention_mask": mask})
        prompts = self.planner.pick_prompts(step)
        arrangement = Arrangement(step, prompts, self.columns.in_call(step, prompts, None))
        return self.planner.compute_layout(arrangement).merge(mask, prompts.is_vector)


def align_outputs(output: Any, layout: Layout, states: str, all_states: str, attentions: str) -> None:
    """Align the named fields of an output with the caller's tokens, where they have a value."""
    if getattr(output, states, None) is not None:
        output[states] = layout.align(output[states])
    if getattr(output, all_states, None) is not None:
        output[all_states] = tuple(layout.align(h) for h in output[all_states])
    if getattr(output, attentions, None) is not None:
        output[attentions] = tuple(a if a is None else layout.align_attention(a) for a in output[attentions])
