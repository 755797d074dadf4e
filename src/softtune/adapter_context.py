"""Applies adapters to a base model for the duration of one call: prompts, biases, factors and heads, per row.

A row has an adapter, none, or several with one prefix behind the other.

Letters: B rows.

Internal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from softtune import compat
from softtune.adapter import Adapter
from softtune.backbone import Backbone, Site, cached_length, evaluating, install, model_session
from softtune.backbone.sharding import is_sharded
from softtune.errors import AdapterError, ConfigError, DataError, UnsupportedModelError
from softtune.injection import Injection
from softtune.injection.frozen_layer_cache import FrozenLayerCache, untouched
from softtune.injection.graphs import check_graph, is_exporting
from softtune.injection.layout import row_ends, row_starts
from softtune.injection.modules import ModuleChanges
from softtune.injection.prompt_to_kv import prompt_to_kv
from softtune.injection.provenance import BASE, AdapterNames, differ, joined_names, provenance_of, tag_provenance
from softtune.injection.sparse_logits import sparse_logits
from softtune.inputs import Inputs
from softtune.methods.kv_layout import composed
from softtune.methods.prompt import Prompt

_CACHED_PROMPTS: ContextVar[dict[tuple[nn.Module, int | None], Prompt] | None] = ContextVar(
    "_CACHED_PROMPTS", default=None
)
"""Prompts by the adapter's module and task, within ``prompts_cached``."""

OF_TASK = "/task "
"""Between an adapter's name, in which there is no slash, and one of its tasks."""
BEHIND = "+"
"""Between the names of adapters whose prefixes stand one behind the other."""


@dataclass(frozen=True)
class BatchAdapters:
    """The adapters of a batch, and which of them each row has."""

    adapters: dict[str, tuple[Adapter, ...]]
    """What rows have, by name, of adapters with several tasks by name and task: one adapter, none for the base model,
    or several whose prefixes stand one behind the other."""
    rows: Tensor | None = None
    """[B] index in ``adapters`` of what each row has; None if all rows have the same."""

    @classmethod
    def from_names(
        cls, names: Sequence[str], adapter: Callable[[str], Adapter], task_ids: Tensor | Sequence[int] | None = None
    ) -> BatchAdapters:
        """Look up adapters by one name for each row, or one name for all rows.

        Args:
            names: the names; where no adapter is named ``"a+b"``, that is the prefix of ``a`` with that of ``b`` behind
                it, see ``composed``.
            adapter: finds an adapter by its name.
            task_ids: [B] each row's task, for adapters with several.

        Raises:
            AdapterError: a name or task is unknown, the adapters are for several kinds of tasks, one has several
                tasks and there are no ``task_ids``, or one of several in a row has a head.
            DataError: there is not one task for each row.
        """
        found = {name: _found(name, adapter) for name in names}
        ids = _task_ids(task_ids, names, [a for parts in found.values() for a in parts])
        names = [names[0]] * len(ids) if len(names) == 1 else names
        each = [_of_tasks(name, found[name], task) for name, task in zip(names, ids, strict=True)]
        adapters, names = dict(each), [name for name, _ in each]
        if len(tasks := {a.config.task_type for parts in adapters.values() for a in parts}) > 1:
            raise AdapterError(
                f"adapter_names mixes tasks ({', '.join(sorted(str(t and t.value) for t in tasks))})",
                "one batch has one head, run them apart",
            )
        numbers = {name: number for number, name in enumerate(adapters)}
        return cls(adapters, torch.tensor([numbers[name] for name in names]) if len(adapters) > 1 else None)

    @property
    def by_name(self) -> dict[str, Adapter]:
        """The adapters by their own names, those with several tasks once, without the base model."""
        each = [pair for name, parts in self.adapters.items() for pair in _by_part(name, parts)]
        return {name.partition(OF_TASK)[0]: adapter for name, adapter in each}

    @property
    def adapter_names(self) -> AdapterNames:
        """The name of each row's adapter, or one name for all rows."""
        return self._each(list(self.adapters))

    def _each(self, names: Sequence[str]) -> AdapterNames:
        """For each row the element of ``names`` at its adapter's index, or the only element for all rows."""
        return tuple(names) if self.rows is None else tuple(names[i] for i in self.rows.tolist())


