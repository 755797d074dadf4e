"""What a call says of its rows, against loops over rows and columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.injection.samples import Rows, masks
from torch import Tensor
from transformers import DynamicCache

from softtune.injection.step import Step, features_of, is_flat, masks_of

few = settings(max_examples=60, deadline=None)


def call(rows: int, length: int, mask: Any = None, **arguments: Any) -> dict[str, Any]:
    return {"input_ids": torch.zeros(rows, length, dtype=torch.long), "attention_mask": mask, **arguments}


def cache_with(length: int, rows: int = 1) -> DynamicCache:
    """A cache of one layer that holds so many tokens."""
    cache = DynamicCache()
    if length:
        cache.update(torch.zeros(rows, 1, length, 2), torch.zeros(rows, 1, length, 2), 0)
    return cache


# Arguments


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (torch.ones(2, 5), True),
        (torch.ones(2, 5, dtype=torch.bool), True),
        (torch.ones(2, 1, 5, 5), False),
        (torch.ones(5), False),
        ({"full_attention": torch.ones(2, 5)}, False),
        (None, False),
    ],
)
def test_a_mask_of_rows_and_columns_is_flat(mask: Any, expected: bool) -> None:
    assert is_flat(mask) is expected


ROWS, LENGTH = 2, 5
FEATURES: dict[str, tuple[Tensor | Any, bool]] = {
    "token_type_ids": (torch.zeros(ROWS, LENGTH), True),
    "bbox": (torch.zeros(ROWS, LENGTH, 4), True),
    "per_layer_inputs": (torch.zeros(ROWS, LENGTH, 3, 7), True),
    "shared_types": (torch.zeros(1, LENGTH), True),
    "attention_mask": (torch.zeros(ROWS, LENGTH), False),
    "position_ids": (torch.zeros(ROWS, LENGTH), False),
    "inputs_embeds": (torch.zeros(ROWS, LENGTH, 3), False),
    "encoder_hidden_states": (torch.zeros(ROWS, LENGTH, 3), False),
    "encoder_attention_mask": (torch.zeros(ROWS, LENGTH), False),
    "entity_ids": (torch.zeros(ROWS, LENGTH), False),
    "pixel_values": (torch.zeros(ROWS, LENGTH + 1, 3), False),
    "other_rows": (torch.zeros(ROWS + 1, LENGTH), False),
    "cache_position": (torch.zeros(LENGTH), False),
    "by_head": (torch.zeros(ROWS, 4, LENGTH, LENGTH), False),
    "use_cache": (True, False),
    "labels": (None, False),
}


@pytest.mark.parametrize("tokens", ["input_ids", "inputs_embeds"])
def test_features_have_a_row_and_a_column_for_each_token(tokens: str) -> None:
    arguments = {name: value for name, (value, _) in FEATURES.items()}
    if tokens == "input_ids":
        del arguments["inputs_embeds"]
        arguments["input_ids"] = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    else:
        arguments["input_ids"] = None
    assert features_of(arguments) == [name for name, (_, is_feature) in FEATURES.items() if is_feature]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((ROWS, 1, LENGTH, 9), True),
        ((ROWS, 4, LENGTH, LENGTH), True),
        ((1, 1, LENGTH, 9), True),
        ((ROWS, 1, 9, LENGTH), False),
        ((ROWS + 1, 1, LENGTH, 9), False),
        ((ROWS, LENGTH, 9), False),
        ((ROWS, 9, LENGTH), False),
    ],
)
def test_masks_have_a_row_for_each_token(shape: tuple[int, ...], expected: bool) -> None:
    arguments = call(ROWS, LENGTH, torch.ones(ROWS, 1, LENGTH, LENGTH), cross_attention_mask=torch.ones(shape))
    assert masks_of(arguments) == (["cross_attention_mask"] if expected else [])


# Rows


@few
@given(masks(), st.booleans())
def test_rows_start_and_end_at_their_tokens(rows: Rows, has_ids: bool) -> None:
    mask = torch.tensor(rows)
    tokens: dict[str, Any] = {"inputs_embeds": torch.zeros(*mask.shape, 3)}
    step = Step({**(call(*mask.shape) if has_ids else tokens), "attention_mask": mask})
    assert (step.rows, step.length, step.width) == (len(rows), len(rows[0]), len(rows[0]))
    assert step.starts.tolist() == [row.index(1) for row in rows]
    assert step.ends.tolist() == [max(t for t, real in enumerate(row) if real) + 1 for row in rows]
    assert step.full_mask().tolist() == rows
    assert not step.has_ready_mask


@few
@given(masks(), st.data())
def test_positions_count_from_the_first_token_through_the_cache(rows: Rows, data: st.DataObject) -> None:
    cached = data.draw(st.integers(0, len(rows[0]) - 1))
    length = len(rows[0]) - cached
    step = Step(call(len(rows), length, torch.tensor(rows), cache=cache_with(cached, len(rows))))
    assert (step.cached, step.is_continued, step.length, step.width) == (cached, cached > 0, length, cached + length)
    expected = [[max(column - row.index(1), 0) for column in range(cached, cached + length)] for row in rows]
    assert step.positions().tolist() == expected


@pytest.mark.parametrize("cached", [0, 4])
def test_without_a_mask_every_token_is_real(cached: int) -> None:
    step = Step(call(2, 3, cache=cache_with(cached, 2)))
    assert step.mask is None
    assert step.width == cached + 3
    assert step.starts.tolist() == [0, 0]
    assert step.ends.tolist() == [cached + 3] * 2
    assert step.full_mask().tolist() == [[1] * (cached + 3)] * 2
    assert step.positions().tolist() == [[cached, cached + 1, cached + 2]] * 2


def test_states_without_a_length_continue_a_text() -> None:
    step = Step(call(1, 2, cache=[torch.zeros(1)]))
    assert (step.cached, step.is_continued, step.width) == (0, True, 2)


def test_a_ready_mask_gives_way_to_the_outer_models() -> None:
    ready = torch.zeros(2, 1, 4, 4)
    outer = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    step = Step(call(2, 4, ready), outer)
    assert step.has_ready_mask
    assert step.mask is outer
    assert (step.starts.tolist(), step.ends.tolist()) == ([1, 0], [4, 3])
    for other in (None, ready):
        step = Step(call(2, 4, ready), other)
        assert step.has_ready_mask
        assert step.mask is None
        assert step.starts.tolist() == [0, 0]


def test_the_calls_own_mask_goes_before_the_outer_models() -> None:
    own = torch.tensor([[0, 1, 1]])
    step = Step(call(1, 3, own), torch.tensor([[1, 1, 0]]))
    assert step.mask is own
    step = Step(call(1, 3), torch.tensor([[1, 1, 0]]))
    assert step.mask is None


def restarts(rows: Rows, positions: Rows) -> bool:
    """Whether a real token's position is below that of a real one before it."""
    return any(
        row[early] and row[late] and places[late] < places[early]
        for row, places in zip(rows, positions, strict=True)
        for late in range(len(row))
        for early in range(late)
    )


