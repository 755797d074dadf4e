"""OpenAI's completions and chat completions, whole or streamed."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from codecs import getincrementaldecoder
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from softtune.errors import RequestError
from softtune.serving.http.metrics import Metrics
from softtune.serving.http.schemas import MOST, ChatRequest, CompletionRequest
from softtune.serving.http.vocabulary import bytes_of, shown
from softtune.serving.registry import Version
from softtune.serving.sampling import Choice, Sampling
from softtune.serving.service import Service, Written

IMPOSSIBLE = -9999.0
"""What OpenAI's clients are told instead of minus infinity."""


@dataclass(frozen=True)
class Asked:
    """One text to go on with."""

    words: Sequence[int]
    sampling: Sampling


@dataclass
class Answer:
    """What was written behind one text."""

    text: str = ""
    choices: list[Choice] = field(default_factory=list)
    reason: str | None = None

    def add(self, piece: Written) -> None:
        self.text += piece.text
        self.choices.append(piece.choice)
        self.reason = piece.reason


class Kind(Protocol):
    """How answers of an endpoint look."""

    prefix: str
    """How an answer's id begins."""
    names: tuple[str, str]
    """What OpenAI calls a whole answer, and a part of a streamed one."""

    def whole(self, answer: Answer, index: int) -> dict[str, Any]: ...

    def part(self, piece: Written, index: int, *, is_first: bool) -> dict[str, Any]: ...


class Completions:
    """Answers of ``/v1/completions``.

    Args:
        tokenizer: the base model's.
        tells: whether tokens' log-probabilities are asked for.
    """

    prefix = "cmpl"
    names = ("text_completion", "text_completion")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tells: bool) -> None:
        self._tokenizer = tokenizer
        self._tells = tells

    def whole(self, answer: Answer, index: int) -> dict[str, Any]:
        return self._choice(answer.text, answer.choices, answer.reason, index)

    def part(self, piece: Written, index: int, *, is_first: bool) -> dict[str, Any]:
        return self._choice(piece.text, [piece.choice], piece.reason, index)

    def _choice(self, text: str, choices: Sequence[Choice], reason: str | None, index: int) -> dict[str, Any]:
        return {"text": text, "index": index, "finish_reason": reason, "logprobs": self._logprobs(choices)}

    def _logprobs(self, choices: Sequence[Choice]) -> dict[str, Any] | None:
        if not self._tells:
            return None
        written = [bytes_of(self._tokenizer, choice.token) for choice in choices]
        decoder = getincrementaldecoder("utf-8")("replace")
        lengths = [len(decoder.decode(token)) for token in written]
        return {
            "tokens": [shown(token) for token in written],
            "token_logprobs": [_finite(choice.logprob) for choice in choices],
            "top_logprobs": [
                {shown(bytes_of(self._tokenizer, token)): _finite(value) for token, value in choice.likeliest.items()}
                for choice in choices
            ],
            "text_offset": [0, *itertools.accumulate(lengths[:-1])],
        }


