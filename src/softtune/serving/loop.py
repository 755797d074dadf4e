"""The one thread that works on all requests: a step of each lane that has any, one after the other."""

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
from softtune.serving.registry import Hot
from softtune.serving.waiting import Ticket, Waiting

logger = logging.getLogger(__name__)


class Lane(Protocol):
    """Works on requests of one kind."""

    backbone: Backbone
    """The base model."""
    waiting: Waiting[Any]
    hot: Hot[Any]

    def keep(self, adapter: Adapter, folder: Path, *, ahead: bool) -> None:
        """Write an adapter's inference form into a folder, its virtual tokens computed ahead where that is asked.

        Raises:
            UnsupportedModelError: there is no such form here.
        """
        ...

    def submit(self, ticket: Ticket[Any]) -> None:
        """Let a request wait for its turn.

        Raises:
            TooLongError: there will never be room for it.
            FullError: too many wait already.
            ClosedError: no more requests are taken.
        """
        ...

    def step(self) -> None:
        """Do some of the work, and tell what it came to."""
        ...

    @property
    def running(self) -> Sequence[Ticket[Any]]:
        """Requests that have been begun."""
        ...

    def leave(self, ticket: Ticket[Any]) -> None:
        """Let go of a request that has been begun."""
        ...


class TextLane(Lane, Protocol):
    """Writes and scores texts."""

    @property
    def longest(self) -> int:
        """Tokens that a text may have together with virtual ones."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether its steps can come to something."""
        ...

    def close(self) -> None:
        """No more steps come."""
        ...


class Loop:
    """The thread.

    Args:
        lanes: whose requests it works on; more may come.
    """

    def __init__(self, lanes: list[Lane]) -> None:
        self.lanes = lanes
        self._work = Event()
        self._deadline = float("inf")
        self._thread = Thread(target=self._run, name="softtune", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def wake(self) -> None:
        """There is something to do, or to give up on."""
        self._work.set()

    @property
    def is_alive(self) -> bool:
        """Whether it works."""
        return self._thread.is_alive()

    def end(self, grace: float) -> None:
        """Take no more requests, and end when all are done; after some seconds, the rest fail."""
        for lane in self.lanes:
            lane.waiting.is_closed = True
        self._deadline = min(self._deadline, time.monotonic() + grace)
        self.wake()

    def close(self, grace: float) -> None:
        """End, and wait for it."""
        self.end(grace)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_idle(self) -> bool:
        return not any(lane.running or len(lane.waiting) for lane in self.lanes)

    def _run(self) -> None:
        while time.monotonic() < self._deadline and not (self.is_idle and self._deadline < float("inf")):
            if self.is_idle:
                self._work.wait()
            self._work.clear()
            for lane in [*self.lanes]:
                try:
                    lane.step()
                except Exception as error:
                    logger.exception("a step failed")
                    fail(lane, [*lane.running], error)
        for lane in self.lanes:
            fail(lane, [*lane.running, *lane.waiting], ClosedError("the server is shutting down: try again later"))


def fail(lane: Lane, tickets: Sequence[Ticket[Any]], error: Exception) -> None:
    """End requests with an error."""
    for ticket in tickets:
        if ticket in lane.running:
            lane.leave(ticket)
        ticket.fail(error)
        ticket.end()


def drop_cancelled(lane: Lane) -> None:
    """End requests that were given up on."""
    cancelled = lane.waiting.remove_cancelled()
    for ticket in [ticket for ticket in lane.running if ticket.is_cancelled]:
        lane.leave(ticket)
        cancelled.append(ticket)
    for ticket in cancelled:
        ticket.end()
