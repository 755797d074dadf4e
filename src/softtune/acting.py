"""Lets adapters act in a base model for the length of one call: prompts, biases and heads, row by row.

Letters: B rows, N virtual tokens among the words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softtune import compat
from softtune.adapter import Adapter
from softtune.backbone import Backbone, Site, cached_length, evaluating, turn
from softtune.errors import AdapterError, ConfigError, UnsupportedModelError
from softtune.injection import Injection
from softtune.injection.ahead import run_ahead
from softtune.injection.graphs import check_graph, is_exporting
from softtune.injection.layout import row_ends, row_starts
from softtune.injection.modules import ModuleChanges
from softtune.injection.owners import BASE, Owners, differ, named, owners_of
from softtune.injection.owners import sign as sign_as
from softtune.injection.trunk import Trunk, untouched
from softtune.inputs import Inputs
from softtune.methods.base import Prompt

_BAKED: ContextVar[dict[nn.Module, Prompt] | None] = ContextVar("_BAKED", default=None)
"""Prompts by adapter, within ``baked``."""


@dataclass(frozen=True)
class Cast:
    """Who acts in a batch."""

    adapters: dict[str, Adapter | None]
    """Different adapters by name; nothing for the base model."""
    rows: Tensor | None = None
    """[B] the number of each row's adapter; None where all rows have the same."""

    @classmethod
    def of(cls, names: Sequence[str], adapter: Callable[[str], Adapter]) -> Cast:
        """One name for each row, or the one of all rows.

        Raises:
            AdapterError: a name is unknown, or the adapters are for several tasks.
        """
        adapters = {name: None if name == BASE else adapter(name) for name in names}
        if len(tasks := {a.config.task_type for a in adapters.values() if a is not None}) > 1:
            raise AdapterError(
                f"adapter_names mixes tasks ({', '.join(sorted(str(t and t.value) for t in tasks))}): "
                "one batch has one head, run them apart"
            )
        numbers = {name: number for number, name in enumerate(adapters)}
        return cls(adapters, torch.tensor([numbers[name] for name in names]) if len(adapters) > 1 else None)

    @property
    def owners(self) -> Owners:
        """Each row's adapter by name, or the one of all rows."""
        return self._each(list(self.adapters))

    def _each(self, names: Sequence[str]) -> Owners:
        """One of the names for each row by its adapter's number, or the one of all rows."""
        return tuple(names) if self.rows is None else tuple(names[i] for i in self.rows.tolist())


@contextmanager
def acting(backbone: Backbone, cast: Cast, inputs: Inputs, trunk: Trunk | None = None) -> Iterator[Injection | None]:
    """Let a cast act in a base model for the length of the block, which gets its injection where anyone acts.

    Calls of other threads wait for its end, and calls within it know nothing of this cast. Layers that run again in the
    backward pass, under gradient checkpointing, see what acted when they first ran.

    Args:
        backbone: the base model.
        cast: who acts.
        inputs: the call's rows.
        trunk: keeps what layers below prefixes compute; None where the call runs all layers.

    Raises:
        AdapterError: others act in the encoder than when its outputs were computed.
        UnsupportedModelError: a prompt did not arrive, or a graph is made that cannot be right.
    """
    if any(cast.adapters.values()):
        check_graph(backbone, inputs.text)
    adapters, ahead = list(cast.adapters.values()), inputs.columns is None and not is_exporting()
    with turn(backbone.model) as own:
        prompts = [Prompt() if a is None else _prompt(backbone, a, ahead=ahead) for a in adapters]
        changes = _changes(backbone, adapters, prompts, cast.rows)
        injection = None
        owners = _encoder_owners(backbone, cast, prompts)
        if inputs.encoder_outputs is not None:
            _check_encoder_outputs(inputs.encoder_outputs, owners, prompts)
        if any(adapters):
            changes_layers = changes.reach(backbone.stacks[0].module)
            injection = Injection(
                backbone,
                prompts,
                cast.rows,
                columns=inputs.columns,
                text_ends=_text_ends(backbone, prompts, inputs),
                packs=cast.rows is None or not changes_layers,
                trunk=None if changes_layers else trunk,
                encoder_owners=owners,
            )
            own.attach(injection.attached)
        own.attach(changes.acting)
        yield injection
        if injection is not None:
            injection.check_arrival(has_encoded=inputs.encoder_outputs is not None)


