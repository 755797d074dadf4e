"""What vLLM is asked for, and what becomes of its outputs, beside answers that are scored a token at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from vllm import sampling_params
from vllm.logprobs import Logprob

from softtune.serving.requests import LoglikelihoodRequest
from softtune.serving.sampling import SampledToken
from softtune.serving.vllm.requests import VllmRequest, may_begin, vllm_requests
from tests.serving.test_requests import ANSWERS, TEXT, Generated, expected_scores, model

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]  # vLLM itself warns


def running(**params: Any) -> VllmRequest:
    return VllmRequest((), vllm.SamplingParams(**params), print)


def scored(running_requests: Sequence[VllmRequest] = ()) -> tuple[list[VllmRequest], list[list[float]]]:
    """The vLLM requests that score ANSWERS, and what they tell."""
    told: list[list[float]] = []
    return vllm_requests(LoglikelihoodRequest(TEXT, ANSWERS, told.append), "one", running_requests), told


def answered(call: VllmRequest, tokens: Sequence[int]) -> Any:
    """vLLM's output with the log-probabilities of some tokens."""
    logprobs = model([*TEXT, *call.tail]).log_softmax(-1)
    return SimpleNamespace(logprobs=[{token: Logprob(float(logprobs[token])) for token in tokens}])


def test_a_generation_is_one_request_with_its_own_ends() -> None:
    own = Generated([1, 2], max_tokens=7, temperature=0.5, top_p=0.9, seed=3, logprobs=2)
    [call] = vllm_requests(own.request, "one", [])
    params = call.params
    assert call.tail == ()
    assert (params.max_tokens, params.temperature, params.top_p, params.seed) == (7, 0.5, 0.9, 3)
    assert (params.logprobs, params.logprob_token_ids, params.detokenize, params.ignore_eos) == (2, None, False, True)
    assert sorted(params.stop_token_ids) == [1, 2]
    assert params.output_kind == sampling_params.RequestOutputKind.DELTA
    assert params.extra_args == {"kv_transfer_params": {"adapter": "one"}}
    [call] = vllm_requests(own.request, None, [])
    assert call.params.extra_args is None


def test_tokens_are_added_until_the_text_ends() -> None:
    own = Generated([9], max_tokens=7)
    [call] = vllm_requests(own.request, None, [])
    call.take(SimpleNamespace(token_ids=[4, 5], logprobs=None))
    assert (own.request.output_ids, own.request.is_done) == ([4, 5], False)
    call.take(SimpleNamespace(token_ids=[9, 4], logprobs=None))
    assert (own.request.output_ids, own.request.is_done) == ([4, 5, 9], True)
    assert [piece[0] for piece in own.told] == [SampledToken(token) for token in (4, 5, 9)]


def test_likeliest_tokens_are_sorted_and_no_more_than_asked_for() -> None:
    own = Generated(max_tokens=7, logprobs=2)
    [call] = vllm_requests(own.request, None, [])
    row = {7: Logprob(-9.0), 4: Logprob(-2.0), 5: Logprob(-0.5), 6: Logprob(-1.0)}
    call.take(SimpleNamespace(token_ids=[7], logprobs=[row]))
    [(choice, *_)] = own.told
    assert choice == SampledToken(7, -9.0, {5: -0.5, 6: -1.0})
    assert list(choice.likeliest) == [5, 6]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [1, 2, 128])
@pytest.mark.parametrize("singly", [True, False])
def test_scores_are_those_of_each_answer_alone(
    seed: int, most: int, singly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling_params, "MAX_LOGPROB_TOKEN_IDS", most)
    calls, told = scored([running(logprobs=3)] if singly else [])
    random.Random(seed).shuffle(calls)
    for number, call in enumerate(calls):
        tokens = call.params.allowed_token_ids if singly else call.params.logprob_token_ids
        assert tokens is not None
        assert len(tokens) <= (1 if singly else most)
        assert call.params.max_tokens == 1
        assert call.params.logprobs == (0 if singly else None)
        assert not told
        call.take(answered(call, tokens))
        assert bool(told) == (number == len(calls) - 1)
    assert told == [pytest.approx(expected_scores(TEXT), abs=1e-5)]


def test_answers_share_what_they_begin_with() -> None:
    calls, _ = scored()
    asked = {call.tail: call.params.logprob_token_ids for call in calls}
    assert asked == {(): [3, 4, 9], (4,): [5], (4, 5): [6, 7], (4, 5, 7): [8], (9,): [9]}
    assert len(calls) == 5


def test_an_answer_without_its_token_fails() -> None:
    calls, _ = scored()
    with pytest.raises(KeyError):
        calls[0].take(answered(calls[0], [3]))


@pytest.mark.parametrize(
    ("logprobs", "others", "may"),
    [
        (3, [], True),
        (3, [{"logprobs": 2}], True),
        (3, [{"logprob_token_ids": [3]}], False),
        (0, [{"logprob_token_ids": [3]}], True),
        (None, [{"logprob_token_ids": [3]}], True),
    ],
    ids=str,
)
def test_who_may_begin_beside_answers_that_are_scored(
    logprobs: int | None, others: list[dict[str, Any]], may: bool
) -> None:
    own = Generated(max_tokens=7, logprobs=logprobs)
    assert may_begin(own.request, [running(**other) for other in others]) == may
    scoring = LoglikelihoodRequest(TEXT, ANSWERS, print)
    assert may_begin(scoring, [running(**other) for other in others])