def _task_ids(
    task_ids: Tensor | Sequence[int] | None, names: Sequence[str], adapters: Sequence[Adapter]
) -> list[int | None]:
    """The task of each name, or of each row where there is one name for all."""
    if task_ids is None:
        return [None] * len(names)
    if isinstance(task_ids, Tensor) and is_exporting():
        raise UnsupportedModelError("a graph is for tasks that are fixed", "give task_ids as a list of numbers")
    ids: list[Any] = task_ids.tolist() if isinstance(task_ids, Tensor) else list(task_ids)
    if not isinstance(ids, list) or not all(isinstance(task, int) for task in ids) or len(names) not in (1, len(ids)):
        raise DataError(f"task_ids {ids} are not one whole number for each row", "give [B], counted from 0")
    if adapters and all(adapter.config.num_prompt_tasks is None for adapter in adapters):
        raise AdapterError("task_ids is for adapters with several tasks, and no row has one", "leave it out")
    return ids


def _found(name: str, adapter: Callable[[str], Adapter]) -> tuple[Adapter, ...]:
    """The adapters that a name stands for.

    Raises:
        AdapterError: there is no such adapter, or one of several has a head.
    """
    if name == BASE:
        return ()
    try:
        return (adapter(name),)
    except AdapterError:
        if BEHIND not in name:
            raise
    parts = tuple(adapter(part) for part in name.split(BEHIND))
    if headed := [part for part, found in _by_part(name, parts) if found.heads]:
        raise AdapterError(f"{headed[0]!r} has trained modules beside its prefix", f"run it apart from {name!r}")
    return parts


def _by_part(name: str, parts: tuple[Adapter, ...]) -> list[tuple[str, Adapter]]:
    """The adapters that a name stands for, with their own names."""
    return list(zip(name.split(BEHIND) if len(parts) > 1 else [name] * len(parts), parts, strict=True))


def _of_tasks(name: str, parts: tuple[Adapter, ...], task: int | None) -> tuple[str, tuple[Adapter, ...]]:
    """A row's adapters for its task, and what they are called together."""
    each = [_of_task(part, adapter, task) for part, adapter in _by_part(name, parts)]
    return BEHIND.join(part for part, _ in each) or name, tuple(adapter for _, adapter in each)


def _of_task(name: str, adapter: Adapter, task: int | None) -> tuple[str, Adapter]:
    """An adapter for a row's task, and what both are called."""
    tasks = adapter.config.num_prompt_tasks
    if tasks is None:
        return name, adapter
    if task is None and tasks > 1:
        raise AdapterError(
            f"adapter {name!r} has {tasks} tasks, and no row says which", "give each row's, as in task_ids=[0, 2]"
        )
    found = adapter.of_task(task or 0)
    return (name if found.task is None else f"{name}{OF_TASK}{found.task}"), found


