"""The one thread that runs all engines: while any has requests, it calls their ``step`` one after the other."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from threading import Event, Thread
from typing import Any, Protocol

from softtune.adapter import Adapter
from softtune.backbone import Backbone
from softtune.errors import ClosedError
from softtune.serving.request_queue import RequestHandle
from softtune.serving.running_batch import RunningBatch

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Runs requests of one kind."""

    backbone: Backbone
    """The base model."""
    batch: RunningBatch[Any, Any]
    """Its requests, waiting and running."""

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
        engines: the engines to begin with.
    """

    def __init__(self, engines: list[Engine]) -> None:
        self.engines = engines
        self._work = Event()
        self._is_ending = False
        self._deadline = float("inf")
        self._thread = Thread(target=self._run, name="softtune", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def add(self, engine: Engine) -> None:
        """Run one more engine; its queue is closed where the thread is ending."""
        self.engines.append(engine)
        engine.batch.queue.is_closed = self._is_ending

    def wake(self) -> None:
        """Wake the thread: a request was submitted or cancelled."""
        self._work.set()

    @property
    def is_alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    def end(self, grace: float) -> None:
        """Refuse new requests, and stop once all others are done; after ``grace`` seconds the remaining ones fail."""
        self._is_ending = True
        for engine in [*self.engines]:
            engine.batch.queue.is_closed = True
        self._deadline = min(self._deadline, time.monotonic() + grace)
        self.wake()

    def close(self, grace: float) -> None:
        """Call ``end``, and wait until the thread has stopped."""
        self.end(grace)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_idle(self) -> bool:
        return all(engine.batch.is_idle for engine in self.engines)

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
                    engine.batch.abort([*engine.batch.running], error)
        for engine in self.engines:
            requests = [*engine.batch.running, *engine.batch.queue]
            engine.batch.abort(requests, ClosedError("the server is shutting down", "try again later"))
