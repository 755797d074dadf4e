"""The one thread that runs all engines: while any has requests, it calls their ``step`` one after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any, Protocol

from softtune.adapter import Adapter
from softtune.backbone import Backbone
from softtune.errors import ClosedError
from softtune.serving.adapter_cache import AdapterCache
from softtune.serving.request_queue import RequestHandle, RequestQueue

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Runs requests of one kind."""

    backbone: Backbone
    """The base model."""
    queue: RequestQueue[Any]
    adapter_cache: AdapterCache[Any]

    def export_adapter(self, adapter: Adapter, folder: Path, *, as_kv: bool) -> None:
        """Write an adapter's inference form into a folder; with ``as_kv``, leading virtual tokens as keys and values.

        Raises:
            UnsupportedModelError: the engine cannot run the adapter.
        """
        ...

    def submit(self, handle: RequestHandle[Any]) -> None:
        """Queue a request.

        Raises:
            TooLongError: the request can never fit.
            FullError: too many requests are queued already.
            ClosedError: the engine takes no more requests.
        """
        ...

    def step(self) -> None:
        """Run one step, and pass its results to the requests."""
        ...

    @property
    def running(self) -> Sequence[RequestHandle[Any]]:
        """Requests that have been started."""
        ...

    def release(self, handle: RequestHandle[Any]) -> None:
        """Take a request out of the running ones, and free what it holds."""
        ...


class TextEngine(Engine, Protocol):
    """Runs a decoder's requests: generation and log-likelihoods."""

    @property
    def max_model_len(self) -> int:
        """Maximum length of a sequence in tokens, virtual tokens included."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether the engine can still run steps."""
        ...

    def close(self) -> None:
        """Shut the engine down; no step follows."""
        ...


class EngineThread:
    """Runs the steps of all engines in one thread.

    Args:
        engines: the engines; more may be appended while the thread runs.
    """

    def __init__(self, engines: list[Engine]) -> None:
        self.engines = engines
        self._work = Event()
        self._deadline = float("inf")
        self._thread = Thread(target=self._run, name="softtune", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Wake the thread: a request was submitted or cancelled."""
        self._work.set()

    @property
    def is_alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    def end(self, grace: float) -> None:
        """Refuse new requests, and stop once all others are done; after ``grace`` seconds the remaining ones fail."""
        for engine in self.engines:
            engine.queue.is_closed = True
        self._deadline = min(self._deadline, time.monotonic() + grace)
        self.wake()

    def close(self, grace: float) -> None:
        """Call ``end``, and wait until the thread has stopped."""
        self.end(grace)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_idle(self) -> bool:
        return not any(engine.running or len(engine.queue) for engine in self.engines)

    def _run(self) -> None:
        while time.monotonic() < self._deadline and not (self.is_idle and self._deadline < float("inf")):
            if self.is_idle:
                self._work.wait()
            self._work.clear()
            for engine in [*self.engines]:
                try:
                    engine.step()
                except Exception as error:
                    logger.exception("a step failed")
                    abort_with(engine, [*engine.running], error)
        for engine in self.engines:
            abort_with(
                engine, [*engine.running, *engine.queue], ClosedError("the server is shutting down: try again later")
            )


def abort_with(engine: Engine, handles: Sequence[RequestHandle[Any]], error: Exception) -> None:
    """End requests with an error."""
    for handle in handles:
        if handle in engine.running:
            engine.release(handle)
        handle.fail(error)
        handle.end()


def abort_cancelled(engine: Engine) -> None:
    """End cancelled requests, queued or running."""
    cancelled = engine.queue.remove_cancelled()
    for handle in [handle for handle in engine.running if handle.is_cancelled]:
        engine.release(handle)
        cancelled.append(handle)
    for handle in cancelled:
        handle.end()
