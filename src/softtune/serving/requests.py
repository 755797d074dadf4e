"""The two kinds of requests to a decoder: generation from a text, and log-likelihoods of given answers to it.

A request names the tokens to run next, and takes their logits. Knows nothing about other requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from softtune.errors import RequestError, TooLongError
from softtune.serving.sampling import IncrementalDetokenizer, SampledToken, Sampler, SamplingParams
from softtune.serving.sequence import LoadedPrompt, ScheduledChunk, TokenSequence


class EngineRequest(Protocol):
    """The state of one request, as the scheduler sees it."""

    is_done: bool
    """Whether no tokens are left to run."""

    def start(self, prompt: LoadedPrompt) -> None:
        """Start, or restart after preemption, with the adapter's prompt in the KV pool."""
        ...

    def schedule(self, budget: int) -> list[ScheduledChunk]:
        """The next chunks to run, at most ``budget`` (1 or more) tokens in total; none where the request is done."""
        ...

    def process_logits(self, logits: Sequence[Tensor]) -> None:
        """Take the logits [keep, V] of each scheduled chunk."""
        ...

    @property
    def slots(self) -> Tensor:
        """All slots that the request holds in the KV pool, without those of the adapter's prefix."""
        ...

    @property
    def num_pending_tokens(self) -> int:
        """Number of tokens that have not been run."""
        ...

    @property
    def num_tokens(self) -> int:
        """Number of tokens to prefill before the next output, without virtual ones."""
        ...

    @property
    def max_num_tokens(self) -> int:
        """Length of its longest sequence in tokens, without virtual ones."""
        ...

    @property
    def max_kv_tokens(self) -> int:
        """Maximum number of tokens that it holds in the KV pool, without virtual ones."""
        ...


class GenerationRequest:
    """Generates a continuation of a text.

    Args:
        input_ids: token ids of the text.
        params: how tokens are sampled, and when generation ends.
        detokenizer: turns tokens into text.
        ends: token ids that end generation.
        tell: called with each token, the text that it adds, which may lag behind, and the last one's finish reason.
    """

    def __init__(
        self,
        input_ids: Sequence[int],
        params: SamplingParams,
        detokenizer: IncrementalDetokenizer,
        ends: frozenset[int],
        tell: Callable[[SampledToken | None, str, str | None], None],
    ) -> None:
        self.input_ids = input_ids
        self.params = params
        self.output_ids: list[int] = []
        self.is_done = False
        self._sampler = Sampler(params)
        self._detokenizer = detokenizer
        self.ends = ends
        self._tell = tell
        self._sequence: TokenSequence | None = None

    def start(self, prompt: LoadedPrompt) -> None:
        self._sequence = TokenSequence.from_input_ids(prompt, self.input_ids)
        self._sequence.tokens += self.output_ids

    def schedule(self, budget: int) -> list[ScheduledChunk]:
        if self.is_done or self._sequence is None:
            return []
        count = min(budget, self._sequence.num_pending_tokens)
        return [ScheduledChunk(self._sequence, count, keep=int(count == self._sequence.num_pending_tokens))]

    def process_logits(self, logits: Sequence[Tensor]) -> None:
        assert self._sequence is not None
        for row in checked(logits[0]):
            choice = self._sampler.sample(row)
            self._sequence.tokens.append(choice.token)
            self.add(choice)

    def add(self, choice: SampledToken) -> None:
        """Append a sampled token, and report it."""
        self.output_ids.append(choice.token)
        text, stops = ("", True) if choice.token in self.ends else self._detokenizer.append(choice.token)
        reason = "stop" if stops else "length" if len(self.output_ids) == self.params.max_tokens else None
        if reason == "length" or choice.token in self.ends:
            text += self._detokenizer.flush()
        self.is_done = reason is not None
        self._tell(choice, text, reason)

    @property
    def slots(self) -> Tensor:
        return _none() if self._sequence is None else self._sequence.slots

    @property
    def num_pending_tokens(self) -> int:
        return 0 if self._sequence is None else self._sequence.num_pending_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids) + len(self.output_ids)

    @property
    def max_num_tokens(self) -> int:
        return len(self.input_ids) + self.params.max_tokens

    @property
    def max_kv_tokens(self) -> int:
        return self.max_num_tokens


