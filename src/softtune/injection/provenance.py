"""Tags a cache or an encoder's output with the adapters that computed it: other adapters must not continue from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BASE = "__base__"
"""PEFT's name for no adapter, in ``adapter_names``."""

AdapterNames = tuple[str, ...]
"""Each row's adapter name, or a single one for all rows."""


def tag_provenance(work: Any, adapter_names: AdapterNames) -> None:
    """Tag a cache, a list of states or a tensor with the adapters that computed it."""
    _carrier(work).softtune_adapters = adapter_names


def provenance_of(work: Any) -> AdapterNames:
    """Names of the adapters that computed an object; ``BASE`` where it has no tag."""
    adapter_names: AdapterNames = getattr(_carrier(work), "softtune_adapters", (BASE,))
    return adapter_names


def differ(adapter_names: AdapterNames, others: AdapterNames) -> bool:
    """Whether two tags disagree: they name more than one adapter, and not the same one for each row."""
    return len({*adapter_names, *others}) > 1 and adapter_names != others


def joined_names(adapter_names: Sequence[str]) -> str:
    """The adapters' names for an error message, each once."""
    return ", ".join("the base model" if name == BASE else name for name in dict.fromkeys(adapter_names))


def _carrier(work: Any) -> Any:
    return work[0] if isinstance(work, list) else work
