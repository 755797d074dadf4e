"""Serializes the calls that attach hooks to a base model, whose modules all calls share.

Hooks affect everything that runs through a module. So a call opens a session, a re-entrant lock on the base model:
other threads wait until it ends, and its hooks are suspended during nested calls, such as those that a logits processor
makes in ``generate``. A model's attention is routed through softtune in sessions alone, so that between them nothing
of it is changed. 4-bit weights are not packed for inference there, so that training goes on after an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from softtune.backbone.interface import routed
from softtune.backbone.quantization import unpacked


class ModelSession:
    """One call's exclusive use of a base model, with the contexts that it has attached."""

    def __init__(self) -> None:
        self._contexts: list[Callable[[], AbstractContextManager[Any]]] = []
        self._attached = ExitStack()

    def attach(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        """Enter a context until the session ends, except during nested sessions; ``context`` makes it each time."""
        self._contexts.append(context)
        self._attached.enter_context(context())

    def suspend(self) -> None:
        """Exit all contexts."""
        self._attached.close()

    def resume(self) -> None:
        """Enter all contexts again."""
        for context in self._contexts:
            self._attached.enter_context(context())


class _Sessions:
    def __init__(self) -> None:
        self.lock = RLock()
        self.open: list[ModelSession] = []
        """Sessions that have begun, the innermost last."""


_SESSIONS: WeakKeyDictionary[nn.Module, _Sessions] = WeakKeyDictionary()


@contextmanager
def model_session(model: nn.Module) -> Iterator[ModelSession]:
    """Open a session with a base model for the length of the block. It begins with no hooks of outer sessions."""
    sessions = _SESSIONS.setdefault(model, _Sessions())
    with sessions.lock, routed(model), unpacked(model):
        for outer in sessions.open[-1:]:
            outer.suspend()
        session = ModelSession()
        sessions.open.append(session)
        try:
            yield session
        finally:
            session.suspend()
            sessions.open.pop()
            for outer in sessions.open[-1:]:
                outer.resume()
