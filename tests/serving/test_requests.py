"""What requests run, and what they make of logits, beside a model that is a plain function of the tokens before."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor

from softtune.errors import RequestError, TooLongError
from softtune.serving.requests import EngineRequest, GenerationRequest, LoglikelihoodRequest, check_length, checked
from softtune.serving.sampling import IncrementalDetokenizer, SampledToken, SamplingParams
from softtune.serving.sequence import VIRTUAL, LoadedPrompt, ScheduledChunk
from tests.tiny import WORDS, tokenizer

VOCABULARY = len(WORDS) + 3
TEXT = [5, 6, 7, 8, 9]


def prompt(vectors: int = 0, *, after_text: bool = False) -> LoadedPrompt:
    """An adapter's prompt; virtual tokens among the text where it has vectors."""
    return LoadedPrompt(
        slots=torch.zeros(0, dtype=torch.long),
        places=frozenset(),
        shift=0,
        vectors=torch.zeros(vectors, 4) if vectors else None,
        after_text=after_text,
        additions=(),
    )


def model(tokens: Sequence[int]) -> Tensor:
    """Logits [V] after some tokens."""
    numbers = torch.Generator().manual_seed(crc32(repr([*tokens]).encode()))
    return torch.randn(VOCABULARY, generator=numbers)


def run(chunk: ScheduledChunk) -> Tensor:
    """Logits [keep, V] of a chunk, whose tokens have slots then."""
    sequence, first = chunk.sequence, len(chunk.sequence.slots)
    sequence.slots = torch.cat([sequence.slots, torch.arange(chunk.count) + first])
    ends = range(first + chunk.count - chunk.keep + 1, first + chunk.count + 1)
    return torch.stack([model(sequence.tokens[:end]) for end in ends]) if ends else torch.zeros(0, VOCABULARY)


def step(request: EngineRequest, budget: int) -> list[int]:
    """Run a step of a request; the number of tokens of each chunk."""
    chunks = request.schedule(budget)
    assert all(chunk.count for chunk in chunks)
    assert sum(chunk.count for chunk in chunks) <= budget
    counts = [chunk.count for chunk in chunks]
    if chunks:
        request.process_logits([run(chunk) for chunk in chunks])
    return counts


class Generated:
    """A generation, and what it has told."""

    def __init__(self, ends: Sequence[int] = (), **params: Any) -> None:
        self.told: list[tuple[Any, str, str | None]] = []
        self.request = GenerationRequest(
            TEXT,
            SamplingParams(**params),
            IncrementalDetokenizer(tokenizer(ends=False), params.get("stop", ())),
            frozenset(ends),
            lambda *piece: self.told.append(piece),
        )

    def finish(self, budget: int = 100) -> list[int]:
        while not self.request.is_done:
            step(self.request, budget)
        return self.request.output_ids


def greedy(count: int) -> list[int]:
    """What the model writes after the text, a token at a time."""
    written: list[int] = []
    for _ in range(count):
        written.append(int(model([*TEXT, *written]).argmax()))
    return written


def decoded(tokens: Sequence[int]) -> str:
    return str(tokenizer(ends=False).decode(tokens, skip_special_tokens=True))


@pytest.mark.parametrize("budget", [1, 2, 3, 100])
def test_a_generation_is_the_models_however_its_text_is_cut(budget: int) -> None:
    own = Generated(max_tokens=6)
    own.request.start(prompt())
    assert own.finish(budget) == greedy(6)
    assert [piece[0] for piece in own.told] == [SampledToken(token) for token in greedy(6)]
    assert [piece[2] for piece in own.told] == [None] * 5 + ["length"]
    assert "".join(piece[1] for piece in own.told) == decoded(greedy(6))


def test_only_the_last_token_of_a_text_is_asked_for_logits() -> None:
    own = Generated(max_tokens=2)
    own.request.start(prompt())
    assert (own.request.num_pending_tokens, len(own.request.slots)) == (5, 0)
    [chunk] = own.request.schedule(3)
    assert (chunk.count, chunk.keep) == (3, 0)
    own.request.process_logits([run(chunk)])
    assert (own.request.num_pending_tokens, len(own.request.slots), own.told) == (2, 3, [])
    [chunk] = own.request.schedule(3)
    assert (chunk.count, chunk.keep) == (2, 1)
    own.request.process_logits([run(chunk)])
    assert (own.request.num_pending_tokens, len(own.request.slots), len(own.told)) == (1, 5, 1)


def test_a_token_that_ends_the_text_is_the_last_one() -> None:
    written = greedy(6)
    end = next(token for token in written if token not in written[:2])
    own = Generated([end], max_tokens=6)
    own.request.start(prompt())
    assert own.finish() == written[: written.index(end) + 1]
    assert own.told[-1][1:] == ("", "stop")
    assert own.request.schedule(9) == []


def test_a_stop_string_ends_the_text_before_it() -> None:
    stop = decoded(greedy(6))[3:9]  # over several tokens
    own = Generated(max_tokens=6, stop=(stop,))
    own.request.start(prompt())
    own.finish()
    whole = decoded(greedy(6))
    assert "".join(piece[1] for piece in own.told) == whole[: whole.index(stop)]
    assert own.told[-1][2] == "stop"


def test_text_that_is_held_back_is_told_with_the_last_token() -> None:
    whole = decoded(greedy(6))
    own = Generated(max_tokens=6, stop=(whole[-3:] + "never",))
    own.request.start(prompt())
    own.finish()
    assert "".join(piece[1] for piece in own.told) == whole
    assert own.told[-1][2] == "length"


