"""What requests want of a decoder: a text to be gone on with, or the probabilities of some answers to it.

A job says which tokens it wants to be read next, and takes their logits. Knows nothing about other jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from softtune.errors import RequestError, TooLongError
from softtune.serving.sampling import Choice, Sampler, Sampling, Writer
from softtune.serving.texts import Held, Reading, Text


class Job(Protocol):
    """One request's work."""

    is_done: bool
    """Whether there is nothing more to read."""

    def start(self, held: Held) -> None:
        """Begin, or begin to read anew, with the adapter in the pool."""
        ...

    def readings(self, budget: int) -> list[Reading]:
        """What to read next, of no more tokens than the budget, which is 1 at least; nothing where all is done."""
        ...

    def take(self, logits: Sequence[Tensor]) -> None:
        """What was read: for each reading the logits [keep, V]."""
        ...

    @property
    def slots(self) -> Tensor:
        """All slots that the job has in the pool."""
        ...

    @property
    def pending(self) -> int:
        """How many tokens it wants to be read."""
        ...

    @property
    def length(self) -> int:
        """Tokens that are to be read before it can answer, without virtual ones."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of its longest text, without virtual ones."""
        ...

    @property
    def most(self) -> int:
        """Tokens that it has in the pool at most, without virtual ones."""
        ...


class Writing:
    """Goes on with a text.

    Args:
        words: the text.
        asked: how its tokens are chosen, and when it ends.
        writer: makes text of them.
        ends: tokens that end a text.
        tell: told of each token with the text that it adds, which may be late, and of why it was the last one.
    """

    def __init__(
        self,
        words: Sequence[int],
        asked: Sampling,
        writer: Writer,
        ends: frozenset[int],
        tell: Callable[[Choice | None, str, str | None], None],
    ) -> None:
        self.words = words
        self.asked = asked
        self.written: list[int] = []
        self.is_done = False
        self._sampler = Sampler(asked)
        self._writer = writer
        self.ends = ends
        self._tell = tell
        self._text: Text | None = None

    def start(self, held: Held) -> None:
        self._text = Text.of(held, self.words)
        self._text.tokens += self.written

    def readings(self, budget: int) -> list[Reading]:
        if self.is_done or self._text is None:
            return []
        count = min(budget, self._text.pending)
        return [Reading(self._text, count, keep=int(count == self._text.pending))]

    def take(self, logits: Sequence[Tensor]) -> None:
        assert self._text is not None
        for row in checked(logits[0]):
            choice = self._sampler.choose(row)
            self._text.tokens.append(choice.token)
            self.add(choice)

    def add(self, choice: Choice) -> None:
        """Write one more token."""
        self.written.append(choice.token)
        text, stops = ("", True) if choice.token in self.ends else self._writer.write(choice.token)
        reason = "stop" if stops else "length" if len(self.written) == self.asked.max_tokens else None
        if reason == "length" or choice.token in self.ends:
            text += self._writer.rest()
        self.is_done = reason is not None
        self._tell(choice, text, reason)

    @property
    def slots(self) -> Tensor:
        return _none() if self._text is None else self._text.slots

    @property
    def pending(self) -> int:
        return 0 if self._text is None else self._text.pending

    @property
    def length(self) -> int:
        return len(self.words) + len(self.written)

    @property
    def longest(self) -> int:
        return len(self.words) + self.asked.max_tokens

    @property
    def most(self) -> int:
        return self.longest


class Scoring:
    """Tells the log-probabilities of answers to a text, which is read once for all of them.

    Args:
        words: the text.
        answers: tokens of each.
        tell: told each answer's log-probability.
        places: before which of the words virtual tokens stand; where the adapter says so by default.
    """

    def __init__(
        self,
        words: Sequence[int],
        answers: Sequence[Sequence[int]],
        tell: Callable[[list[float]], None],
        places: Sequence[int] | None = None,
    ) -> None:
        self.words = words
        self.answers = answers
        self.places = places
        self._tell = tell
        self._text: Text | None = None
        self._scores: list[float] = []
        self._branches: dict[int, Text] = {}
        """The text with all but the last token of an answer of several, by the answer's number."""
        self._asked: list[tuple[int, Reading]] = []
        self.is_done = False

    def start(self, held: Held) -> None:
        self._text, self._scores, self._branches = Text.of(held, self.words, self.places), [], {}

    def readings(self, budget: int) -> list[Reading]:
        if self.is_done or self._text is None:
            return []
        if self._text.pending:
            count = min(budget, self._text.pending)
            return [Reading(self._text, count, keep=int(count == self._text.pending))]
        self._asked = []
        for number, branch in self._branches.items():
            count = min(budget, branch.pending)
            if count:
                self._asked.append((number, Reading(branch, count, keep=count)))
            budget -= count
        return [reading for _, reading in self._asked]

    def take(self, logits: Sequence[Tensor]) -> None:
        assert self._text is not None
        for rows in logits:
            checked(rows)
        if not self._scores and len(logits[0]):
            self._begin(self._text, logits[0][0].float().log_softmax(-1))
        elif self._scores:
            for (number, reading), own in zip(self._asked, logits, strict=True):
                first = len(reading.text.slots) - reading.count - len(self._text.slots) + 1
                answer = torch.tensor(self.answers[number][first : first + reading.count], device=own.device)
                self._scores[number] += float(own.float().log_softmax(-1).gather(1, answer[:, None]).sum())
        if self._scores and not any(branch.pending for branch in self._branches.values()):
            self.end(self._scores)

    def end(self, scores: list[float]) -> None:
        """Tell each answer's log-probability."""
        self.is_done = True
        self._tell(scores)

    def _begin(self, text: Text, logprobs: Tensor) -> None:
        """Score the first token of each answer [V], and read on behind those that have more."""
        self._scores = [float(logprobs[answer[0]]) for answer in self.answers]
        for number, answer in enumerate(self.answers):
            if len(answer) > 1:
                self._branches[number] = Text(text.held, [*text.tokens, *answer[:-1]], text.end, text.slots)

    @property
    def slots(self) -> Tensor:
        if self._text is None:
            return _none()
        shared = len(self._text.slots)
        return torch.cat([self._text.slots, *(branch.slots[shared:] for branch in self._branches.values())])

    @property
    def pending(self) -> int:
        text = 0 if self._text is None else self._text.pending
        return text + sum(branch.pending for branch in self._branches.values())

    @property
    def length(self) -> int:
        return len(self.words)

    @property
    def longest(self) -> int:
        return len(self.words) + max(len(answer) - 1 for answer in self.answers)

    @property
    def most(self) -> int:
        return len(self.words) + sum(len(answer) - 1 for answer in self.answers)


def checked(logits: Tensor) -> Tensor:
    """The same. Raises RequestError where one is no number."""
    if bool(logits.isnan().any()):
        raise RequestError("the adapter makes the model answer what is no number: train it anew at a lower rate")
    return logits


def check_length(job: Job, virtual: int, longest: int) -> None:
    """Raise TooLongError where there will never be room for a job: for its tokens, together with virtual ones."""
    if virtual + job.longest > longest:
        raise TooLongError(
            f"{job.length} tokens of text, {job.longest - job.length} to write and {virtual} virtual ones are more "
            f"than the {longest} that there is room for: shorten the text or lower max_tokens"
        )


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.long)
