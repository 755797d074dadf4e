"""What requests may say: OpenAI's fields in OpenAI's ranges, nulls as if left out, and nothing that has no effect."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from softtune.serving.http.schemas import (
    MOST,
    ChatRequest,
    CompletionRequest,
    LoadRequest,
    Message,
    RecordsRequest,
)
from softtune.serving.sampling import SamplingParams

TEXT = {"model": "m", "prompt": "red"}
TALK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "red"}]}
RECORD: dict[str, Any] = {"model": "m", "input": "red"}


def place_of(error: ValidationError) -> Any:
    """The field that is wrong."""
    return error.errors()[0]["loc"][0]


@pytest.mark.parametrize(
    ("field", "least", "most"),
    [("temperature", 0, 2), ("n", 1, 8), ("max_tokens", 1, 10**9), ("logprobs", 0, 5), ("seed", -(2**63), 2**63 - 1)],
)
def test_numbers_have_bounds(field: str, least: int, most: int) -> None:
    for value in (least, most):
        assert getattr(CompletionRequest(**TEXT, **{field: value}), field) == value
    for value in (least - 1, *([] if field == "max_tokens" else [most + 1])):
        with pytest.raises(ValidationError) as error:
            CompletionRequest(**TEXT, **{field: value})
        assert place_of(error.value) == field


REFUSED: list[dict[str, Any]] = [
    {"top_p": 0},
    {"top_p": 1.01},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"n": 1.5},
    {"n": "2"},
    {"n": True},
    {"max_tokens": "3"},
    {"stream": 1},
    {"stop": ""},
    {"stop": "x" * 201},
    {"stop": ["x"] * 5},
    {"stop": [""]},
    {"stop": 3},
    {"echo": True},
    {"best_of": 2},
    {"suffix": "x"},
    {"frequency_penalty": 0.1},
    {"presence_penalty": 1},
    {"logit_bias": {"3": 1}},
    {"store": True},
    {"stream_options": {"include_obfuscation": True}},
    {"stream_options": {"colour": True}},
    {"colour": "red"},
    {"prompt": []},
    {"prompt": 3},
    {"prompt": ["red", 3]},
    {"prompt": [3, -1]},
    {"prompt": [3, 2.5]},
    {"prompt": [[3], "red"]},
    {"prompt": {"text": "red"}},
    {"model": 3},
    {"model": None},
    {"prompt": None},
]


@pytest.mark.parametrize("field", REFUSED, ids=str)
def test_what_has_no_effect_or_no_meaning_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as error:
        CompletionRequest(**{**TEXT, **field})
    assert place_of(error.value) == next(iter(field))


@pytest.mark.parametrize("prompt", ["red", "", ["red", "blue"], [3, 4], [[3, 4], [5]], [[]]], ids=str)
def test_texts_and_tokens_are_taken_as_they_are(prompt: Any) -> None:
    assert CompletionRequest(model="m", prompt=prompt).prompt == prompt


def test_nulls_are_as_good_as_nothing() -> None:
    given = dict.fromkeys(CompletionRequest.model_fields.keys() - TEXT.keys())
    assert CompletionRequest(**TEXT, **given) == CompletionRequest(**TEXT)
    given = dict.fromkeys(ChatRequest.model_fields.keys() - TALK.keys())
    assert ChatRequest(**TALK, **given) == ChatRequest(**TALK)
    message = Message.model_validate({"role": "user", "content": "red", "name": None, "tool_calls": None})
    assert message == Message(role="user", content="red")


def test_values_that_change_nothing_are_taken() -> None:
    silent: dict[str, Any] = {"echo": False, "best_of": 1, "suffix": "", "logit_bias": {}, "store": False, "user": "me"}
    assert CompletionRequest(**TEXT, **silent).sampling(0, 3, None) == CompletionRequest(**TEXT).sampling(0, 3, None)


def test_how_a_text_is_sampled() -> None:
    request = CompletionRequest(**TEXT, temperature=0.5, top_p=0.9, stop="end")
    assert request.sampling(0, 7, 2) == SamplingParams(
        max_tokens=7, temperature=0.5, top_p=0.9, seed=None, stop=("end",), logprobs=2
    )
    plain = CompletionRequest(**TEXT).sampling(0, 16, None)
    assert plain == SamplingParams(max_tokens=16, temperature=1.0)
    assert CompletionRequest(**TEXT, stop=["a", "b"]).sampling(0, 1, None).stop == ("a", "b")


@pytest.mark.parametrize(
    ("seed", "number", "expected"),
    [(4, 0, 4), (4, 2, 6), (2**63 - 1, 1, 0), (-1, 0, 2**63 - 1), (-(2**63), 0, 0), (0, 0, 0)],
)
def test_each_of_several_texts_has_a_seed_of_its_own(seed: int, number: int, expected: int) -> None:
    assert CompletionRequest(**TEXT, seed=seed).sampling(number, 1, None).seed == expected


def test_half_a_surrogate_pair_is_no_character() -> None:
    with pytest.raises(ValidationError, match="half of a surrogate pair is no character"):
        CompletionRequest(model="m", prompt="\ud800")
    with pytest.raises(ValidationError, match="half of a surrogate pair is no character"):
        RecordsRequest(model="m", input={"x": ["\udfff"]})
    assert CompletionRequest(model="m", prompt="😀").prompt == "😀"


def test_what_is_nested_too_deep_is_refused() -> None:
    deep: Any = "red"
    for _ in range(20_000):
        deep = [deep]
    with pytest.raises(ValidationError, match="lists and objects stand within each other too deep: send them flatter"):
        RecordsRequest(model="m", input={"x": deep})
    while isinstance(deep, list):  # else Python would free one within the other
        [deep] = deep


def test_a_message_is_a_text_or_its_parts() -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "sky"}]
    assert Message.model_validate({"role": "user", "content": parts}).text == "the sky"
    assert Message(role="assistant", content="red").text == "red"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "red"},
        {"role": "user"},
        {"role": "user", "content": []},
        {"role": "user", "content": [{"type": "image_url", "text": "x"}]},
        {"role": "user", "content": [{"type": "text", "text": "x", "colour": "red"}]},
        {"role": "user", "content": "red", "colour": "red"},
        {"role": "assistant", "content": "red", "tool_calls": [{}]},
        {"role": "assistant", "content": "red", "annotations": [{}]},
    ],
    ids=str,
)
def test_messages_that_cannot_be_served_are_refused(message: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as error:
        ChatRequest(model="m", messages=[message])
    assert place_of(error.value) == "messages"


@pytest.mark.parametrize(
    "field",
    [
        {"messages": []},
        {"messages": "red"},
        {"logprobs": 2},
        {"top_logprobs": 21},
        {"top_logprobs": -1},
        {"max_completion_tokens": 0},
        {"response_format": {"type": "json_object"}},
        {"tools": []},
    ],
    ids=str,
)
def test_conversations_that_cannot_be_served_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as error:
        ChatRequest(**{**TALK, **field})
    assert place_of(error.value) == next(iter(field))


def test_a_conversation_may_ask_for_text() -> None:
    assert ChatRequest(**TALK, response_format={"type": "text"}, top_logprobs=20, logprobs=True).top_logprobs == 20


@pytest.mark.parametrize(
    ("given", "records"),
    [("red", ["red"]), ({"x": "red"}, [{"x": "red"}]), (["red", {"x": 3}], ["red", {"x": 3}])],
    ids=str,
)
def test_a_record_or_several(given: Any, records: list[Any]) -> None:
    assert RecordsRequest(model="m", input=given).records == records


@pytest.mark.parametrize(
    "given", [[], ["red"] * (MOST + 1), 3, [3], None, [["red"]]], ids=lambda given: str(given)[:20]
)
def test_records_that_are_none_are_refused(given: Any) -> None:
    with pytest.raises(ValidationError) as error:
        RecordsRequest(model="m", input=given)
    assert place_of(error.value) == "input"


def test_what_is_no_object_is_refused() -> None:
    for given in ("red", ["red"], 3):
        with pytest.raises(ValidationError):
            CompletionRequest.model_validate(given)


def test_an_adapter_is_loaded_by_name_alone() -> None:
    assert LoadRequest(name="one").name == "one"
    for given in ({}, {"name": 3}, {"name": "one", "path": "/etc"}):
        with pytest.raises(ValidationError):
            LoadRequest.model_validate(given)
