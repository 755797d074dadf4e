"""The life of an engine's requests: waiting in the queue, running in the batch, then finished or aborted.

Knows nothing about what a step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from softtune.serving.adapter_cache import AdapterCache, Kept
from softtune.serving.engine_config import EngineConfig
from softtune.serving.registry import Version
from softtune.serving.request_queue import RequestHandle, RequestQueue


class BatchedRequest(Protocol):
    """A request that an engine runs in one step or several."""

    @property
    def is_done(self) -> bool:
        """Whether it has all its results."""
        ...


RequestType = TypeVar("RequestType", bound=BatchedRequest)
Output = TypeVar("Output")


class RunningBatch(Generic[RequestType, Kept]):
    """The running requests of one engine, with the queue of waiting ones and the cache of their adapters.

    Args:
        config: limits of the batch, the queue and memory.
        load: loads an adapter into memory.
        start: starts an admitted request with its adapter; None for the base model.
        free: frees what the engine holds for a request that leaves the batch.
    """

    def __init__(
        self,
        config: EngineConfig,
        load: Callable[[Version], Kept],
        start: Callable[[RequestHandle[RequestType], Kept | None], None] = lambda handle, adapter: None,
        free: Callable[[RequestHandle[RequestType]], None] = lambda handle: None,
    ) -> None:
        self._config = config
        self._start = start
        self._free = free
        self.running: list[RequestHandle[RequestType]] = []
        """The running requests, in the order of their admission."""
        self.queue: RequestQueue[RequestType] = RequestQueue(config, self.running)
        self.adapter_cache: AdapterCache[Kept] = AdapterCache(load)

    @property
    def is_idle(self) -> bool:
        """Whether no request is running or waiting."""
        return not self.running and not len(self.queue)

    def evict_idle_adapters(self) -> None:
        """Evict adapters that no request uses, down to the configured size of the adapter cache."""
        self.adapter_cache.shrink(self._config.adapter_cache_bytes)

    def admit(self, fits: Callable[[RequestHandle[RequestType]], bool]) -> None:
        """Start waiting requests while the batch has places.

        Args:
            fits: whether the next one can run beside the running ones. Where it cannot, no other is admitted either,
                since that could keep it waiting for ever.
        """
        while len(self.running) < self._config.max_num_seqs and (first := self.queue.first) is not None and fits(first):
            self._begin(self.queue.pop())

    def _begin(self, handle: RequestHandle[RequestType]) -> None:
        try:
            adapter = None if handle.version is None else self.adapter_cache.use(handle.version)
            self.running.append(handle)
            self._start(handle, adapter)
        except Exception as error:
            self.abort([handle], error)

    def process(self, handle: RequestHandle[RequestType], take: Callable[[Output], None], output: Output) -> None:
        """Have a running request take an output of a step; it is finished where it is done with it.

        An error in ``take`` aborts this request alone.
        """
        try:
            take(output)
        except Exception as error:
            self.abort([handle], error)
            return
        if handle.request.is_done:
            self._release(handle)
            handle.end()

    def preempt(self, handle: RequestHandle[RequestType]) -> None:
        """Take a running request out of the batch, and queue it before all others."""
        self._release(handle)
        self.queue.add_first(handle)

    def abort(self, handles: Sequence[RequestHandle[RequestType]], error: Exception) -> None:
        """End requests, running or not, with an error."""
        for handle in handles:
            if handle in self.running:
                self._release(handle)
            handle.fail(error)
            handle.end()

    def abort_cancelled(self) -> None:
        """End cancelled requests, waiting or running."""
        cancelled = self.queue.remove_cancelled()
        for handle in [handle for handle in self.running if handle.is_cancelled]:
            self._release(handle)
            cancelled.append(handle)
        for handle in cancelled:
            handle.end()

    def _release(self, handle: RequestHandle[RequestType]) -> None:
        """Take a running request out of the batch, and free what it holds."""
        self.running.remove(handle)
        self._free(handle)
        if handle.version is not None:
            self.adapter_cache.done(handle.version)
