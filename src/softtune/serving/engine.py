"""Requests of many adapters in one running batch of a decoder: each step reads the next tokens of all of them.

A request takes a place in the batch as another leaves it; long texts are read in parts, beside the tokens that others
write. Where the pool is full, the youngest request gives its place back and reads its text anew later.
"""

from __future__ import annotations

from pathlib import Path

from softtune.adapter import Adapter
from softtune.backbone import Backbone
from softtune.errors import TooLongError
from softtune.injection.pool import Pool
from softtune.methods.base import Prompt
from softtune.serving import baking
from softtune.serving.jobs import Job, check_length
from softtune.serving.limits import Limits
from softtune.serving.loop import drop_cancelled, fail
from softtune.serving.registry import Hot, Version
from softtune.serving.texts import Held, Reading, read
from softtune.serving.waiting import Ticket, Waiting


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
        self.running: list[Ticket[Job]] = []
        self.waiting: Waiting[Job] = Waiting(limits, self.running)
        self._base = Held.of(self.pool, Prompt())

    def keep(self, adapter: Adapter, folder: Path, *, ahead: bool) -> None:
        """See ``Lane``."""
        baking.save(baking.bake(self.backbone, adapter, ahead=ahead), self.backbone, folder)

    @property
    def longest(self) -> int:
        """Tokens that a text may have together with virtual ones."""
        return min(self.backbone.max_positions or self.limits.slots, self.limits.slots)

    def submit(self, ticket: Ticket[Job]) -> None:
        """Let a request wait for its place.

        Raises:
            TooLongError: there will never be room for it.
            FullError: too many wait already.
            ClosedError: no more requests are taken.
        """
        check_length(ticket.job, ticket.virtual, self.longest)
        if ticket.virtual + ticket.job.most > self.limits.slots:
            raise TooLongError(
                f"the answers to choose from have {ticket.job.most} tokens with the text, more than the "
                f"{self.limits.slots} that there is room for: ask for fewer"
            )
        self.waiting.add(ticket)

    def step(self) -> None:
        """Read the next tokens of all that run."""
        drop_cancelled(self)
        self.hot.shrink(self.limits.hot)
        self._admit()
        plan = self._plan()
        if not plan:
            return
        logits = iter(read(self.backbone, self.pool, [reading for _, own in plan for reading in own]))
        for ticket, own in plan:
            each = [next(logits) for _ in own]
            try:
                ticket.job.take(each)
            except Exception as error:  # of this request alone
                fail(self, [ticket], error)
                continue
            if ticket.job.is_done:
                self.leave(ticket)
                ticket.end()

    def _plan(self) -> list[tuple[Ticket[Job], list[Reading]]]:
        """What each running request reads: first those that write, then those that came first."""
        plan: list[tuple[Ticket[Job], list[Reading]]] = []
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
        while len(self.running) < self.limits.rows and (first := self.waiting.first) is not None:
            planned = sum(ticket.job.pending for ticket in self.running)
            if self.running and first.job.length + first.virtual + planned > self.pool.free + self._idle_slots:
                return
            ticket = self.waiting.pop()
            try:
                held = self._base if ticket.version is None else self.hot.use(ticket.version).held
            except Exception as error:
                fail(self, [ticket], error)
                continue
            ticket.job.start(held)
            self.running.append(ticket)

    @property
    def _idle_slots(self) -> int:
        """Slots of adapters that nobody uses."""
        return sum(len(prompt.held.slots) for prompt in self.hot.idle)

    def _make_room(self, slots: int, keep: list[Ticket[Job]]) -> None:
        """Free so many slots: those of adapters that nobody uses, then those of the youngest requests."""
        while self.pool.free < slots and self.hot.drop_one():
            pass
        for ticket in reversed(self.running):
            if self.pool.free >= slots:
                return
            if ticket not in keep:
                self.leave(ticket)
                self.waiting.add_first(ticket)

    def _load(self, version: Version) -> HeldPrompt:
        prompt = baking.read(version.folder, self.backbone)
        self._make_room(prompt.num_virtual_tokens if prompt.prefixes else 0, keep=[])
        return HeldPrompt(self.pool, prompt)

    def leave(self, ticket: Ticket[Job]) -> None:
        """Take a request's place."""
        self.running.remove(ticket)
        self.pool.give(ticket.job.slots)
        if ticket.version is not None:
            self.hot.done(ticket.version)

    @property
    def is_alive(self) -> bool:
        """See ``TextLane``: nothing runs but its steps."""
        return True

    def close(self) -> None:
        """See ``TextLane``."""
