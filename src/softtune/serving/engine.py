"""Requests of many adapters in one running batch of a decoder: each step reads the next tokens of all of them.

A request takes a place in the batch as another leaves it; long texts are read in parts, beside the tokens that others
write. Where the pool is full, the youngest request gives its place back and reads its text anew later. One thread runs
the steps.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from softtune.backbone import Backbone
from softtune.errors import ClosedError, FullError, TooLongError
from softtune.injection.pool import Pool
from softtune.methods.base import Prompt
from softtune.serving import baking
from softtune.serving.registry import Hot, Version
from softtune.serving.texts import Held, Reading, read
from softtune.serving.waiting import Ticket, Waiting

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is done at once."""

    rows: int = 64
    """Requests in the running batch."""
    waiting: int = 256
    """Requests that wait for a place in it."""
    tokens: int = 256
    """Tokens of a step; more of them let those who write wait longer for their next one."""
    slots: int = 16384
    """Tokens that all running texts have together, with the virtual ones of the adapters in memory."""
    hot: int = 64 * 2**20
    """Bytes of adapters to keep in memory."""


class HeldPrompt:
    """A prompt in memory, its prefix in the pool.

    Args:
        pool: the pool, with room for the prefix.
        prompt: the prompt.
    """

    def __init__(self, pool: Pool, prompt: Prompt) -> None:
        self._pool = pool
        self.held = Held.of(pool, prompt)
        tensors = [added for _, added in prompt.additions] + ([] if prompt.vectors is None else [prompt.vectors])
        self.bytes = len(self.held.slots) * pool.token_bytes + sum(tensor.nbytes for tensor in tensors)

    def release(self) -> None:
        self._pool.give(self.held.slots)


