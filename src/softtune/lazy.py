"""Public names of a room that are imported at their first use (PEP 562).

For rooms whose modules import what takes long, or what comes with an extra: whoever imports one of the modules imports
none of the others. Internal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from softtune.extras import require


def public_names(
    room: str, places: Mapping[str, str], *, extra: str | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a room, whose modules are found by their names too.

    Args:
        room: the package's ``__name__``.
        places: by public name the module in the room that has it; behind a colon its name there, if it has another.
        extra: the extra that the room needs. Without it, using a public name raises MissingExtraError.
    """

    def load(name: str) -> Any:
        if name not in places:
            if name.startswith("_") or find_spec(f"{room}.{name}") is None:
                raise AttributeError(f"module {room!r} has no attribute {name!r}")
            return import_module(f"{room}.{name}")
        if extra is not None:
            require(extra)
        module, _, own_name = places[name].partition(":")
        value = getattr(import_module(f"{room}.{module}"), own_name or name)
        setattr(sys.modules[room], name, value)  # to be found there from now on
        return value

    return load, lambda: sorted(places)
