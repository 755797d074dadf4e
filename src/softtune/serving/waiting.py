"""Requests that wait for a place in the running batch: one of each adapter in turn."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from softtune.serving.jobs import Job
from softtune.serving.registry import Version


@dataclass(eq=False)
class Ticket:
    """A request in the engine."""

    version: Version | None
    """Whose it is; None for the base model."""
    job: Job
    fail: Callable[[Exception], None]
    """Told of the error that ended it."""
    end: Callable[[], None] = field(default=lambda: None)
    """Told that the engine has let go of it, however it ended."""
    is_cancelled: bool = False
    """Set by anyone to give up on it; its place is free after the running step."""


class Waiting:
    """The queue."""

    def __init__(self) -> None:
        self._queues: OrderedDict[Version | None, deque[Ticket]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Ticket]:
        for queue in self._queues.values():
            yield from queue

    def add(self, ticket: Ticket) -> None:
        """Behind the others of its adapter."""
        self._queues.setdefault(ticket.version, deque()).append(ticket)

    def add_first(self, ticket: Ticket) -> None:
        """Before all others, where it had a place already."""
        self._queues.setdefault(ticket.version, deque()).appendleft(ticket)
        self._queues.move_to_end(ticket.version, last=False)

    @property
    def first(self) -> Ticket:
        """The one whose turn it is, if any waits."""
        return next(iter(self._queues.values()))[0]

    def pop(self) -> Ticket:
        """Take out the first one; then it is the next adapter's turn."""
        version = self.first.version
        queue = self._queues.pop(version)
        ticket = queue.popleft()
        if queue:
            self._queues[version] = queue
        return ticket

    def remove_cancelled(self) -> list[Ticket]:
        """Take out those that were given up on."""
        cancelled = [ticket for ticket in self if ticket.is_cancelled]
        for ticket in cancelled:
            queue = self._queues[ticket.version]
            queue.remove(ticket)
            if not queue:
                del self._queues[ticket.version]
        return cancelled
