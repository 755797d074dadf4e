"""Lets adapters act in a base model for the length of one call: prompts, biases and heads, row by row.

Letters: B rows, N virtual tokens among the words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softtune.adapter import Adapter
from softtune.backbone import Backbone, cache_of, cached_length, evaluating
from softtune.errors import AdapterError, ConfigError, UnsupportedModelError
from softtune.injection import Injection
from softtune.injection.ahead import run_ahead
from softtune.injection.layout import row_ends, row_starts
from softtune.injection.modules import ModuleChanges
from softtune.injection.trunk import Trunk, untouched
from softtune.methods.base import Prompt
from softtune.methods.bitfit import BiasChanges

BASE = "__base__"
"""PEFT's name for no adapter, in ``adapter_names``."""

_BAKED: ContextVar[dict[nn.Module, Prompt] | None] = ContextVar("_BAKED", default=None)
"""Prompts by adapter, within ``baked``."""


@dataclass(frozen=True)
class Cast:
    """Who acts in a batch."""

    adapters: dict[str, Adapter | None]
    """Different adapters by name; nothing for the base model."""
    rows: Tensor | None = None
    """[B] the number of each row's adapter; None where all rows have the same."""

    @property
    def owners(self) -> tuple[str, ...]:
        """Each row's adapter by name, or the one of all rows."""
        names = list(self.adapters)
        return tuple(names) if self.rows is None else tuple(names[i] for i in self.rows.tolist())


@contextmanager
def acting(
    backbone: Backbone,
    cast: Cast,
    columns: Tensor | None = None,
    text_ends: Tensor | None = None,
    trunk: Trunk | None = None,
) -> Iterator[Injection | None]:
    """Let a cast act in a base model for the length of the block, which gets its injection where anyone acts.

    Layers that run again in the backward pass, under gradient checkpointing, see what acted when they first ran.

    Args:
        backbone: the base model.
        cast: who acts.
        columns: [B, N] the column before which each virtual token stands.
        text_ends: [B] the column where each text ends.
        trunk: keeps what layers below prefixes compute; None where the call runs all layers.
    """
    adapters = list(cast.adapters.values())
    prompts = [Prompt() if a is None else _prompt(backbone, a, ahead=columns is None) for a in adapters]
    changes = _changes(backbone, adapters, cast.rows)
    with ExitStack() as stack:
        injection = None
        if any(adapters):
            changes_layers = changes.reach(backbone.stacks[0].module)
            injection = Injection(
                backbone,
                prompts,
                cast.rows,
                columns=columns,
                text_ends=text_ends,
                packs=cast.rows is None or not changes_layers,
                trunk=None if changes_layers else trunk,
            )
            stack.enter_context(injection)
        stack.enter_context(changes.acting())
        yield injection


@contextmanager
def baked() -> Iterator[None]:
    """Compute each adapter's prompt once within the block, where no adapter or base model changes."""
    token = _BAKED.set({})
    try:
        yield
    finally:
        _BAKED.reset(token)


def _prompt(backbone: Backbone, adapter: Adapter, *, ahead: bool) -> Prompt:
    """What an adapter contributes; its virtual tokens run ahead through its own trained modules."""
    known, module = _BAKED.get(), adapter.module
    if known is None or not ahead or module.training or torch.is_grad_enabled():
        return _computed_prompt(backbone, adapter, ahead=ahead)
    if module not in known:
        known[module] = _computed_prompt(backbone, adapter, ahead=ahead)
    return known[module]


def _computed_prompt(backbone: Backbone, adapter: Adapter, *, ahead: bool) -> Prompt:
    prompt: Prompt = adapter.module.prompt()
    if not ahead:
        return prompt
    with ModuleChanges(backbone, [], [adapter.heads]).acting():
        return run_ahead(backbone, prompt)


def _changes(backbone: Backbone, adapters: Sequence[Adapter | None], rows: Tensor | None = None) -> ModuleChanges:
    """What adapters do to the outputs of single modules."""
    biases = [a.module.additions() if a and isinstance(a.module, BiasChanges) else [] for a in adapters]
    return ModuleChanges(backbone, biases, [a.heads if a else {} for a in adapters], rows)


def check_trunk(trunk: Trunk, adapters: Sequence[Adapter]) -> None:
    """Refuse to cache what no call with these adapters could use.

    Raises:
        UnsupportedModelError: the base model cannot leave its first layers out, or has dropout.
        ConfigError: every adapter acts in the first layer already.
    """
    depths = {_untouched(trunk.backbone, adapter) for adapter in adapters} - {0}
    if trunk.backbone.packs and not depths:
        raise ConfigError(
            "the trunk cache keeps layers below a prefix, and every adapter here acts from the first layer on: "
            "set layers, such as 'last:10', or leave it out"
        )
    for depth in depths or {0}:
        trunk.check(depth)
    if trunk.backbone.stacks[0].has_dropout:
        raise UnsupportedModelError(
            "the base model has dropout, with which a text's layers are never the same twice: "
            "load it with dropout 0 or leave the trunk cache out"
        )


def _untouched(backbone: Backbone, adapter: Adapter) -> int:
    """How many first layers an adapter leaves alone; asks for its prompt without drawing random numbers."""
    if _changes(backbone, [adapter]).reach(backbone.stacks[0].module):
        return 0
    with evaluating(adapter.module):
        return untouched([adapter.module.prompt()])


def text_ends(
    backbone: Backbone, cast: Cast, text: Tensor | None, mask: Any, labels: Tensor | None = None
) -> Tensor | None:
    """[B] the column of each row's first label, or behind its text. None where nobody's virtual tokens stand there, or
    the answer is another sequence."""
    behind = any(adapter.is_behind_text for adapter in cast.adapters.values() if adapter is not None)
    if text is None or not behind or not backbone.continues_text:
        return None
    mask = mask if _is_flat(mask) else None
    ends = row_ends(mask, len(text), text.shape[1], text.device)
    if labels is None:
        return ends
    supervised = labels != -100
    first = supervised.int().argmax(dim=1).maximum(row_starts(mask, len(text), text.device))
    return torch.where(supervised.any(dim=1), first, ends)


def _is_flat(mask: Any) -> bool:
    """Whether an attention mask is [B, T], rather than one for each query or layer."""
    return isinstance(mask, Tensor) and mask.dim() == 2


def sign(output: Any, cast: Cast) -> None:
    """Note in the cache of an output whose keys and values it holds."""
    if (cache := cache_of(output if isinstance(output, dict) else {})) is not None:
        cache.softtune_owners = cast.owners


def check_owner(options: Mapping[str, Any], cast: Cast) -> None:
    """Refuse to go on from what another adapter, or none, has computed.

    Raises:
        AdapterError: the cache among the options is not empty and belongs to others.
    """
    cache, is_begun = cache_of(options), cached_length(options)[1]
    owners: Sequence[str] = getattr(cache, "softtune_owners", (BASE,))
    if is_begun and len(set(owners) | set(cast.owners)) > 1 and owners != cast.owners:
        raise AdapterError(
            f"past_key_values were computed with {', '.join(dict.fromkeys(owners))}, not {', '.join(cast.adapters)}: "
            "leave them out"
        )