@contextmanager
def apply_adapters(
    backbone: Backbone, batch: BatchAdapters, inputs: Inputs, layer_cache: FrozenLayerCache | None = None
) -> Iterator[Injection | None]:
    """Apply a batch's adapters to a base model within the ``with`` block.

    Calls from other threads wait until the block ends, and nested calls apply their own adapters. Layers that gradient
    checkpointing recomputes in the backward pass use the adapters of their first run.

    Args:
        backbone: the base model.
        batch: the adapters to apply.
        inputs: the call's inputs.
        layer_cache: caches the outputs of the layers below all prefixes; None if the call runs all layers.

    Yields:
        The injection, or None if no row has an adapter.

    Raises:
        AdapterError: the caller's ``encoder_outputs`` were computed with other adapters, or one of several in a row has
            more than a prefix in front of the text.
        AdapterMismatchError: the prefixes of a row are for different layers or positions.
        UnsupportedModelError: a prompt did not reach the layers, or ``torch`` makes a graph that cannot be right.
    """
    if any(batch.adapters.values()):
        check_graph(backbone, inputs.text)
        install(backbone.model)
    adapters, as_kv = list(batch.adapters.values()), inputs.columns is None and not is_exporting()
    if inputs.prefix_mask is not None:
        as_kv = False  # virtual tokens at the input have read those that it would hide
    if as_kv and torch.is_grad_enabled() and is_sharded(backbone.model):
        as_kv = False  # FSDP2 gathers a layer's weights for a gradient at its output alone, not at its keys
    with model_session(backbone.model) as session:
        prompts = [_joint_prompt(backbone, parts, as_kv=as_kv) for parts in adapters]
        rows = None if batch.rows is None else batch.rows.to(backbone.device)  # once, rather than once a layer
        changes = _changes(backbone, adapters, prompts, rows)
        injection = None
        adapter_names = _encoder_adapter_names(backbone, batch, prompts)
        if inputs.encoder_outputs is not None:
            _check_encoder_outputs(inputs.encoder_outputs, adapter_names, prompts)
        if any(adapters):
            changes_layers = changes.reach(backbone.stacks[0].module)
            injection = Injection(
                backbone,
                prompts,
                rows,
                columns=inputs.columns,
                text_ends=_text_ends(backbone, prompts, inputs),
                prefix_mask=inputs.prefix_mask,
                packs=rows is None or not changes_layers,
                layer_cache=None if changes_layers else layer_cache,
                encoder_adapters=adapter_names,
            )
            session.attach(injection.attached)
        session.attach(changes.applied)
        session.attach(partial(sparse_logits, backbone.model))
        yield injection
        if injection is not None:
            injection.check_arrival(has_encoded=inputs.encoder_outputs is not None)


def _encoder_adapter_names(backbone: Backbone, batch: BatchAdapters, prompts: Sequence[Prompt]) -> AdapterNames:
    """The name of each row's adapter, or one name for all rows, in the encoder of an encoder-decoder.

    Adapters that change nothing in the encoder count as the base model. Empty for models of other kinds.
    """
    if not backbone.is_encoder_decoder:
        return ()
    encoder = backbone.stacks[0].module

    def acts(parts: tuple[Adapter, ...], prompt: Prompt) -> bool:
        reads = prompt.vectors is not None or any(site is Site.ENCODER for site, _ in (*prompt.prefixes, *prompt.terms))
        return reads or _changes(backbone, [parts], [prompt]).reach(encoder)

    pairs = zip(batch.adapters.items(), prompts, strict=True)
    return batch._each([name if acts(parts, prompt) else BASE for (name, parts), prompt in pairs])


def _check_encoder_outputs(outputs: Any, adapter_names: AdapterNames, prompts: Sequence[Prompt]) -> None:
    if any(prompt.vectors is not None for prompt in prompts):
        raise AdapterError("encoder_outputs lack the virtual tokens", "pass input_ids instead")
    others = provenance_of(outputs[0])
    if differ(others, adapter_names):
        raise AdapterError(
            f"encoder_outputs were computed with {joined_names(others)}, not {joined_names(adapter_names)}",
            "pass input_ids instead",
        )


@contextmanager
def prompts_cached() -> Iterator[None]:
    """Compute each adapter's prompt once within the ``with`` block, where adapters and base model must not change."""
    token = _CACHED_PROMPTS.set({})
    try:
        yield
    finally:
        _CACHED_PROMPTS.reset(token)


def _joint_prompt(backbone: Backbone, parts: tuple[Adapter, ...], *, as_kv: bool) -> Prompt:
    """What the adapters of a row contribute together, see ``_prompt``.

    Raises:
        AdapterError, AdapterMismatchError: see ``composed``.
    """
    prompts = [_prompt(backbone, adapter, as_kv=as_kv) for adapter in parts]
    return composed(prompts) if len(prompts) > 1 else next(iter(prompts), Prompt())


def _prompt(backbone: Backbone, adapter: Adapter, *, as_kv: bool) -> Prompt:
    """An adapter's prompt, from the cache of ``prompts_cached`` if there is one.

    With ``as_kv``, virtual tokens at the input become keys and values where possible, computed with the adapter's heads
    in place of the base model's modules.
    """
    known, key = _CACHED_PROMPTS.get(), (adapter.module, adapter.task)
    if known is None or not as_kv or adapter.module.training or torch.is_grad_enabled():
        return computed_prompt(backbone, adapter, as_kv=as_kv)
    if key not in known:
        known[key] = computed_prompt(backbone, adapter, as_kv=as_kv)
    return known[key]