def test_a_preempted_generation_goes_on_where_it_was() -> None:
    own = Generated(max_tokens=6, temperature=1.5, seed=2)
    own.request.start(prompt())
    alone = Generated(max_tokens=6, temperature=1.5, seed=2)
    alone.request.start(prompt())
    for _ in range(3):
        step(own.request, 100)
    assert (own.request.num_tokens, len(own.told)) == (8, 3)
    own.request.start(prompt())
    assert (own.request.num_pending_tokens, len(own.request.slots)) == (8, 0)
    assert own.finish() == alone.finish()
    assert len(own.told) == 6


def test_the_sizes_of_a_generation() -> None:
    own = Generated(max_tokens=6)
    request = own.request
    assert (request.num_pending_tokens, len(request.slots), request.schedule(9)) == (0, 0, [])  # not started
    assert (request.num_tokens, request.max_num_tokens, request.max_kv_tokens) == (5, 11, 11)
    request.start(prompt(2))
    assert request.num_pending_tokens == 7
    step(request, 100)
    assert (request.num_tokens, request.max_num_tokens) == (6, 11)


ANSWERS = [[3], [4, 5, 6], [4, 5, 7, 8], [9, 9], [3]]


def expected_scores(text: Sequence[int]) -> list[float]:
    """Each answer alone, a token at a time."""
    scores = []
    for answer in ANSWERS:
        logprobs = [model([*text, *answer[:n]]).log_softmax(-1)[token] for n, token in enumerate(answer)]
        scores.append(float(sum(logprobs)))
    return scores


@pytest.mark.parametrize("seed", range(6))
def test_scores_are_those_of_each_answer_alone_however_they_are_cut(seed: int) -> None:
    draw, told = random.Random(seed), list[list[float]]()
    request = LoglikelihoodRequest(TEXT, ANSWERS, told.append)
    request.start(prompt())
    while not request.is_done:
        step(request, draw.randint(1, 6))
    assert told == [pytest.approx(expected_scores(TEXT), abs=1e-5)]
    assert request.schedule(9) == []
    assert len(request.slots) == request.max_kv_tokens == 5 + 2 + 3 + 1


def test_answers_share_the_texts_slots() -> None:
    request = LoglikelihoodRequest(TEXT, ANSWERS, lambda scores: None)
    request.start(prompt())
    assert (request.num_tokens, request.max_num_tokens, request.max_kv_tokens) == (5, 8, 11)
    assert step(request, 100) == [5]
    assert (request.num_pending_tokens, len(request.slots)) == (6, 5)
    assert step(request, 4) == [2, 2]
    assert (request.num_pending_tokens, len(request.slots)) == (2, 9)
    assert step(request, 4) == [1, 1]
    assert request.is_done


def test_answers_of_a_token_take_one_step() -> None:
    told: list[list[float]] = []
    request = LoglikelihoodRequest(TEXT, [[token] for token in range(VOCABULARY)], told.append)
    request.start(prompt())
    assert step(request, 100) == [5]
    assert request.is_done
    assert told == [pytest.approx(model(TEXT).log_softmax(-1).tolist(), abs=1e-6)]


def test_a_preempted_scoring_begins_anew() -> None:
    told: list[list[float]] = []
    request = LoglikelihoodRequest(TEXT, ANSWERS, told.append)
    request.start(prompt())
    step(request, 100)
    step(request, 2)
    request.start(prompt())
    assert (request.num_pending_tokens, len(request.slots)) == (5, 0)
    while not request.is_done:
        step(request, 3)
    assert told == [pytest.approx(expected_scores(TEXT), abs=1e-5)]


def test_virtual_tokens_stand_where_the_record_has_them() -> None:
    told: list[list[float]] = []
    request = LoglikelihoodRequest(TEXT, ANSWERS, told.append, places=[1, 4])
    request.start(prompt(2))
    text = [5, VIRTUAL, 6, 7, 8, VIRTUAL - 1, 9]
    [chunk] = request.schedule(100)
    assert chunk.sequence.tokens == text
    request.process_logits([run(chunk)])
    while not request.is_done:
        step(request, 100)
    assert told == [pytest.approx(expected_scores(text), abs=1e-5)]


def test_logits_without_numbers_are_refused() -> None:
    fine = torch.tensor([[0.0, -float("inf")], [float("inf"), 1.0]])
    assert checked(fine) is fine
    broken = torch.tensor([0.0, float("nan")])
    with pytest.raises(RequestError, match="the adapter makes the model answer what is no number: train it anew"):
        checked(broken)
    generated = Generated(max_tokens=2)
    scoring = LoglikelihoodRequest(TEXT, ANSWERS, lambda scores: None)
    for request in (generated.request, scoring):
        request.start(prompt())
        request.schedule(100)
        with pytest.raises(RequestError):
            request.process_logits([torch.full((1, VOCABULARY), float("nan"))])
        assert not request.is_done
    assert generated.told == []


@pytest.mark.parametrize("is_generation", [True, False])
def test_lengths_are_checked_with_virtual_tokens(is_generation: bool) -> None:
    request: EngineRequest = LoglikelihoodRequest(TEXT, ANSWERS, lambda scores: None)
    if is_generation:
        request = Generated(max_tokens=3).request
    check_length(request, 4, 12)
    with pytest.raises(TooLongError) as refusal:
        check_length(request, 4, 11)
    assert str(refusal.value) == (
        "5 tokens of text, 3 to write and 4 virtual ones are more than the 11 that there is room for: shorten the text "
        "or lower max_tokens"
    )