@few
@given(masks(), st.data())
def test_restarts_are_falls_between_real_tokens(rows: Rows, data: st.DataObject) -> None:
    length = len(rows[0])
    places = st.lists(st.integers(0, 4), min_size=length, max_size=length)
    drawn = data.draw(st.lists(places, min_size=len(rows), max_size=len(rows)))
    by_count = [[sum(row[:t]) for t in range(length)] for row in rows]
    for positions in (drawn, by_count, [sorted(row) for row in drawn]):
        step = Step(call(len(rows), length, torch.tensor(rows)))
        assert step.has_restarts(torch.tensor(positions)) is restarts(rows, positions)


def test_restarts_of_a_continued_text_look_at_this_calls_tokens() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 1]])
    step = Step(call(1, 2, mask, cache=cache_with(3)))
    assert not step.has_restarts(torch.tensor([[7, 3]]))
    assert Step(call(1, 2, torch.ones_like(mask), cache=cache_with(3))).has_restarts(torch.tensor([[7, 3]]))


@few
@given(st.integers(1, 5), st.lists(st.integers(-1, 6), min_size=1, max_size=3))
def test_tokens_at_or_behind_a_column(length: int, columns: list[int]) -> None:
    found = Step(call(len(columns), length)).is_from(torch.tensor(columns)[:, None])
    assert found.tolist() == [[token >= column for token in range(length)] for column in columns]
