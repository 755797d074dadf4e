"""OpenAI's responses, whole and in parts, put together from tokens that come in any order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from transformers import PreTrainedTokenizerBase

from softtune.errors import FullError, RequestError
from softtune.serving.http.completions import (
    ChatCompletionFormat,
    CompletionFormat,
    GeneratedText,
    Generations,
    PromptTokens,
    chat_prompts,
    completion_prompts,
)
from softtune.serving.http.schemas import ChatRequest, CompletionRequest
from softtune.serving.sampling import SampledToken, SamplingParams
from softtune.serving.service import TokenDelta
from tests.tiny import WORDS, tokenizer

IDS = {word: number for number, word in enumerate(WORDS, start=3)}


WAITING = 30
"""Seconds to wait for what happens at once."""
Result = TypeVar("Result")


def finished(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, WAITING))


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return tokenizer(ends=False)


def delta(word: str, reason: str | None = None, **likeliest: float) -> TokenDelta:
    token = SampledToken(IDS[word], -0.5, {IDS[other]: value for other, value in likeliest.items()})
    return TokenDelta(token, word, reason)


TEXT = GeneratedText()
for piece in (delta("red", red=-0.5, good=-1.5), delta(" ", None), delta("sky", "length", sky=-0.5)):
    TEXT.add(piece)


def test_a_text_is_the_sum_of_its_pieces() -> None:
    assert (TEXT.text, TEXT.reason) == ("red sky", "length")
    assert [choice.token for choice in TEXT.choices] == [IDS["red"], IDS[" "], IDS["sky"]]


def test_a_completion_as_openai_writes_it(words: PreTrainedTokenizerBase) -> None:
    told = {
        "tokens": ["red", " ", "sky"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"red": -0.5, "good": -1.5}, {}, {"sky": -0.5}],
        "text_offset": [0, 3, 4],
    }
    whole = {"text": "red sky", "index": 2, "finish_reason": "length", "logprobs": told}
    assert CompletionFormat(words, True).whole(TEXT, 2) == whole
    assert CompletionFormat(words, False).whole(TEXT, 2) == {**whole, "logprobs": None}
    part = CompletionFormat(words, True).part(delta("sky", "stop", sky=-0.5), 1, is_first=True)
    told = {"tokens": ["sky"], "token_logprobs": [-0.5], "top_logprobs": [{"sky": -0.5}], "text_offset": [0]}
    assert part == {"text": "sky", "index": 1, "finish_reason": "stop", "logprobs": told}


def test_a_message_as_openai_writes_it(words: PreTrainedTokenizerBase) -> None:
    def told(word: str, logprob: float) -> dict[str, Any]:
        return {"token": word, "logprob": logprob, "bytes": list(word.encode())}

    content = [
        {**told("red", -0.5), "top_logprobs": [told("red", -0.5), told("good", -1.5)]},
        {**told(" ", -0.5), "top_logprobs": []},
        {**told("sky", -0.5), "top_logprobs": [told("sky", -0.5)]},
    ]
    message = {"role": "assistant", "content": "red sky", "refusal": None}
    whole = {"message": message, "index": 2, "finish_reason": "length", "logprobs": {"content": content}}
    assert ChatCompletionFormat(words, True).whole(TEXT, 2) == whole
    assert ChatCompletionFormat(words, False).whole(TEXT, 2) == {**whole, "logprobs": None}
    kind = ChatCompletionFormat(words, False)
    first, later = (kind.part(delta("sky"), 1, is_first=is_first) for is_first in (True, False))
    assert first == {
        "delta": {"role": "assistant", "content": "sky"},
        "index": 1,
        "finish_reason": None,
        "logprobs": None,
    }
    assert later == {**first, "delta": {"content": "sky"}}
    assert ChatCompletionFormat(words, True).part(delta("sky"), 1, is_first=False)["logprobs"] == {
        "content": [{**told("sky", -0.5), "top_logprobs": []}]
    }


class Told:
    """A service that tells tokens when it is told to, and what the metrics have counted.

    Args:
        texts: the tokens of each generation, or the error that it ends with.
    """

    def __init__(self, *texts: Sequence[TokenDelta] | Exception) -> None:
        self.texts = [*texts]
        self.turns = [asyncio.Event() for _ in texts]
        self.left: list[int] = []
        self.counted: list[tuple[Any, ...]] = []
        self.metrics: Any = SimpleNamespace(
            read=lambda adapter, tokens: self.counted.append(("read", adapter, tokens)),
            wrote=lambda adapter: self.counted.append(("wrote", adapter)),
            began_to_write=lambda adapter, seconds: self.counted.append(("began", adapter, seconds >= 0)),
        )

    async def generate(
        self, version: Any, input_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[TokenDelta, None]:
        number = params.seed or 0
        text = self.texts[number]
        try:
            await self.turns[number].wait()
            if isinstance(text, Exception):
                raise text
            for piece in text:
                yield piece
        finally:
            self.left.append(number)

    def generations(self, kind: Any, times: int = 1, version: Any = None) -> Generations:
        prompts = [PromptTokens([3] * (number + 4), SamplingParams(seed=number)) for number in range(len(self.texts))]
        service: Any = self
        return Generations(service, self.metrics, version, "mine", prompts, times, kind)


def one() -> list[TokenDelta]:
    return [delta("red"), delta("sky", "stop")]


def other() -> list[TokenDelta]:
    return [delta("good", "length")]


def test_texts_have_their_places_whichever_ends_first(words: PreTrainedTokenizerBase) -> None:
    async def run() -> dict[str, Any]:
        told = Told(one(), other())
        whole = asyncio.ensure_future(told.generations(CompletionFormat(words, False)).whole())
        for number in (1, 0):
            told.turns[number].set()
            while number not in told.left:
                await asyncio.sleep(0)
        assert sorted(told.counted) == [
            ("began", "mine", True),
            ("began", "mine", True),
            ("read", "mine", 4),
            ("read", "mine", 5),
            *[("wrote", "mine")] * 3,
        ]
        return await whole

    found = finished(run())
    assert [(one["index"], one["text"], one["finish_reason"]) for one in found["choices"]] == [
        (0, "redsky", "stop"),
        (1, "good", "length"),
    ]
    assert found["usage"] == {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    assert (found["object"], found["model"], found["system_fingerprint"]) == ("text_completion", "mine", None)
    assert found["id"].startswith("cmpl-")


@pytest.mark.parametrize("with_usage", [True, False])
def test_a_stream_has_a_part_for_each_token(words: PreTrainedTokenizerBase, with_usage: bool) -> None:
    async def run() -> list[dict[str, Any]]:
        told = Told(one(), other())
        for turn in told.turns:
            turn.set()
        version = SimpleNamespace(number=7)
        generations = told.generations(ChatCompletionFormat(words, False), version=version)
        return [part async for part in generations.parts(with_usage=with_usage)]

    parts = finished(run())
    assert len({part["id"] for part in parts}) == 1
    assert {(part["object"], part["system_fingerprint"]) for part in parts} == {("chat.completion.chunk", "mine@7")}
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    if with_usage:
        *parts, last = parts
        assert (last["choices"], last["usage"]) == ([], usage)
        assert all(part["usage"] is None for part in parts)
    else:
        assert not any("usage" in part for part in parts)
    by_text = [[c["delta"] for part in parts for c in part["choices"] if c["index"] == index] for index in (0, 1)]
    assert by_text == [
        [{"role": "assistant", "content": "red"}, {"content": "sky"}],
        [{"role": "assistant", "content": "good"}],
    ]


def test_a_prompt_of_several_texts_is_counted_once(words: PreTrainedTokenizerBase) -> None:
    told = Told(one(), other())
    service: Any = told
    prompts = [PromptTokens([3] * 6, SamplingParams(seed=number)) for number in range(2)]
    generations = Generations(service, told.metrics, None, "mine", prompts, 2, CompletionFormat(words, False))

    async def run() -> dict[str, Any]:
        for turn in told.turns:
            turn.set()
        return await generations.whole()

    assert finished(run())["usage"] == {"prompt_tokens": 6, "completion_tokens": 3, "total_tokens": 9}


def test_one_error_ends_all_texts_of_a_request(words: PreTrainedTokenizerBase) -> None:
    async def run(told: Told) -> None:
        told.turns[1].set()
        with pytest.raises(FullError, match="try again later"):
            await told.generations(CompletionFormat(words, False)).whole()

    told = Told(one(), FullError("try again later"))
    finished(run(told))
    assert sorted(told.left) == [0, 1]


def test_who_stops_reading_ends_all_texts(words: PreTrainedTokenizerBase) -> None:
    async def run(told: Told) -> None:
        told.turns[0].set()
        parts = told.generations(CompletionFormat(words, False)).parts(with_usage=False)
        await anext(parts)
        await parts.aclose()

    told = Told(one(), other())
    finished(run(told))
    assert sorted(told.left) == [0, 1]


@pytest.fixture
def service(words: PreTrainedTokenizerBase) -> Any:
    def check(tokens: list[int]) -> list[int]:
        if tokens and max(tokens) > 16:
            raise RequestError("no token")
        return tokens

    return SimpleNamespace(
        tokenize_prompt=lambda version, text: [len(text), 0 if version is None else version],
        check_token_ids=check,
        tokenize_chat=lambda messages: [len(message["content"]) for message in messages],
        max_new_tokens=lambda version, input_ids: 100 - len(input_ids),
    )


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("red", [[3, 9]]),
        (["red", "blue"], [[3, 9], [4, 9]]),
        ([3, 4], [[3, 4]]),
        ([[3, 4], [5]], [[3, 4], [5]]),
    ],
    ids=str,
)
def test_a_text_or_several_or_their_tokens(service: Any, prompt: Any, expected: list[list[int]]) -> None:
    version: Any = 9
    request = CompletionRequest(model="m", prompt=prompt, n=2, seed=4, max_tokens=7, logprobs=1)
    found = completion_prompts(request, service, version)
    assert [list(one.input_ids) for one in found] == [ids for ids in expected for _ in range(2)]
    assert [one.sampling for one in found] == [request.sampling(number, 7, 1) for _ in expected for number in range(2)]
    assert [one.sampling.seed for one in found[:2]] == [4, 5]


def test_too_many_texts_are_refused(service: Any) -> None:
    request = CompletionRequest(model="m", prompt=["red"] * 4, n=8)
    assert len(completion_prompts(request, service, None)) == 32
    with pytest.raises(RequestError, match="the request asks for 40 texts: ask for 32 at most"):
        completion_prompts(CompletionRequest(model="m", prompt=["red"] * 5, n=8), service, None)
    with pytest.raises(RequestError, match="no token"):
        completion_prompts(CompletionRequest(model="m", prompt=[3, 17]), service, None)


MESSAGES: list[Any] = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]


@pytest.mark.parametrize(
    ("fields", "most", "logprobs"),
    [
        ({}, 98, None),
        ({"max_tokens": 5}, 5, None),
        ({"max_completion_tokens": 6}, 6, None),
        ({"max_completion_tokens": 6, "max_tokens": 5}, 6, None),
        ({"logprobs": True}, 98, 0),
        ({"logprobs": True, "top_logprobs": 3}, 98, 3),
        ({"logprobs": False}, 98, None),
    ],
    ids=str,
)
def test_what_a_conversation_asks_for(service: Any, fields: dict[str, Any], most: int, logprobs: int | None) -> None:
    request = ChatRequest(model="m", messages=MESSAGES, n=2, **fields)
    found = chat_prompts(request, service, None)
    assert [one.input_ids for one in found] == [[3, 4]] * 2
    assert [(one.sampling.max_tokens, one.sampling.logprobs) for one in found] == [(most, logprobs)] * 2


def test_likeliest_tokens_need_log_probabilities(service: Any) -> None:
    with pytest.raises(RequestError, match="top_logprobs needs logprobs: set logprobs to true"):
        chat_prompts(ChatRequest(model="m", messages=MESSAGES, top_logprobs=2), service, None)
