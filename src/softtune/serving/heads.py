"""Requests of many adapters with trained heads in batches: a classifier's, a tagger's, a reader's.

A batch has rows of whatever adapters wait, of one kind of head; each is answered at once, and whole. Letters: T tokens
of an example, N classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softtune import checkpoint
from softtune.acting import Cast, acting, baked
from softtune.adapter import Adapter
from softtune.backbone import Backbone
from softtune.data import Collator, Example
from softtune.errors import TooLongError
from softtune.inputs import Inputs
from softtune.methods import TaskType
from softtune.serving import baking
from softtune.serving.jobs import checked
from softtune.serving.limits import Limits
from softtune.serving.loop import drop_cancelled, fail
from softtune.serving.registry import Hot, Version
from softtune.serving.waiting import Ticket, Waiting

OUTPUTS = {
    TaskType.SEQ_CLS: ("logits",),
    TaskType.TOKEN_CLS: ("logits",),
    TaskType.QUESTION_ANS: ("start_logits", "end_logits"),
}
"""What each kind of head tells."""


MOST_BATCHES = 4
"""That one request may fill."""


@dataclass(frozen=True)
class Judging:
    """Some examples, and who wants to know what a head says to them."""

    examples: Sequence[Example]
    tell: Callable[[list[tuple[Tensor, ...]]], None]
    """Told for each example the head's outputs: logits [N], or [T, N], or [T] of first and [T] of last tokens."""


class HeldAdapter:
    """An adapter in memory.

    Args:
        adapter: the adapter.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        tensors = [*adapter.baked_state().values(), *adapter.head_state().values()]
        self.bytes = sum(tensor.nbytes for tensor in tensors)

    def release(self) -> None:
        """Nothing but this object holds it."""


class Heads:
    """The batches of one kind of head.

    Args:
        backbone: the base model with such a head, in evaluation mode.
        task: what the head is for.
        pad_token_id: what fills up shorter rows.
        limits: how much is done at once.
    """

    def __init__(self, backbone: Backbone, task: TaskType, pad_token_id: int, limits: Limits) -> None:
        self.backbone = backbone
        self.outputs = OUTPUTS[task]
        self.judges_tokens = task is not TaskType.SEQ_CLS
        self.limits = limits
        self.running: list[Ticket[Judging]] = []
        self.waiting: Waiting[Judging] = Waiting(limits, self.running)
        self._found: dict[Ticket[Judging], list[tuple[Tensor, ...]]] = {}
        """What the head has said so far to the examples of those that have been begun."""
        self._collate = Collator(pad_token_id, padding_side="left")
        self.hot: Hot[HeldAdapter] = Hot(lambda version: HeldAdapter(baking.load(backbone, version.folder)))

    def keep(self, adapter: Adapter, folder: Path, *, ahead: bool) -> None:
        """See ``Lane``."""
        checkpoint.save(folder, adapter, self.backbone)

    def submit(self, ticket: Ticket[Judging]) -> None:
        """See ``Lane``. Raises TooLongError for more rows than some batches have."""
        if len(ticket.job.examples) > MOST_BATCHES * self.limits.rows:
            raise TooLongError(f"the text has {len(ticket.job.examples)} parts: shorten it")
        self.waiting.add(ticket)

    def step(self) -> None:
        """Run one batch of rows of those whose turn it is, and answer those of whom it was the last one."""
        drop_cancelled(self)
        while self.waiting.first is not None and len(self._pending) < self.limits.rows:
            self._begin(self.waiting.pop())
        if rows := self._next_rows():
            outputs = self._forward([example for _, example in rows], [_version(ticket) for ticket, _ in rows])
            for (ticket, _), output in zip(rows, outputs, strict=True):
                self._found[ticket].append(output)
            for ticket in [t for t in self.running if len(self._found[t]) == len(t.job.examples)]:
                self._answer(ticket)
        self.hot.shrink(self.limits.hot)

    def _next_rows(self) -> list[tuple[Ticket[Judging], Example]]:
        """Rows for a batch, which all have places for as many virtual tokens: those of the first one's kind."""
        pending = self._pending
        alike = [row for row in pending if _num_places(row[1]) == _num_places(pending[0][1])]
        return alike[: self.limits.rows]

    @property
    def _pending(self) -> list[tuple[Ticket[Judging], Example]]:
        """Rows that have not been run, of all that have been begun."""
        return [(ticket, row) for ticket in self.running for row in ticket.job.examples[len(self._found[ticket]) :]]

    def _begin(self, ticket: Ticket[Judging]) -> None:
        try:
            self.hot.use(_version(ticket))
        except Exception as error:
            fail(self, [ticket], error)
            return
        self._found[ticket] = []
        self.running.append(ticket)

    def _answer(self, ticket: Ticket[Judging]) -> None:
        try:
            ticket.job.tell([tuple(checked(part) for part in row) for row in self._found[ticket]])
        except Exception as error:  # of this request alone
            fail(self, [ticket], error)
            return
        self.leave(ticket)
        ticket.end()

    @torch.no_grad()
    def _forward(self, examples: Sequence[Example], versions: Sequence[Version]) -> list[tuple[Tensor, ...]]:
        """What the head says to each example."""
        call: dict[str, Any] = {name: x.to(self.backbone.model.device) for name, x in self._collate(examples).items()}
        inputs = Inputs.of(call, call.pop("prompt_positions", None), self.backbone)
        adapters = {str(version.number): self.hot[version].adapter for version in versions}
        cast = Cast.of([str(version.number) for version in versions], adapters.__getitem__)
        with baked(), acting(self.backbone, cast, inputs):
            output = self.backbone.model(**call, return_dict=True)
        rows = zip(*(output[name].float().cpu() for name in self.outputs), strict=True)
        if not self.judges_tokens:
            return list(rows)
        lengths = [len(example.input_ids) for example in examples]
        return [tuple(part[-length:] for part in row) for row, length in zip(rows, lengths, strict=True)]

    def leave(self, ticket: Ticket[Judging]) -> None:
        """See ``Lane``."""
        self.running.remove(ticket)
        del self._found[ticket]
        self.hot.done(_version(ticket))


def _num_places(example: Example) -> int:
    return len(example.prompt_positions or ())


def _version(ticket: Ticket[Judging]) -> Version:
    assert ticket.version is not None
    return ticket.version
