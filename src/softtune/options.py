"""Keyword options of PEFT's calls: those that act, and those that are accepted because they change nothing here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from softtune.errors import ConfigError

WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "autocast_adapter_dtype": (True,),
    "low_cpu_mem_usage": (True, False),
    "save_embedding_layers": ("auto", False),
}
"""Options of PEFT, and the values that change nothing here."""


def check_options(options: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The known options out of some; those of PEFT without effect here are dropped, others refused."""
    for name, value in options.items():
        if name not in known and value not in WITHOUT_EFFECT.get(name, ()):
            raise ConfigError(f"no option {name}={value!r}: use one of {', '.join([*known, *WITHOUT_EFFECT])}")
    return {name: value for name, value in options.items() if name in known}
