"""Texts of many adapters in one pool give the logits that each has alone, however they are cut into steps."""

from __future__ import annotations

import random

import pytest
import torch

from softtune import PeftModel, UnsupportedModelError
from softtune.injection.kv_pool import KVPool
from softtune.methods.prompt import Prompt
from softtune.serving.prompt_export import export_prompt
from softtune.serving.sequence import LoadedPrompt, ScheduledChunk, TokenSequence, run_chunks
from tests.families import CAUSAL_LM, FAMILIES, KINDS, adapted, base_model, texts
from tests.test_rows import mixed

DECODERS = [f for f, row in FAMILIES.items() if CAUSAL_LM in row.tasks]
SLOTS = 400


def held(model: PeftModel, pool: KVPool, name: str) -> LoadedPrompt:
    return LoadedPrompt.from_prompt(
        pool, Prompt() if name == "__base__" else export_prompt(model.backbone, model.adapter(name))
    )


@pytest.mark.parametrize("family", DECODERS)
def test_logits_are_those_of_each_text_alone(family: str) -> None:
    base = base_model(family, CAUSAL_LM)
    try:
        pool = KVPool(PeftModel(base).backbone, SLOTS)
    except UnsupportedModelError:
        assert not PeftModel(base).backbone.packs
        return
    has_windows = PeftModel(base).backbone.has_local_layers
    model, names = mixed(
        family, CAUSAL_LM, tuple(kind for kind in KINDS if kind != "combined" or not has_windows), base
    )
    names = [*names, names[0], names[1]]
    lengths = (7, 4, 2, 5, 3, 6, 9, 1, 8, 6, 4, 7, 3)[: len(names)]
    words = [row.tolist() for row in texts(family, CAUSAL_LM, lengths)]
    by_name = {name: held(model, pool, name) for name in names}
    rows = [TokenSequence.from_input_ids(by_name[name], own) for name, own in zip(names, words, strict=True)]
    expected = []
    for name, own in zip(names, words, strict=True):
        with torch.no_grad():
            expected.append(model(torch.tensor([own]), adapter_names=[name]).logits[0])
    draw = random.Random(0)
    while left := [number for number, text in enumerate(rows) if text.num_pending_tokens]:
        chosen = draw.sample(left, draw.randint(1, len(left)))
        counts = [draw.randint(1, rows[number].num_pending_tokens) for number in chosen]
        readings = [ScheduledChunk(rows[i], count, keep=1) for i, count in zip(chosen, counts, strict=True)]
        for number, logits in zip(chosen, run_chunks(model.backbone, pool, readings), strict=True):
            if not rows[number].num_pending_tokens:
                torch.testing.assert_close(logits[-1], expected[number][-1], atol=1e-4, rtol=1e-4)


def test_combined_vectors_that_windows_would_end_are_refused() -> None:
    model = adapted("mistral", CAUSAL_LM, "combined")
    with pytest.raises(UnsupportedModelError, match="leave the sight of layers of MistralForCausalLM"):
        export_prompt(model.backbone, model.adapter("default"))


def prompt(vectors: int = 0, prefix: int = 0, *, after_text: bool = False, shifts: bool = True) -> LoadedPrompt:
    return LoadedPrompt(
        slots=torch.arange(prefix),
        places=frozenset(),
        shift=prefix if shifts else 0,
        vectors=torch.zeros(vectors, 4) if vectors else None,
        after_text=after_text,
        additions=(),
    )


@pytest.mark.parametrize(
    ("own", "places", "tokens"),
    [
        (prompt(), None, [7, 8, 9]),
        (prompt(prefix=2), None, [7, 8, 9]),
        (prompt(2), None, [-1, -2, 7, 8, 9]),
        (prompt(2, after_text=True), None, [7, 8, 9, -1, -2]),
        (prompt(3), [0, 1, 1], [-1, 7, -2, -3, 8, 9]),
        (prompt(3), [1, 2, 3], [7, -1, 8, -2, 9, -3]),
        (prompt(3), [3, 3, 3], [7, 8, 9, -1, -2, -3]),
    ],
    ids=["none", "prefix", "in front", "behind", "two at once", "apart", "at the end"],
)
def test_virtual_tokens_stand_at_their_places(own: LoadedPrompt, places: list[int] | None, tokens: list[int]) -> None:
    sequence = TokenSequence.from_input_ids(own, [7, 8, 9], places)
    assert (sequence.tokens, sequence.end, sequence.num_pending_tokens) == (tokens, len(tokens), len(tokens))
    assert sequence.prompt is own


def test_a_sequence_does_not_change_the_text_that_it_is_of() -> None:
    text = [7, 8, 9]
    sequence = TokenSequence.from_input_ids(prompt(), text)
    sequence.tokens.append(3)
    sequence.slots = torch.arange(3)
    assert (text, sequence.end, sequence.num_pending_tokens) == ([7, 8, 9], 3, 1)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (prompt(), [0, 1, 2, 3, 4]),
        (prompt(prefix=6), [6, 7, 8, 9, 10]),
        (prompt(prefix=6, shifts=False), [0, 1, 2, 3, 4]),
        (prompt(prefix=6, after_text=True), [0, 1, 2, 9, 10]),
    ],
    ids=["none", "in front", "without positions", "behind the text"],
)
def test_positions_leave_room_for_a_prefix(own: LoadedPrompt, expected: list[int]) -> None:
    sequence = TokenSequence.from_input_ids(own, [7, 8, 9])
    sequence.tokens += [3, 3]
    assert sequence.positions(0, 5) == expected
    assert [sequence.positions(number, 1) for number in range(5)] == [[position] for position in expected]


@pytest.mark.parametrize(("after_text", "text", "seen_from"), [(False, 3, 0), (True, 3, 2), (True, 0, 0)])
def test_a_prefix_behind_the_text_is_seen_from_its_last_token_on(after_text: bool, text: int, seen_from: int) -> None:
    sequence = TokenSequence.from_input_ids(prompt(prefix=6, after_text=after_text), [7] * text)
    sequence.tokens += [3, 3]
    sequence.slots = torch.arange(text + 1)
    piece = sequence.piece(1)
    assert (piece.count, piece.seen_from, len(piece.slots), len(piece.prefix)) == (1, seen_from, text + 1, 6)


def test_a_chunk_has_the_logits_that_it_keeps() -> None:
    model = PeftModel(base_model("llama", CAUSAL_LM).eval())
    pool = KVPool(model.backbone, SLOTS)
    nothing = LoadedPrompt.from_prompt(pool, Prompt())
    [words] = [row.tolist() for row in texts("llama", CAUSAL_LM, (7,))]
    chunks = [ScheduledChunk(TokenSequence.from_input_ids(nothing, words), 5, keep) for keep in (0, 3, 5)]
    with torch.no_grad():
        expected = model.backbone.model(torch.tensor([words[:5]])).logits[0]
    logits = run_chunks(model.backbone, pool, chunks)
    assert [len(rows) for rows in logits] == [0, 3, 5]
    for rows in logits:
        torch.testing.assert_close(rows, expected[5 - len(rows) :], atol=1e-4, rtol=1e-4)
    assert pool.num_free == SLOTS - 15
    assert [chunk.sequence.num_pending_tokens for chunk in chunks] == [2, 2, 2]
