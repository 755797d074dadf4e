"""Lets one call at a time change a base model, whose modules all calls share.

Hooks and the like act on whatever runs through a module. So a call takes a turn: other threads wait for its end, and
what it has attached is suspended for the length of a call within it, such as a logits processor's in ``generate``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn


class Turn:
    """One call's time with a base model."""

    def __init__(self) -> None:
        self._contexts: list[Callable[[], AbstractContextManager[Any]]] = []
        self._attached = ExitStack()

    def attach(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        """Be in a context for the rest of the turn, but for the calls within it; ``context`` makes it each time."""
        self._contexts.append(context)
        self._attached.enter_context(context())

    def suspend(self) -> None:
        """Leave all contexts."""
        self._attached.close()

    def resume(self) -> None:
        """Enter them again."""
        for context in self._contexts:
            self._attached.enter_context(context())


class _Turns:
    def __init__(self) -> None:
        self.lock = RLock()
        self.open: list[Turn] = []
        """Those that have begun, the innermost last."""


_TURNS: WeakKeyDictionary[nn.Module, _Turns] = WeakKeyDictionary()


@contextmanager
def turn(model: nn.Module) -> Iterator[Turn]:
    """A turn with a base model for the length of the block. It begins with nothing attached to the model."""
    turns = _TURNS.setdefault(model, _Turns())
    with turns.lock:
        for outer in turns.open[-1:]:
            outer.suspend()
        own = Turn()
        turns.open.append(own)
        try:
            yield own
        finally:
            own.suspend()
            turns.open.pop()
            for outer in turns.open[-1:]:
                outer.resume()
