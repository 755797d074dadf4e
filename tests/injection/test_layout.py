"""Layout against a construction with lists, for any padding and any columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softtune.injection.layout import Layout, row_ends, row_starts
from softtune.injection.step import Step

PADDING = 0


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], bool]:
    """Rows of distinct token numbers with zeros for padding, ascending columns, and whether the model is causal."""
    length = draw(st.integers(1, 6))
    size = draw(st.integers(0, 4))
    causal = draw(st.booleans())
    rows, columns = [], []
    for _ in range(draw(st.integers(1, 3))):
        left = draw(st.integers(0, length - 1))
        right = draw(st.integers(0, length - 1 - left))
        rows.append([PADDING] * left + list(range(1, length - left - right + 1)) + [PADDING] * right)
        columns.append(sorted(draw(st.lists(st.integers(left, length - right), min_size=size, max_size=size))))
    return rows, columns, causal


def sequence(row: list[int], columns: list[int], causal: bool) -> list[object]:
    """Tokens as ("token", column) and virtual tokens as ("virtual", number); an encoder has left padding last."""
    places: list[object] = []
    for column in range(len(row) + 1):
        places += [("virtual", n) for n, c in enumerate(columns) if c == column]
        if column < len(row):
            places.append(("token", column))
    if not causal:
        start = next(i for i, x in enumerate(row) if x)
        places = places[start:] + places[:start]
    return places


@given(batches())
def test_slots(case: tuple[list[list[int]], list[list[int]], bool]) -> None:
    rows, columns, causal = case
    mask = (torch.tensor(rows) != PADDING).long()
    places = torch.tensor(columns).reshape(len(rows), -1).long()
    layout = Layout.from_columns(
        row_starts(mask, len(rows), mask.device),
        mask.shape[1],
        places,
        torch.ones_like(places, dtype=torch.bool),
        causal=causal,
    )
    for i, row in enumerate(rows):
        expected = sequence(row, columns[i], causal)
        assert [expected[s] for s in layout.token_slots[i].tolist()] == [("token", c) for c in range(len(row))]
        assert [expected[s] for s in layout.virtual_slots[i].tolist()] == [
            ("virtual", n) for n in range(len(columns[i]))
        ]
        for column, slot in enumerate(layout.output_slots[i].tolist()):
            if not causal:
                assert expected[slot] == ("token", column)
            elif column + 1 < len(row):
                assert expected[slot + 1] == ("token", column + 1)
            else:
                assert slot == len(expected) - 1


@given(batches())
def test_merged_and_aligned_again(case: tuple[list[list[int]], list[list[int]], bool]) -> None:
    rows, columns, causal = case
    tokens = torch.tensor(rows)
    mask = (tokens != PADDING).long()
    places = torch.tensor(columns).reshape(len(rows), -1).long()
    layout = Layout.from_columns(
        row_starts(mask, len(rows), mask.device),
        tokens.shape[1],
        places,
        torch.ones_like(places, dtype=torch.bool),
        causal=causal,
    )
    virtual = torch.arange(100, 100 + places.shape[1]).expand(len(rows), -1)
    merged = layout.merge(tokens, virtual)
    for i, row in enumerate(rows):
        names = sequence(row, columns[i], causal)
        assert merged[i].tolist() == [row[n] if kind == "token" else 100 + n for kind, n in names]  # type: ignore[misc]
    assert torch.equal(merged.gather(1, layout.token_slots), tokens)
    if not causal:
        assert torch.equal(layout.align(merged[..., None])[..., 0], tokens)


@given(batches())
def test_positions_count_every_slot_of_the_text(case: tuple[list[list[int]], list[list[int]], bool]) -> None:
    rows, columns, causal = case
    mask = (torch.tensor(rows) != PADDING).long()
    starts = row_starts(mask, len(rows), mask.device)
    places = torch.tensor(columns).reshape(len(rows), -1).long()
    layout = Layout.from_columns(starts, mask.shape[1], places, places >= 0, causal=causal)
    counted = (torch.arange(mask.shape[1]) - starts[:, None]).clamp(min=0)
    positions = layout.merge_positions(counted)
    for i, row in enumerate(rows):
        names = sequence(row, columns[i], causal)
        text = [s for s, (kind, n) in enumerate(names) if kind == "virtual" or row[n]]  # type: ignore[misc]
        assert positions[i, text].tolist() == list(range(len(text)))


@given(batches())
def test_starts_and_ends(case: tuple[list[list[int]], list[list[int]], bool]) -> None:
    rows, _, _ = case
    mask = (torch.tensor(rows) != PADDING).long()
    for row, start, end in zip(
        rows, row_starts(mask, *mask.shape[:1], mask.device), row_ends(mask, *mask.shape, mask.device), strict=True
    ):
        assert all(row[int(start) : int(end)])
        assert not any(row[: int(start)] + row[int(end) :])


def test_without_a_mask_rows_are_full() -> None:
    assert row_starts(None, 2, torch.device("cpu")).tolist() == [0, 0]
    assert row_ends(None, 2, 5, torch.device("cpu")).tolist() == [5, 5]


@pytest.mark.parametrize(
    ("positions", "mask", "is_packed"),
    [
        ([0, 1, 2, 0, 1], None, True),
        ([0, 1, 2, 0, 0, 1], [1, 1, 1, 0, 1, 1], True),
        ([0, 1, 2, 1, 1], [1, 1, 1, 0, 0], False),
        ([1, 1, 0, 1, 2], [0, 0, 1, 1, 1], False),
        ([0, 1, 2, 3, 4], None, False),
    ],
)
def test_packed_texts_begin_anew_and_padding_does_not(
    positions: list[int], mask: list[int] | None, is_packed: bool
) -> None:
    ids = torch.ones(1, len(positions), dtype=torch.long)
    step = Step({"input_ids": ids, "attention_mask": None if mask is None else torch.tensor([mask])})
    assert step.has_restarts(torch.tensor([positions])) is is_packed
