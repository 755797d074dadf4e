"""Position ids, against what is counted row by row."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.families import CAUSAL_LM, base_model
from tests.injection.samples import masks, prefix, vectors
from torch import Tensor

from softtune import DataError, UnsupportedModelError
from softtune.backbone import Backbone
from softtune.injection.arrangement import Arrangement
from softtune.injection.columns import Columns
from softtune.injection.layout import Layout
from softtune.injection.positions import Positions
from softtune.injection.rows import RowPrompts
from softtune.injection.step import Step
from softtune.methods.prompt import Prompt


@cache
def backbone_of(family: str) -> Backbone:
    return Backbone(base_model(family, CAUSAL_LM))


def arranged(family: str, mask: Tensor, prompts: list[Prompt], **call: Any) -> tuple[Positions, Arrangement]:
    """The rows of a call without a cache, one prompt for each."""
    backbone, has_prefix = backbone_of(family), any(p.prefixes for p in prompts)
    stack = backbone.stacks[0]
    rows = RowPrompts.from_prompts(prompts, backbone.attention_layers if has_prefix else [], stack, reads=True)
    step = Step({"input_ids": mask, "attention_mask": mask, **call})
    columns, layout = Columns(None, None), None
    if rows.vectors is not None:
        places = columns.vector_columns(step, rows)
        layout = Layout.from_columns(step.starts, step.length, places, rows.is_vector, causal=True)
    return Positions(stack, has_prefix=has_prefix), Arrangement(step, rows, columns, layout)


@given(masks(), st.integers(1, 4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_text_starts_behind_the_prefix(rows: list[list[int]], length: int, shifts: bool) -> None:
    mask, llama = torch.tensor(rows), backbone_of("llama")
    positions, arrangement = arranged(
        "llama", mask, [prefix(llama.attention_layers, length, shifts_positions=shifts)] * len(rows)
    )
    call: dict[str, Any] = {}
    positions.place(call, arrangement)
    for row, found in zip(rows, call["position_ids"].tolist(), strict=True):
        start = row.index(1)
        for column, place in enumerate(found):
            if row[column]:
                assert place == column - start + (length if shifts else 0)


@given(masks(), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_virtual_tokens_have_the_first_positions(rows: list[list[int]], length: int) -> None:
    mask, llama = torch.tensor(rows), backbone_of("llama")
    positions, arrangement = arranged("llama", mask, [vectors(llama, length)] * len(rows))
    call: dict[str, Any] = {}
    positions.place(call, arrangement)
    layout = arrangement.layout
    assert layout is not None
    for number, row in enumerate(rows):
        found, start = call["position_ids"][number], row.index(1)
        assert found[layout.virtual_slots[number]].tolist() == list(range(length))
        real = [found[layout.token_slots[number][c]] for c in range(len(row)) if row[c]]
        assert real == [length + c - start for c in range(len(row)) if row[c]]


def test_rows_have_shifts_of_their_own() -> None:
    llama = backbone_of("llama")
    prompts = [prefix(llama.attention_layers, 3), prefix(llama.attention_layers, 1), Prompt()]
    positions, arrangement = arranged("llama", torch.ones(3, 2, dtype=torch.long), prompts)
    call: dict[str, Any] = {"position_ids": torch.tensor([[4, 5]])}
    positions.place(call, arrangement)
    assert call["position_ids"].tolist() == [[7, 8], [5, 6], [4, 5]]


def test_every_axis_of_a_picture_is_shifted() -> None:
    llama = backbone_of("llama")
    positions, arrangement = arranged("llama", torch.ones(1, 3, dtype=torch.long), [prefix(llama.attention_layers, 2)])
    axes = torch.tensor([[[0, 1, 2]], [[0, 0, 1]], [[0, 1, 1]]])
    call: dict[str, Any] = {"position_ids": axes}
    positions.place(call, arrangement)
    assert torch.equal(call["position_ids"], axes + 2)
    positions, arrangement = arranged("llama", torch.ones(1, 3, dtype=torch.long), [vectors(llama, 2)])
    with pytest.raises(UnsupportedModelError, match="no place among the positions of pictures"):
        positions.place({"position_ids": axes}, arrangement)


def test_packed_texts_have_no_place_for_virtual_tokens() -> None:
    llama = backbone_of("llama")
    positions, arrangement = arranged("llama", torch.ones(1, 4, dtype=torch.long), [vectors(llama, 1)])
    with pytest.raises(UnsupportedModelError, match="several texts packed into one row"):
        positions.place({"position_ids": torch.tensor([[0, 1, 0, 1]])}, arrangement)


def test_columns_that_a_model_counted_are_counted_again() -> None:
    llama = backbone_of("llama")
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    positions, arrangement = arranged("llama", mask, [prefix(llama.attention_layers, 1)] * 2)
    call: dict[str, Any] = {"position_ids": torch.tensor([[1, 2, 3, 4]])}
    positions.count_text(call, arrangement)
    assert call["position_ids"].tolist() == [[1, 1, 1, 2], [1, 1, 2, 3]]
    of_the_caller = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 2]])
    call = {"position_ids": of_the_caller}
    positions.count_text(call, arrangement)
    assert call["position_ids"] is of_the_caller


@pytest.mark.parametrize("among_the_words", [False, True])
def test_more_positions_than_the_table_has(among_the_words: bool) -> None:
    gpt2 = backbone_of("gpt2")
    fitting, longer = (vectors(gpt2, n) if among_the_words else prefix(gpt2.attention_layers, n) for n in (2, 3))
    limit = gpt2.stacks[0].table_size
    assert limit is not None
    text = torch.ones(1, limit - 2, dtype=torch.long)
    positions, arrangement = arranged("gpt2", text, [fitting])
    positions.check({}, arrangement)
    positions, arrangement = arranged("gpt2", text, [longer])
    with pytest.raises(DataError, match=f"{limit - 2} tokens and 3 virtual ones exceed the model's {limit}"):
        positions.check({}, arrangement)