class ChatCompletions:
    """Answers of ``/v1/chat/completions``; see ``Completions``."""

    prefix = "chatcmpl"
    names = ("chat.completion", "chat.completion.chunk")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tells: bool) -> None:
        self._tokenizer = tokenizer
        self._tells = tells

    def whole(self, answer: Answer, index: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        logprobs = self._logprobs(answer.choices)
        return {"message": message, "index": index, "finish_reason": answer.reason, "logprobs": logprobs}

    def part(self, piece: Written, index: int, *, is_first: bool) -> dict[str, Any]:
        delta = {**({"role": "assistant"} if is_first else {}), "content": piece.text}
        logprobs = self._logprobs([piece.choice])
        return {"delta": delta, "index": index, "finish_reason": piece.reason, "logprobs": logprobs}

    def _logprobs(self, choices: Sequence[Choice]) -> dict[str, Any] | None:
        return {"content": [self._token(choice) for choice in choices]} if self._tells else None

    def _token(self, choice: Choice) -> dict[str, Any]:
        top = [self._one(token, value) for token, value in choice.likeliest.items()]
        return {**self._one(choice.token, choice.logprob), "top_logprobs": top}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        own = bytes_of(self._tokenizer, token)
        return {"token": shown(own), "logprob": _finite(logprob), "bytes": list(own)}


class Texts:
    """The texts that one request asks for.

    Args:
        service: what is served.
        metrics: told of tokens.
        version: whose adapter; None for the base model.
        name: what the request calls it.
        asked: the texts to go on with, each of them ``times`` times.
        times: how many answers each text gets.
        kind: how answers look.
    """

    def __init__(
        self,
        service: Service,
        metrics: Metrics,
        version: Version | None,
        name: str,
        asked: Sequence[Asked],
        times: int,
        kind: Kind,
    ) -> None:
        self.service = service
        self.metrics = metrics
        self.version = version
        self.asked = asked
        self.kind = kind
        self._counts = {"prompt_tokens": sum(len(one.words) for one in asked) // times, "completion_tokens": 0}
        self._head = {
            "id": f"{kind.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": None if version is None else f"{name}@{version.number}",
        }

    async def whole(self) -> dict[str, Any]:
        """All answers, when they are done."""
        answers = [Answer() for _ in self.asked]
        async for index, piece in self._pieces():
            answers[index].add(piece)
        choices = [self.kind.whole(answer, index) for index, answer in enumerate(answers)]
        return {**self._head, "object": self.kind.names[0], "choices": choices, "usage": self._usage}

    async def parts(self, *, with_usage: bool) -> AsyncGenerator[dict[str, Any], None]:
        """All answers, token by token."""
        head = {**self._head, "object": self.kind.names[1], **({"usage": None} if with_usage else {})}
        begun: set[int] = set()
        async for index, piece in self._pieces():
            yield {**head, "choices": [self.kind.part(piece, index, is_first=index not in begun)]}
            begun.add(index)
        if with_usage:
            yield {**head, "choices": [], "usage": self._usage}

    @property
    def _usage(self) -> dict[str, int]:
        return {**self._counts, "total_tokens": sum(self._counts.values())}

    async def _pieces(self) -> AsyncGenerator[tuple[int, Written], None]:
        """Each answer's number with its next piece, as they come."""
        found: asyncio.Queue[tuple[int, Written | BaseException]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(index, found.put_nowait)) for index in range(len(self.asked))]
        left = len(tasks)
        try:
            while left:
                index, piece = await found.get()
                if isinstance(piece, BaseException):
                    raise piece
                left -= piece.reason is not None
                yield index, piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, index: int, put: Callable[[tuple[int, Written | BaseException]], None]) -> None:
        asked, clock, adapter = self.asked[index], time.perf_counter(), str(self._head["model"])
        begun = False
        try:
            async for piece in self.service.write(self.version, asked.words, asked.sampling):
                if not begun:
                    self.metrics.read(adapter, len(asked.words))
                    self.metrics.began_to_write(adapter, time.perf_counter() - clock)
                begun = True
                self.metrics.wrote(adapter)
                self._counts["completion_tokens"] += 1
                put((index, piece))
        except Exception as error:
            put((index, error))


def asked_to_complete(request: CompletionRequest, service: Service, version: Version | None) -> list[Asked]:
    """Each text, n times. Raises RequestError where there is none, too many, or one with unknown tokens."""
    given: Any = request.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    if len(given) * request.n > MOST:
        raise RequestError(f"the request asks for {len(given) * request.n} texts: ask for {MOST} at most")
    texts = [service.prompt(version, one) if isinstance(one, str) else service.checked(one) for one in given]
    return [
        Asked(words, request.sampling(number, request.max_tokens, request.logprobs))
        for words in texts
        for number in range(request.n)
    ]


def asked_to_chat(request: ChatRequest, service: Service, version: Version | None) -> list[Asked]:
    """The conversation, n times. Raises RequestError where the base model knows no conversations."""
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: set logprobs to true")
    words = service.conversation([{"role": m.role, "content": m.text} for m in request.messages])
    most = request.max_completion_tokens or request.max_tokens or service.room(version, words)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return [Asked(words, request.sampling(number, most, logprobs)) for number in range(request.n)]


def _finite(logprob: float | None) -> float:
    """A log-probability as JSON can say it, of a token that cannot come too."""
    assert logprob is not None
    return max(IMPOSSIBLE, logprob)
