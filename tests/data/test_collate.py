"""Padding hides nothing, moves nothing but positions, and never changes a row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softtune.data import Collator, Example
from softtune.data.collate import length_batches
from softtune.errors import DataError


def example(ids, target=0, positions=None):
    """An example of ``ids`` whose last ``target`` ones are the answer."""
    labels = [-100] * (len(ids) - target) + ids[len(ids) - target :]
    return Example(input_ids=ids, labels=labels, prompt_positions=positions)


def test_right_padding():
    batch = Collator(pad_token_id=9)([example([1, 2, 3], 1, [0, 3]), example([4], 0, [1, 1])])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, -100, 3], [-100, -100, -100]],
        "prompt_positions": [[0, 3], [1, 1]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_left_padding_moves_the_positions():
    batch = Collator(9, padding_side="left")([example([1, 2, 3], 1, [0, 3]), example([4], 0, [1, 1])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 3], [-100, -100, -100]]
    assert batch["prompt_positions"].tolist() == [[0, 3], [3, 3]]


def test_labels_and_positions_only_where_there_are_some():
    assert Collator(0)([example([1, 2])]).keys() == {"input_ids", "attention_mask"}


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=9), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
    st.data(),
)
def test_the_mask_gives_every_row_back(rows, side, data):
    places = [data.draw(st.lists(st.integers(0, len(row)), min_size=2, max_size=2).map(sorted)) for row in rows]
    examples = [example(row, 1, place) for row, place in zip(rows, places, strict=True)]
    batch = Collator(0, padding_side=side)(examples)
    length = batch["input_ids"].shape[1]
    assert length == max(map(len, rows))
    for number, (row, place) in enumerate(zip(rows, places, strict=True)):
        seen = batch["attention_mask"][number].bool()
        assert batch["input_ids"][number][seen].tolist() == row
        assert batch["labels"][number][seen].tolist() == examples[number].labels
        assert batch["input_ids"][number][~seen].eq(0).all()
        assert batch["labels"][number][~seen].eq(-100).all()
        assert not seen.diff().any() or int(seen.int().diff().abs().sum()) == 1
        # Before a virtual token stand as many real tokens as before padding.
        assert [int(seen[:position].sum()) for position in batch["prompt_positions"][number]] == place


@pytest.mark.parametrize(
    ("setting", "examples", "message"),
    [
        ({}, [], "no examples to collate"),
        ({}, [example([1], 0, [0]), example([1], 0, [0, 1])], r"\[1, 2\] virtual tokens"),
        ({}, [example([1], 0, [0]), example([1])], r"\[0, 1\] virtual tokens"),
        ({"padding_side": "middle"}, [], "padding_side is 'middle'"),
    ],
)
def test_refusals(setting, examples, message):
    with pytest.raises(DataError, match=message):
        Collator(0, **setting)(examples)


@settings(deadline=None)
@given(st.lists(st.integers(0, 99)), st.integers(1, 8))
def test_length_batches_hold_every_index_once_by_length(lengths, batch_size):
    batches = length_batches(lengths, batch_size)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(0 < len(batch) <= batch_size for batch in batches)


def test_length_batches_of_no_size():
    with pytest.raises(DataError, match="batch_size is 0"):
        length_batches([1], 0)


def test_answers_apart_are_padded_right_whatever_their_length():
    pairs = [Example(input_ids=[1, 2], labels=[5, 6], is_apart=True), Example(input_ids=[3], labels=[7], is_apart=True)]
    batch = Collator(pad_token_id=0, padding_side="left")(pairs)
    assert batch["input_ids"].tolist() == [[1, 2], [0, 3]]
    assert batch["labels"].tolist() == [[5, 6], [7, -100]]