def computed_prompt(backbone: Backbone, adapter: Adapter, *, as_kv: bool) -> Prompt:
    prompt = adapter.prompt()
    if not as_kv:
        return prompt
    with ModuleChanges(backbone, [], [adapter.heads]).applied():
        return prompt_to_kv(backbone, prompt)


def _changes(
    backbone: Backbone,
    adapters: Sequence[tuple[Adapter, ...]],
    prompts: Sequence[Prompt],
    rows: Tensor | None = None,
) -> ModuleChanges:
    """The changes that adapters and their prompts make at single modules; several of one row have no heads."""
    heads = [parts[0].heads if parts else {} for parts in adapters]
    return ModuleChanges(backbone, [p.additions for p in prompts], heads, rows, scalings=[p.scalings for p in prompts])


def check_frozen_layer_cache(layer_cache: FrozenLayerCache, adapters: Sequence[Adapter]) -> None:
    """Check that calls with these adapters can use a frozen layer cache.

    Raises:
        UnsupportedModelError: the base model cannot skip its first layers, or has dropout.
        ConfigError: every adapter acts from the first layer on.
    """
    depths = {_depth(layer_cache.backbone, adapter) for adapter in adapters} - {0}
    if layer_cache.backbone.packs and not depths:
        raise ConfigError(
            "the trunk cache keeps layers below a prefix, and every adapter here acts from the first layer on",
            "set layers, such as 'last:10', or leave it out",
        )
    for depth in depths or {0}:
        layer_cache.check(depth)
    if layer_cache.backbone.is_random_in_training:
        raise UnsupportedModelError(
            "the base model has dropout, with which a text's layers are never the same twice",
            "load it with dropout 0 or leave the trunk cache out",
        )


def _depth(backbone: Backbone, adapter: Adapter) -> int:
    """Number of first layers that an adapter does not change. Computes its prompt without drawing random numbers."""
    with evaluating(adapter.module):
        prompt = adapter.of_task(0).prompt()  # that of another task reaches the same layers
    changes_layers = _changes(backbone, [(adapter,)], [prompt]).reach(backbone.stacks[0].module)
    return 0 if changes_layers else untouched([prompt])


def _text_ends(backbone: Backbone, prompts: Sequence[Prompt], inputs: Inputs) -> Tensor | None:
    """[B] column of each row's first label, or of the end of its text without labels.

    None if no prompt follows the text, or if the answer is another sequence.
    """
    text, mask, labels = inputs.text, inputs.mask, inputs.labels
    if text is None or not any(prompt.after_text for prompt in prompts) or not backbone.continues_text:
        return None
    ends = row_ends(mask, len(text), text.shape[1], text.device)
    if labels is None:
        return ends
    supervised = labels != -100
    first = supervised.int().argmax(dim=1).maximum(row_starts(mask, len(text), text.device))
    return torch.where(supervised.any(dim=1), first, ends)


def check_cache_provenance(options: Mapping[str, Any], batch: BatchAdapters) -> None:
    """Check that a call's KV cache was begun with the same adapters, and tag it with their names.

    Raises:
        AdapterError: the cache among the options is not empty and was computed with other adapters.
    """
    cache, is_begun = compat.cache_of(options), cached_length(options)[1]
    adapter_names = provenance_of(cache)
    if is_begun and differ(adapter_names, batch.adapter_names):
        raise AdapterError(
            f"the cache was computed with {joined_names(adapter_names)}, not {joined_names(batch.adapter_names)}",
            "leave it out",
        )
    tag_cache(options, batch)


def tag_cache(call: Any, batch: BatchAdapters) -> None:
    """Tag the KV cache in a call's arguments or output with the names of the adapters that computed it."""
    if (cache := compat.cache_of(call if isinstance(call, dict) else {})) is not None:
        tag_provenance(cache, batch.adapter_names)