def _encoder_owners(backbone: Backbone, cast: Cast, prompts: Sequence[Prompt]) -> Owners:
    """Each row's adapter by name, or the one of all rows, where it acts in an encoder-decoder's encoder."""
    if not backbone.is_encoder_decoder:
        return ()
    encoder = backbone.stacks[0].module

    def acts(adapter: Adapter | None, prompt: Prompt) -> bool:
        reads = prompt.vectors is not None or any(site is Site.ENCODER for site, _ in prompt.prefixes)
        return reads or _changes(backbone, [adapter], [prompt]).reach(encoder)

    pairs = zip(cast.adapters.items(), prompts, strict=True)
    return cast._each([name if acts(adapter, prompt) else BASE for (name, adapter), prompt in pairs])


def _check_encoder_outputs(outputs: Any, owners: Owners, prompts: Sequence[Prompt]) -> None:
    if any(prompt.vectors is not None for prompt in prompts):
        raise AdapterError("encoder_outputs lack the virtual tokens: pass input_ids instead")
    others = owners_of(outputs[0])
    if differ(others, owners):
        raise AdapterError(
            f"encoder_outputs were computed with {named(others)}, not {named(owners)}: pass input_ids instead"
        )


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
        return computed_prompt(backbone, adapter, ahead=ahead)
    if module not in known:
        known[module] = computed_prompt(backbone, adapter, ahead=ahead)
    return known[module]


def computed_prompt(backbone: Backbone, adapter: Adapter, *, ahead: bool) -> Prompt:
    prompt: Prompt = adapter.module.prompt()
    if not ahead:
        return prompt
    with ModuleChanges(backbone, [], [adapter.heads]).acting():
        return run_ahead(backbone, prompt)


def _changes(
    backbone: Backbone, adapters: Sequence[Adapter | None], prompts: Sequence[Prompt], rows: Tensor | None = None
) -> ModuleChanges:
    """What adapters and their prompts do to the outputs of single modules."""
    return ModuleChanges(backbone, [p.additions for p in prompts], [a.heads if a else {} for a in adapters], rows)


def check_trunk(trunk: Trunk, adapters: Sequence[Adapter]) -> None:
    """Refuse to cache what no call with these adapters could use.

    Raises:
        UnsupportedModelError: the base model cannot leave its first layers out, or has dropout.
        ConfigError: every adapter acts in the first layer already.
    """
    depths = {_depth(trunk.backbone, adapter) for adapter in adapters} - {0}
    if trunk.backbone.packs and not depths:
        raise ConfigError(
            "the trunk cache keeps layers below a prefix, and every adapter here acts from the first layer on: "
            "set layers, such as 'last:10', or leave it out"
        )
    for depth in depths or {0}:
        trunk.check(depth)
    if trunk.backbone.is_random_in_training:
        raise UnsupportedModelError(
            "the base model has dropout, with which a text's layers are never the same twice: "
            "load it with dropout 0 or leave the trunk cache out"
        )


def _depth(backbone: Backbone, adapter: Adapter) -> int:
    """How many first layers an adapter leaves alone; asks for its prompt without drawing random numbers."""
    with evaluating(adapter.module):
        prompt = adapter.module.prompt()
    changes_layers = _changes(backbone, [adapter], [prompt]).reach(backbone.stacks[0].module)
    return 0 if changes_layers else untouched([prompt])


def _text_ends(backbone: Backbone, prompts: Sequence[Prompt], inputs: Inputs) -> Tensor | None:
    """[B] the column of each row's first label, or behind its text. None where nobody's virtual tokens stand there, or
    the answer is another sequence."""
    text, mask, labels = inputs.text, inputs.mask, inputs.labels
    if text is None or not any(prompt.after_text for prompt in prompts) or not backbone.continues_text:
        return None
    ends = row_ends(mask, len(text), text.shape[1], text.device)
    if labels is None:
        return ends
    supervised = labels != -100
    first = supervised.int().argmax(dim=1).maximum(row_starts(mask, len(text), text.device))
    return torch.where(supervised.any(dim=1), first, ends)


def claim(options: Mapping[str, Any], cast: Cast) -> None:
    """Note whose a call's cache is from now on, and refuse one that another adapter, or none, has begun.

    Raises:
        AdapterError: the cache among the options is not empty and belongs to others.
    """
    cache, is_begun = compat.cache_of(options), cached_length(options)[1]
    owners = owners_of(cache)
    if is_begun and differ(owners, cast.owners):
        raise AdapterError(f"the cache was computed with {named(owners)}, not {named(cast.owners)}: leave it out")
    sign(options, cast)


def sign(call: Any, cast: Cast) -> None:
    """Note whose keys and values the cache holds that is among a call's arguments, or in its output."""
    if (cache := compat.cache_of(call if isinstance(call, dict) else {})) is not None:
        sign_as(cache, cast.owners)
