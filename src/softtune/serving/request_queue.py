"""The queue of waiting requests, served round robin by adapter."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Generic, TypeVar

from softtune.errors import ClosedError, FullError
from softtune.serving.engine_config import EngineConfig
from softtune.serving.registry import Version

RequestType = TypeVar("RequestType")


@dataclass(eq=False)
class RequestHandle(Generic[RequestType]):
    """A submitted request, with its adapter and its callbacks."""

    version: Version | None
    """The adapter's version; None for the base model."""
    request: RequestType
    fail: Callable[[Exception], None]
    """Called with the error that ended the request."""
    end: Callable[[], None] = field(default=lambda: None)
    """Called when the request has ended, with or without an error."""
    is_cancelled: bool = False
    """Set by any thread to cancel the request; its place in the batch is free after the current step."""

    @property
    def num_virtual_tokens(self) -> int:
        """P, its adapter's number of virtual tokens."""
        return 0 if self.version is None else self.version.info.num_virtual_tokens


class RequestQueue(Generic[RequestType]):
    """The waiting requests of one engine. Any thread may add to it.

    Args:
        config: limits of the queue, and of the running batch.
        running: the running batch, which the engine keeps up to date.
    """

    def __init__(self, config: EngineConfig, running: Sequence[RequestHandle[RequestType]]) -> None:
        self._config = config
        self._running = running
        self.is_closed = False
        self._queues: OrderedDict[Version | None, deque[RequestHandle[RequestType]]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        with self._lock:
            return self._count

    @property
    def _count(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[RequestHandle[RequestType]]:
        with self._lock:
            return iter([handle for queue in self._queues.values() for handle in queue])

    def add(self, handle: RequestHandle[RequestType]) -> None:
        """Queue a request behind the others of its adapter.

        Where the queue is full, the last request of the adapter with most requests fails in its place.

        Raises:
            FullError: the queue is full, and no other adapter has more requests in it than this one would have.
            ClosedError: no more requests are taken.
        """
        full = FullError(f"{self._config.max_num_waiting} requests are waiting", "try again later")
        with self._lock:
            if self.is_closed:
                raise ClosedError("the server is shutting down", "try again later")
            last = None
            if self._count >= self._config.max_num_waiting + max(self._config.max_num_seqs - len(self._running), 0):
                longest = max(self._queues.values(), key=len)
                if len(self._queues.get(handle.version, ())) + 1 >= len(longest):
                    raise full
                last = longest.pop()
            self._queues.setdefault(handle.version, deque()).append(handle)
        if last is not None:
            last.fail(full)
            last.end()

    def add_first(self, handle: RequestHandle[RequestType]) -> None:
        """Queue a preempted request before all others."""
        with self._lock:
            self._queues.setdefault(handle.version, deque()).appendleft(handle)
            self._queues.move_to_end(handle.version, last=False)

    @property
    def first(self) -> RequestHandle[RequestType] | None:
        """The next request; None where the queue is empty."""
        with self._lock:
            return next((queue[0] for queue in self._queues.values()), None)

    def pop(self) -> RequestHandle[RequestType]:
        """Remove and return the next request of a queue that is not empty; the next adapter follows."""
        with self._lock:
            version, queue = self._queues.popitem(last=False)
            handle = queue.popleft()
            if queue:
                self._queues[version] = queue
            return handle

    def remove_cancelled(self) -> list[RequestHandle[RequestType]]:
        """Remove and return cancelled requests."""
        with self._lock:
            cancelled = [handle for queue in self._queues.values() for handle in queue if handle.is_cancelled]
            for handle in cancelled:
                queue = self._queues[handle.version]
                queue.remove(handle)
                if not queue:
                    del self._queues[handle.version]
        return cancelled
