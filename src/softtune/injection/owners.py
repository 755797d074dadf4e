"""Notes whose work a cache or an encoder's output is, on the object itself: others must not go on from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BASE = "__base__"
"""PEFT's name for no adapter, in ``adapter_names``."""

Owners = tuple[str, ...]
"""Each row's adapter by name, or the one of all rows."""


def sign(work: Any, owners: Owners) -> None:
    """Note whose it is: a cache, a list of states or a tensor."""
    _carrier(work).softtune_owners = owners


def owners_of(work: Any) -> Owners:
    """Whose it is; the base model's, where nothing is noted."""
    owners: Owners = getattr(_carrier(work), "softtune_owners", (BASE,))
    return owners


def differ(owners: Owners, others: Owners) -> bool:
    """Whether rows are neither all of one adapter, nor each of its own."""
    return len({*owners, *others}) > 1 and owners != others


def named(owners: Sequence[str]) -> str:
    """Their names, each once."""
    return ", ".join("the base model" if name == BASE else name for name in dict.fromkeys(owners))


def _carrier(work: Any) -> Any:
    return work[0] if isinstance(work, list) else work
