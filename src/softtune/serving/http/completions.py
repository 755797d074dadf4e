"""OpenAI's completions and chat completions, as one response or streamed."""

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
from softtune.serving.sampling import SampledToken, SamplingParams
from softtune.serving.service import Service, TokenDelta

IMPOSSIBLE = -9999.0
"""The log-probability that OpenAI's API returns for minus infinity."""


@dataclass(frozen=True)
class PromptTokens:
    """A tokenized prompt with its sampling parameters."""

    input_ids: Sequence[int]
    sampling: SamplingParams


@dataclass
class GeneratedText:
    """The text generated for one prompt."""

    text: str = ""
    choices: list[SampledToken] = field(default_factory=list)
    reason: str | None = None

    def add(self, piece: TokenDelta) -> None:
        self.text += piece.text
        self.choices.append(piece.choice)
        self.reason = piece.reason


class ResponseFormat(Protocol):
    """The response format of an endpoint."""

    prefix: str
    """The prefix of a response's ``id``."""
    names: tuple[str, str]
    """The ``object`` field of a complete response, and of a chunk of a streamed one."""

    def whole(self, answer: GeneratedText, index: int) -> dict[str, Any]: ...

    def part(self, piece: TokenDelta, index: int, *, is_first: bool) -> dict[str, Any]: ...


class CompletionFormat:
    """The response format of ``/v1/completions``.

    Args:
        tokenizer: the base model's.
        tells: whether responses contain log-probabilities.
    """

    prefix = "cmpl"
    names = ("text_completion", "text_completion")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tells: bool) -> None:
        self._tokenizer = tokenizer
        self._tells = tells

    def whole(self, answer: GeneratedText, index: int) -> dict[str, Any]:
        return self._choice(answer.text, answer.choices, answer.reason, index)

    def part(self, piece: TokenDelta, index: int, *, is_first: bool) -> dict[str, Any]:
        return self._choice(piece.text, [piece.choice], piece.reason, index)

    def _choice(self, text: str, choices: Sequence[SampledToken], reason: str | None, index: int) -> dict[str, Any]:
        return {"text": text, "index": index, "finish_reason": reason, "logprobs": self._logprobs(choices)}

    def _logprobs(self, choices: Sequence[SampledToken]) -> dict[str, Any] | None:
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


class ChatCompletionFormat:
    """The response format of ``/v1/chat/completions``; see ``CompletionFormat``."""

    prefix = "chatcmpl"
    names = ("chat.completion", "chat.completion.chunk")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tells: bool) -> None:
        self._tokenizer = tokenizer
        self._tells = tells

    def whole(self, answer: GeneratedText, index: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        logprobs = self._logprobs(answer.choices)
        return {"message": message, "index": index, "finish_reason": answer.reason, "logprobs": logprobs}

    def part(self, piece: TokenDelta, index: int, *, is_first: bool) -> dict[str, Any]:
        delta = {**({"role": "assistant"} if is_first else {}), "content": piece.text}
        logprobs = self._logprobs([piece.choice])
        return {"delta": delta, "index": index, "finish_reason": piece.reason, "logprobs": logprobs}

    def _logprobs(self, choices: Sequence[SampledToken]) -> dict[str, Any] | None:
        return {"content": [self._token(choice) for choice in choices]} if self._tells else None

    def _token(self, choice: SampledToken) -> dict[str, Any]:
        top = [self._one(token, value) for token, value in choice.likeliest.items()]
        return {**self._one(choice.token, choice.logprob), "top_logprobs": top}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        token_bytes = bytes_of(self._tokenizer, token)
        return {"token": shown(token_bytes), "logprob": _finite(logprob), "bytes": list(token_bytes)}


class Generations:
    """The generations of one request.

    Args:
        service: the service that generates them.
        metrics: counts the tokens.
        version: the adapter; None for the base model.
        name: the model's name in the request.
        prompts: the prompts, each of them ``times`` times.
        times: the number of generations for each prompt.
        kind: the response format.
    """

    def __init__(
        self,
        service: Service,
        metrics: Metrics,
        version: Version | None,
        name: str,
        prompts: Sequence[PromptTokens],
        times: int,
        kind: ResponseFormat,
    ) -> None:
        self.service = service
        self.metrics = metrics
        self.version = version
        self.prompts = prompts
        self.kind = kind
        self._counts = {"prompt_tokens": sum(len(one.input_ids) for one in prompts) // times, "completion_tokens": 0}
        self._head = {
            "id": f"{kind.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": None if version is None else f"{name}@{version.number}",
        }

    async def whole(self) -> dict[str, Any]:
        """The complete response, once all generations have finished."""
        answers = [GeneratedText() for _ in self.prompts]
        async for index, piece in self._pieces():
            answers[index].add(piece)
        choices = [self.kind.whole(answer, index) for index, answer in enumerate(answers)]
        return {**self._head, "object": self.kind.names[0], "choices": choices, "usage": self._usage}

    async def parts(self, *, with_usage: bool) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed response, one for each token."""
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

    async def _pieces(self) -> AsyncGenerator[tuple[int, TokenDelta], None]:
        """The tokens of all generations as they arrive, each with the index of its generation."""
        queue: asyncio.Queue[tuple[int, TokenDelta | BaseException]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(index, queue.put_nowait)) for index in range(len(self.prompts))]
        left = len(tasks)
        try:
            while left:
                index, piece = await queue.get()
                if isinstance(piece, BaseException):
                    raise piece
                left -= piece.reason is not None
                yield index, piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, index: int, put: Callable[[tuple[int, TokenDelta | BaseException]], None]) -> None:
        prompt, clock, adapter = self.prompts[index], time.perf_counter(), str(self._head["model"])
        begun = False
        try:
            async for piece in self.service.generate(self.version, prompt.input_ids, prompt.sampling):
                if not begun:
                    self.metrics.read(adapter, len(prompt.input_ids))
                    self.metrics.began_to_write(adapter, time.perf_counter() - clock)
                begun = True
                self.metrics.wrote(adapter)
                self._counts["completion_tokens"] += 1
                put((index, piece))
        except Exception as error:
            put((index, error))


def completion_prompts(request: CompletionRequest, service: Service, version: Version | None) -> list[PromptTokens]:
    """The prompts of a completion request, each ``n`` times.

    Raises:
        RequestError: there are too many, or one has a token id outside the vocabulary.
    """
    given: Any = request.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    if len(given) * request.n > MOST:
        raise RequestError(f"the request asks for {len(given) * request.n} texts", f"ask for {MOST} at most")
    texts = [
        service.tokenize_prompt(version, one) if isinstance(one, str) else service.check_token_ids(one) for one in given
    ]
    return [
        PromptTokens(input_ids, request.sampling(number, request.max_tokens, request.logprobs))
        for input_ids in texts
        for number in range(request.n)
    ]


def chat_prompts(request: ChatRequest, service: Service, version: Version | None) -> list[PromptTokens]:
    """The prompt of a chat request, ``n`` times.

    Raises:
        RequestError: the base model has no chat template, or ``top_logprobs`` is set without ``logprobs``.
    """
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs", "set logprobs to true")
    input_ids = service.tokenize_chat([{"role": m.role, "content": m.text} for m in request.messages])
    most = request.max_completion_tokens or request.max_tokens or service.max_new_tokens(version, input_ids)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return [PromptTokens(input_ids, request.sampling(number, most, logprobs)) for number in range(request.n)]


def _finite(logprob: float | None) -> float:
    """A log-probability that JSON can represent: minus infinity becomes ``IMPOSSIBLE``."""
    assert logprob is not None
    return max(IMPOSSIBLE, logprob)
