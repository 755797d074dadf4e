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
        self.waiting: Waiting[Judging] = Waiting(limits.waiting)
        self.running: list[Ticket[Judging]] = []
        self._collate = Collator(pad_token_id, padding_side="left")
        self.hot: Hot[HeldAdapter] = Hot(lambda version: HeldAdapter(baking.load(backbone, version.folder)))

    def keep(self, adapter: Adapter, folder: Path) -> None:
        """See ``Lane``."""
        checkpoint.save(folder, adapter, self.backbone)

    def submit(self, ticket: Ticket[Judging]) -> None:
        """Let a request wait for its turn. Raises FullError or ClosedError where it may not."""
        self.waiting.add(ticket)

    def step(self) -> None:
        """Answer as many requests as a batch has rows for, one at least."""
        drop_cancelled(self)
        count = 0
        while (ticket := self.waiting.first) is not None:
            count += len(ticket.job.examples)
            if self.running and count > self.limits.rows:
                break
            self.waiting.pop()
            self._begin(ticket)
        if self.running:
            self._answer([*self.running])
        self.hot.shrink(self.limits.hot)

    def _begin(self, ticket: Ticket[Judging]) -> None:
        assert ticket.version is not None
        try:
            self.hot.use(ticket.version)
        except Exception as error:
            ticket.fail(error)
            ticket.end()
            return
        self.running.append(ticket)

    def _answer(self, tickets: Sequence[Ticket[Judging]]) -> None:
        pairs = [(example, ticket.version) for ticket in tickets for example in ticket.job.examples]
        size = self.limits.rows
        parts = [pairs[first : first + size] for first in range(0, len(pairs), size)]
        each = iter([row for part in parts for row in self._forward(*zip(*part, strict=True))])
        for ticket in tickets:
            own = [next(each) for _ in ticket.job.examples]
            try:
                ticket.job.tell([tuple(checked(part) for part in row) for row in own])
            except Exception as error:  # of this request alone
                fail(self, [ticket], error)
                continue
            self.leave(ticket)
            ticket.end()

    @torch.no_grad()
    def _forward(self, examples: Sequence[Example], versions: Sequence[Version]) -> list[tuple[Tensor, ...]]:
        """What the head says to each example."""
        call: dict[str, Any] = {name: x.to(self.backbone.model.device) for name, x in self._collate(examples).items()}
        inputs = Inputs.of(call, call.pop("prompt_positions", None), self.backbone)
        cast = Cast.of(
            [str(v.number) for v in versions], {str(v.number): self._adapter(v) for v in versions}.__getitem__
        )
        with baked(), acting(self.backbone, cast, inputs):
            output = self.backbone.model(**call, return_dict=True)
        rows = zip(*(output[name].float().cpu() for name in self.outputs), strict=True)
        if not self.judges_tokens:
            return list(rows)
        lengths = [len(example.input_ids) for example in examples]
        return [tuple(part[-length:] for part in row) for row, length in zip(rows, lengths, strict=True)]

    def _adapter(self, version: Version) -> Adapter:
        return self.hot[version].adapter

    def leave(self, ticket: Ticket[Judging]) -> None:
        """See ``Lane``."""
        self.running.remove(ticket)
        assert ticket.version is not None
        self.hot.done(ticket.version)
