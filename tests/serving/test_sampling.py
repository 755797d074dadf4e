"""Tokens are drawn with the probabilities of a plain softmax, and texts end where a search of the whole text says."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from softtune.serving.sampling import COLDEST, FEW, IncrementalDetokenizer, SampledToken, Sampler, SamplingParams
from tests.tiny import WORDS, tokenizer

DRAWS = 4000


def softmax(logits: torch.Tensor, temperature: float = 1.0) -> NDArray[np.float64]:
    scaled = logits.double().numpy() / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def nucleus(probabilities: NDArray[np.float64], top_p: float) -> list[int]:
    """The fewest most likely tokens that have ``top_p`` together, most likely first."""
    kept: list[int] = []
    for token in np.argsort(-probabilities, kind="stable"):
        if sum(probabilities[kept]) >= top_p:
            break
        kept.append(int(token))
    return kept


def drawn(logits: torch.Tensor, count: int, **params: float | int) -> list[int]:
    sampler = Sampler(SamplingParams(**params))  # type: ignore[arg-type]
    return [sampler.sample(logits).token for _ in range(count)]


@pytest.mark.parametrize("temperature", [0.0, COLDEST / 2])
def test_cold_is_greedy(temperature: float) -> None:
    close = torch.tensor([1.0, 1.0 + torch.finfo(torch.float32).eps, -1.0])
    assert drawn(close, 50, temperature=temperature) == [1] * 50


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_tokens_come_as_often_as_their_probabilities_say(temperature: float, top_p: float) -> None:
    logits = torch.randn(12)
    expected = softmax(logits, temperature)
    kept = nucleus(expected, top_p)
    counts = Counter(drawn(logits, DRAWS, temperature=temperature, top_p=top_p, seed=3))
    assert counts.keys() <= {*kept}
    for token in kept:
        share = expected[token] / expected[kept].sum()
        assert abs(counts[token] / DRAWS - share) < 4 * np.sqrt(share * (1 - share) / DRAWS)  # four standard errors


@pytest.mark.parametrize("vocabulary", [1, 5, FEW, 3 * FEW])
@pytest.mark.parametrize("top_p", [5e-324, 1e-9, 0.3, 0.95, 1.0])
def test_each_token_is_that_of_its_random_number(vocabulary: int, top_p: float) -> None:
    """A flat distribution over a large vocabulary needs more than the few tokens that are tried first."""
    logits = torch.randn(vocabulary) / 10
    probabilities = softmax(logits)
    order = [*range(vocabulary)] if top_p == 1 else nucleus(probabilities, top_p)
    sums = probabilities[order].cumsum()
    numbers = torch.Generator().manual_seed(8)
    expected = []
    for _ in range(20):
        number = float(torch.rand((), dtype=torch.float64, generator=numbers)) * sums[-1]
        expected.append(order[next(place for place, end in enumerate(sums) if number < end)])
    assert drawn(logits, 20, temperature=1.0, top_p=top_p, seed=8) == expected


def test_the_likeliest_token_is_in_every_nucleus() -> None:
    assert drawn(torch.tensor([0.0, 5.0, 0.0]), 50, temperature=1.0, top_p=1e-6, seed=0) == [1] * 50


def test_what_is_impossible_is_never_drawn() -> None:
    logits = torch.tensor([0.0, -float("inf"), 0.0, -float("inf")])
    assert {*drawn(logits, 200, temperature=2.0, seed=0)} == {0, 2}
    assert {*drawn(logits, 200, temperature=2.0, top_p=0.99, seed=0)} == {0, 2}


@pytest.mark.parametrize("number", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_random_numbers_draw_what_is_possible(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: torch.tensor(number, dtype=torch.float64))
    logits = torch.tensor([-float("inf"), 0.0, 0.0, -float("inf")])
    assert drawn(logits, 1, temperature=1.0) == [1 if number == 0 else 2]


def test_a_seed_draws_the_same_again_and_none_draws_others() -> None:
    logits = torch.zeros(1000)
    first, again = (drawn(logits, 8, temperature=1.0, seed=4) for _ in range(2))
    assert first == again
    assert drawn(logits, 8, temperature=1.0, seed=5) != first
    assert drawn(logits, 8, temperature=1.0) != drawn(logits, 8, temperature=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_the_models_whatever_is_sampled(dtype: torch.dtype) -> None:
    logits = torch.randn(30).to(dtype)
    logprobs = np.log(softmax(logits))
    likeliest = np.argsort(-logprobs)[:3].tolist()
    tokens = set()
    for seed in range(10):
        found = Sampler(SamplingParams(logprobs=3, temperature=seed / 2, seed=seed)).sample(logits)
        tokens.add(found.token)
        assert found.logprob == pytest.approx(logprobs[found.token], abs=1e-6)
        assert [*found.likeliest.values()] == sorted(found.likeliest.values(), reverse=True)
        assert found.likeliest == pytest.approx({token: logprobs[token] for token in likeliest}, abs=1e-6)
    assert tokens - {*likeliest}  # others have their own


def test_log_probabilities_are_told_where_asked_for() -> None:
    logits = torch.tensor([0.0, 1.0])
    assert Sampler(SamplingParams()).sample(logits) == SampledToken(1)
    alone = Sampler(SamplingParams(logprobs=0)).sample(logits)
    assert alone.logprob == pytest.approx(-np.log1p(np.exp(-1)))
    assert alone.likeliest == {}


def bytes_of_texts() -> PreTrainedTokenizerFast:
    """A token a byte, so that characters come in parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(BPE({character: number for number, character in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def may_begin(text: str, stop: str) -> int:
    """The longest end of a text that a stop string begins with."""
    return max(length for length in range(len(stop)) if text.endswith(stop[:length]))


@pytest.mark.parametrize("seed", range(20))
def test_text_is_told_up_to_what_may_begin_a_stop_string(seed: int) -> None:
    draw = random.Random(seed)
    letters = bytes_of_texts()
    text = "".join(draw.choice("abé") for _ in range(40))
    stops = ["".join(draw.choice("abé") for _ in range(draw.randint(2, 5))) for _ in range(draw.randint(0, 3))]
    own, told = IncrementalDetokenizer(letters, stops), ""
    tokens = letters(text)["input_ids"]
    for count in range(1, len(tokens) + 1):
        whole = letters.decode(tokens[:count])
        piece, has_stopped = own.append(tokens[count - 1])
        told += piece
        places = [whole.find(stop) for stop in stops if stop in whole]
        assert has_stopped == bool(places)
        if has_stopped:
            assert told == whole[: min(places)]
            return
        complete = whole.removesuffix("\N{REPLACEMENT CHARACTER}")
        assert told == complete[: len(complete) - max((may_begin(complete, stop) for stop in stops), default=0)]
    assert told + own.flush() == text


def test_a_stop_string_that_almost_comes_is_told_after_all() -> None:
    letters = bytes_of_texts()
    own = IncrementalDetokenizer(letters, ["aab"])
    pieces = [own.append(token)[0] for token in letters("aaabc")["input_ids"][:3]]
    assert pieces == ["", "", "a"]  # the last two may begin it
    assert own.append(letters("b")["input_ids"][0]) == ("", True)


def test_the_first_of_several_stop_strings_counts() -> None:
    letters = bytes_of_texts()
    own = IncrementalDetokenizer(letters, ["cd", "bcd"])
    told = [own.append(token) for token in letters("abcd")["input_ids"]]
    assert told == [("a", False), ("", False), ("", False), ("", True)]


def test_the_end_tells_what_was_held_back() -> None:
    letters = bytes_of_texts()
    own = IncrementalDetokenizer(letters, ["bcd"])
    assert [own.append(token)[0] for token in letters("abc")["input_ids"]] == ["a", "", ""]
    assert own.flush() == "bc"
    partial = IncrementalDetokenizer(letters, [])
    assert [partial.append(token)[0] for token in letters("a😀")["input_ids"][:3]] == ["a", "", ""]
    assert partial.flush() == letters.decode(letters("a😀")["input_ids"][:3])[1:]
    assert IncrementalDetokenizer(letters, ["x"]).flush() == ""


def test_a_character_is_told_with_its_last_byte() -> None:
    letters = bytes_of_texts()
    own = IncrementalDetokenizer(letters, [])
    assert [own.append(token) for token in letters("é😀")["input_ids"]] == [
        (piece, False) for piece in ("", "é", "", "", "", "😀")
    ]


def test_special_tokens_are_no_text() -> None:
    words = tokenizer(ends=False)
    own = IncrementalDetokenizer(words, [])
    tokens = [words.pad_token_id, words.convert_tokens_to_ids("red"), words.eos_token_id]
    assert "".join(own.append(token)[0] for token in tokens) + own.flush() == "red"


def test_pieces_are_the_text_that_the_tokenizer_decodes_at_once() -> None:
    words = tokenizer(ends=False)
    draw = random.Random(0)
    ids = [words.convert_tokens_to_ids(draw.choice(WORDS)) for _ in range(50)]
    own = IncrementalDetokenizer(words, [])
    told = [own.append(token)[0] for token in ids]
    assert "".join(told) + own.flush() == words.decode(ids)
    assert all(not before or after for before, after in pairwise(told))  # nothing is held back without a stop string