class LoglikelihoodRequest:
    """Computes the log-probabilities of answers to a text, which is run once for all of them.

    Args:
        input_ids: token ids of the text.
        answers: token ids of each answer.
        tell: called with each answer's log-probability.
        places: for each virtual token the index of the token id before which it stands; by default the adapter's own.
    """

    def __init__(
        self,
        input_ids: Sequence[int],
        answers: Sequence[Sequence[int]],
        tell: Callable[[list[float]], None],
        places: Sequence[int] | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.answers = answers
        self.places = places
        self._tell = tell
        self._sequence: TokenSequence | None = None
        self._scores: list[float] = []
        self._branches: dict[int, TokenSequence] = {}
        """The text with all but the last token of each answer that has several, by the answer's index."""
        self._scheduled: list[tuple[int, ScheduledChunk]] = []
        self.is_done = False

    def start(self, prompt: LoadedPrompt) -> None:
        self._sequence, self._scores, self._branches = (
            TokenSequence.from_input_ids(prompt, self.input_ids, self.places),
            [],
            {},
        )

    def schedule(self, budget: int) -> list[ScheduledChunk]:
        if self.is_done or self._sequence is None:
            return []
        if self._sequence.num_pending_tokens:
            count = min(budget, self._sequence.num_pending_tokens)
            return [ScheduledChunk(self._sequence, count, keep=int(count == self._sequence.num_pending_tokens))]
        self._scheduled = []
        for number, branch in self._branches.items():
            count = min(budget, branch.num_pending_tokens)
            if count:
                self._scheduled.append((number, ScheduledChunk(branch, count, keep=count)))
            budget -= count
        return [chunk for _, chunk in self._scheduled]

    def process_logits(self, logits: Sequence[Tensor]) -> None:
        assert self._sequence is not None
        for rows in logits:
            checked(rows)
        if not self._scores and len(logits[0]):
            self._begin(self._sequence, logits[0][0].float().log_softmax(-1))
        elif self._scores:
            for (number, chunk), rows in zip(self._scheduled, logits, strict=True):
                first = len(chunk.sequence.slots) - chunk.count - len(self._sequence.slots) + 1
                answer = torch.tensor(self.answers[number][first : first + chunk.count], device=rows.device)
                self._scores[number] += float(rows.float().log_softmax(-1).gather(1, answer[:, None]).sum())
        if self._scores and not any(branch.num_pending_tokens for branch in self._branches.values()):
            self.end(self._scores)

    def end(self, scores: list[float]) -> None:
        """Report each answer's log-probability."""
        self.is_done = True
        self._tell(scores)

    def _begin(self, sequence: TokenSequence, logprobs: Tensor) -> None:
        """Score each answer's first token by ``logprobs`` [V], and add a branch for each answer that has more."""
        self._scores = [float(logprobs[answer[0]]) for answer in self.answers]
        for number, answer in enumerate(self.answers):
            if len(answer) > 1:
                self._branches[number] = TokenSequence(
                    sequence.prompt, [*sequence.tokens, *answer[:-1]], sequence.end, sequence.slots
                )

    @property
    def slots(self) -> Tensor:
        if self._sequence is None:
            return _none()
        shared = len(self._sequence.slots)
        return torch.cat([self._sequence.slots, *(branch.slots[shared:] for branch in self._branches.values())])

    @property
    def num_pending_tokens(self) -> int:
        text = 0 if self._sequence is None else self._sequence.num_pending_tokens
        return text + sum(branch.num_pending_tokens for branch in self._branches.values())

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def max_num_tokens(self) -> int:
        return len(self.input_ids) + max(len(answer) - 1 for answer in self.answers)

    @property
    def max_kv_tokens(self) -> int:
        return len(self.input_ids) + sum(len(answer) - 1 for answer in self.answers)


def checked(logits: Tensor) -> Tensor:
    """Return logits unchanged, unless one is NaN.

    Raises:
        RequestError: a logit is NaN.
    """
    if bool(logits.isnan().any()):
        raise RequestError("the adapter makes the model answer what is no number", "train it anew at a lower rate")
    return logits


def check_length(request: EngineRequest, virtual: int, max_model_len: int) -> None:
    """Check that a request's longest sequence, with ``virtual`` virtual tokens, fits into ``max_model_len`` tokens.

    Raises:
        TooLongError: it does not.
    """
    if virtual + request.max_num_tokens > max_model_len:
        new = request.max_num_tokens - request.num_tokens
        raise TooLongError(
            f"{request.num_tokens} tokens of text, {new} to write and {virtual} virtual ones are more than the "
            f"{max_model_len} that there is room for",
            "shorten the text or lower max_tokens",
        )


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.long)