class Engine:
    """The running batch.

    Args:
        backbone: the base model, a decoder in evaluation mode.
        limits: how much is done at once.

    Raises:
        UnsupportedModelError: the model's layers do not take tokens of several texts in one row.
    """

    def __init__(self, backbone: Backbone, limits: Limits) -> None:
        self.backbone = backbone
        self.limits = limits
        self.pool = Pool(backbone, limits.slots)
        self.hot: Hot[HeldPrompt] = Hot(self._load)
        self.waiting = Waiting()
        self.running: list[Ticket] = []
        self._base = Held.of(self.pool, Prompt())
        self._work = threading.Condition()
        self._is_closed = False

    def submit(self, ticket: Ticket) -> None:
        """Let a request wait for its place.

        Raises:
            TooLongError: there will never be room for it.
            FullError: too many wait already.
            ClosedError: the engine is shutting down.
        """
        self._check_length(ticket)
        with self._work:
            if self._is_closed:
                raise ClosedError("the server is shutting down: try again later")
            if len(self.waiting) >= self.limits.waiting:
                raise FullError(f"{self.limits.waiting} requests are waiting: try again later")
            self.waiting.add(ticket)
            self._work.notify()

    def wake(self) -> None:
        """Let the thread look at what has been cancelled or retired."""
        with self._work:
            self._work.notify()

    def close(self, grace: float) -> None:
        """Take no more requests, and end the thread when all are done, or after some seconds, which fails the rest."""
        with self._work:
            self._is_closed = True
            self._work.notify()
        self._deadline = time.monotonic() + grace

    def run(self) -> None:
        """Step until closed."""
        self._deadline = float("inf")
        while not (self._is_closed and (self._is_idle or time.monotonic() > self._deadline)):
            try:
                self.step()
            except Exception as error:
                logger.exception("a step failed")
                self._fail(self.running, error)
            with self._work:
                self._work.wait_for(lambda: self._is_closed or not self._is_idle, timeout=0.5)
        self._fail([*self.running, *self.waiting], ClosedError("the server is shutting down"))

    @property
    def _is_idle(self) -> bool:
        return not self.running and not len(self.waiting)

    def step(self) -> None:
        """Read the next tokens of all that run."""
        self._drop_cancelled()
        self.hot.shrink(self.limits.hot)
        self._admit()
        plan = self._plan()
        if not plan:
            return
        logits = iter(read(self.backbone, self.pool, [reading for _, own in plan for reading in own]))
        for ticket, own in plan:
            ticket.job.take([next(logits) for _ in own])
            if ticket.job.is_done:
                self._leave(ticket)
                ticket.end()

    def _plan(self) -> list[tuple[Ticket, list[Reading]]]:
        """What each running request reads: first those that write, then those that came first."""
        plan: list[tuple[Ticket, list[Reading]]] = []
        left = self.limits.tokens
        for ticket in sorted(self.running, key=lambda ticket: ticket.job.pending > 1):
            if ticket not in self.running or not left:
                continue  # has given its place back, for one before it
            planned = sum(reading.count for _, own in plan for reading in own)
            self._make_room(planned + 1, keep=[*(t for t, _ in plan), ticket])
            if (room := min(left, self.pool.free - planned)) < 1:
                continue
            own = ticket.job.readings(room)
            left -= sum(reading.count for reading in own)
            plan.append((ticket, own))
        return plan

    def _admit(self) -> None:
        """Give places to those that wait, while there are places, and room to read their texts."""
        while len(self.running) < self.limits.rows and len(self.waiting):
            with self._work:
                ticket = self.waiting.first
                if self.running and self._needed(ticket) > self.pool.free + self._idle_slots:
                    return
                self.waiting.pop()
            try:
                held = self._base if ticket.version is None else self.hot.use(ticket.version).held
            except Exception as error:
                ticket.fail(error)
                ticket.end()
                continue
            ticket.job.start(held)
            self.running.append(ticket)

    def _needed(self, ticket: Ticket) -> int:
        return ticket.job.length + _virtual(ticket)

    @property
    def _idle_slots(self) -> int:
        """Slots of adapters that nobody uses."""
        return sum(len(prompt.held.slots) for prompt in self.hot.idle)

    def _make_room(self, slots: int, keep: list[Ticket]) -> None:
        """Free so many slots: those of adapters that nobody uses, then those of the youngest requests."""
        while self.pool.free < slots and self.hot.drop_one():
            pass
        for ticket in reversed(self.running):
            if self.pool.free >= slots:
                return
            if ticket not in keep:
                self._leave(ticket)
                with self._work:
                    self.waiting.add_first(ticket)

    def _load(self, version: Version) -> HeldPrompt:
        prompt = baking.read(version.file, self.backbone)
        self._make_room(prompt.num_virtual_tokens if prompt.prefixes else 0, keep=[])
        return HeldPrompt(self.pool, prompt)

    def _leave(self, ticket: Ticket) -> None:
        """Take a request's place."""
        self.running.remove(ticket)
        self.pool.give(ticket.job.slots)
        if ticket.version is not None:
            self.hot.done(ticket.version)

    def _drop_cancelled(self) -> None:
        with self._work:
            cancelled = self.waiting.remove_cancelled()
        for ticket in [ticket for ticket in self.running if ticket.is_cancelled]:
            self._leave(ticket)
            cancelled.append(ticket)
        for ticket in cancelled:
            ticket.end()

    def _fail(self, tickets: list[Ticket], error: Exception) -> None:
        for ticket in [*tickets]:
            if ticket in self.running:
                self._leave(ticket)
            ticket.fail(error)
            ticket.end()

    def _check_length(self, ticket: Ticket) -> None:
        virtual, longest = _virtual(ticket), ticket.job.longest
        limit = min(self.backbone.max_positions or self.limits.slots, self.limits.slots)
        if virtual + longest > limit:
            raise TooLongError(
                f"{ticket.job.length} tokens of text, {longest - ticket.job.length} to write and {virtual} virtual "
                f"ones are more than the {limit} that the model takes: shorten the text or lower max_tokens"
            )


def _virtual(ticket: Ticket) -> int:
    """P of a request's adapter."""
    return 0 if ticket.version is None else getattr(ticket.version.config, "num_virtual_tokens", 0)
