"""Lets adapters act in a base model for the length of one call: prompts, biases and heads, row by row.

Letters: B rows, N virtual tokens among the words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from softtune.adapter import Adapter
from softtune.backbone import Backbone, cache_of, cached_length, is_checkpointing
from softtune.errors import AdapterError, UnsupportedModelError
from softtune.injection import Injection
from softtune.injection.ahead import run_ahead
from softtune.injection.layout import row_ends, row_starts
from softtune.injection.modules import add_biases, replace_modules
from softtune.methods.base import Prompt
from softtune.methods.bitfit import BiasChanges

BASE = "__base__"
"""PEFT's name for no adapter, in ``adapter_names``."""


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


class Acting:
    """Puts adapters into a base model, and takes them out again.

    Under gradient checkpointing the layers run again in the backward pass, when the call is over: biases and heads then
    stay until the next call, or ``stop``.

    Args:
        backbone: the base model.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._handles: list[RemovableHandle] = []

    @contextmanager
    def __call__(
        self, cast: Cast, columns: Tensor | None = None, text_ends: Tensor | None = None
    ) -> Iterator[Injection | None]:
        """Let a cast act for the length of the block, which gets its injection where anyone acts.

        Args:
            cast: who acts.
            columns: [B, N] the column before which each virtual token stands.
            text_ends: [B] the column where each text ends.
        """
        self.stop()
        model, adapters = self.backbone.model, list(cast.adapters.values())
        prompts = [Prompt() if a is None else self._prompt(a, ahead=columns is None) for a in adapters]
        biases = [a.module.additions() if a and isinstance(a.module, BiasChanges) else [] for a in adapters]
        checkpoints = is_checkpointing(model) and torch.is_grad_enabled()
        if checkpoints and cast.rows is not None and any(biases):
            raise UnsupportedModelError(
                "gradient checkpointing loses which row has which biases: train rows with BitFit adapters without it"
            )
        with ExitStack() as stack:
            injection = None
            if any(adapters):
                injection = Injection(self.backbone, prompts, cast.rows, columns=columns, text_ends=text_ends)
                stack.enter_context(injection)
            self._handles += add_biases(model, biases, cast.rows)
            self._handles += replace_modules(model, [a.heads if a else {} for a in adapters], cast.rows)
            try:
                yield injection
            finally:
                if not checkpoints:
                    self.stop()

    def _prompt(self, adapter: Adapter, *, ahead: bool) -> Prompt:
        """What an adapter contributes; its virtual tokens run ahead through its own trained modules."""
        prompt: Prompt = adapter.module.prompt()
        if not ahead:
            return prompt
        with ExitStack() as stack:
            for handle in replace_modules(self.backbone.model, [adapter.heads]):
                stack.callback(handle.remove)
            return run_ahead(self.backbone, prompt)

    def stop(self) -> None:
        """Take out what a checkpointed call has left."""
        while self._handles:
            self._handles.pop().remove()


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
