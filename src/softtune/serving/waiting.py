"""Requests that wait for their turn: one of each adapter after the other."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Generic, TypeVar

from softtune.errors import ClosedError, FullError
from softtune.serving.limits import Limits
from softtune.serving.registry import Version

Job = TypeVar("Job")


@dataclass(eq=False)
class Ticket(Generic[Job]):
    """A request."""

    version: Version | None
    """Whose it is; None for the base model."""
    job: Job
    fail: Callable[[Exception], None]
    """Told of the error that ended it."""
    end: Callable[[], None] = field(default=lambda: None)
    """Told that all is over with it, however it ended."""
    is_cancelled: bool = False
    """Set by anyone to give up on it; its place is free after the running step."""

    @property
    def virtual(self) -> int:
        """P of its adapter."""
        return 0 if self.version is None else self.version.facts.num_virtual_tokens


class Waiting(Generic[Job]):
    """The queue, which any thread may add to.

    Args:
        limits: how many may wait, beside those for whom there is a place.
        running: those who have the places, at any time.
    """

    def __init__(self, limits: Limits, running: Sequence[Ticket[Job]]) -> None:
        self._limits = limits
        self._running = running
        self.is_closed = False
        self._queues: OrderedDict[Version | None, deque[Ticket[Job]]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        with self._lock:
            return self._count

    @property
    def _count(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Ticket[Job]]:
        with self._lock:
            return iter([ticket for queue in self._queues.values() for ticket in queue])

    def add(self, ticket: Ticket[Job]) -> None:
        """Let a request wait behind the others of its adapter. Where too many wait, the last one of the adapter with
        most of them fails in its place.

        Raises:
            FullError: too many wait already, and no other adapter's are more than this one's.
            ClosedError: no more requests are taken.
        """
        full = FullError(f"{self._limits.waiting} requests are waiting: try again later")
        with self._lock:
            if self.is_closed:
                raise ClosedError("the server is shutting down: try again later")
            last = None
            if self._count >= self._limits.waiting + max(self._limits.rows - len(self._running), 0):
                longest = max(self._queues.values(), key=len)
                if len(self._queues.get(ticket.version, ())) + 1 >= len(longest):
                    raise full
                last = longest.pop()
            self._queues.setdefault(ticket.version, deque()).append(ticket)
        if last is not None:
            last.fail(full)
            last.end()

    def add_first(self, ticket: Ticket[Job]) -> None:
        """Before all others, where it had its turn already."""
        with self._lock:
            self._queues.setdefault(ticket.version, deque()).appendleft(ticket)
            self._queues.move_to_end(ticket.version, last=False)

    @property
    def first(self) -> Ticket[Job] | None:
        """The one whose turn it is."""
        with self._lock:
            return next((queue[0] for queue in self._queues.values()), None)

    def pop(self) -> Ticket[Job]:
        """Take out the first one, which there is; then it is the next adapter's turn."""
        with self._lock:
            version, queue = self._queues.popitem(last=False)
            ticket = queue.popleft()
            if queue:
                self._queues[version] = queue
            return ticket

    def remove(self, tickets: list[Ticket[Job]]) -> None:
        """Take out some."""
        with self._lock:
            for ticket in tickets:
                queue = self._queues[ticket.version]
                queue.remove(ticket)
                if not queue:
                    del self._queues[ticket.version]

    def remove_cancelled(self) -> list[Ticket[Job]]:
        """Take out those that were given up on."""
        cancelled = [ticket for ticket in self if ticket.is_cancelled]
        self.remove(cancelled)
        return cancelled
