"""Columns of virtual tokens, against what is counted by hand."""

from __future__ import annotations

import pytest
import torch
from tests.families import CAUSAL_LM, base_model
from torch import Tensor

from softtune import DataError
from softtune.backbone import Backbone
from softtune.injection.columns import Columns
from softtune.injection.rows import RowPrompts
from softtune.injection.step import Step
from softtune.injection.trim import Trim
from softtune.methods.prompt import Prompt

MASK = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]])
STARTS, ENDS = [2, 1, 1], [5, 5, 2]


def rows_of(*after_text: bool, length: int = 2) -> RowPrompts:
    """A row for each element: vectors behind the text, or in front of it."""
    stack = Backbone.shared(base_model("gpt2", CAUSAL_LM)).stacks[0]
    prompts = [Prompt(num_virtual_tokens=length, vectors=torch.zeros(length, 4), after_text=a) for a in after_text]
    return RowPrompts.from_prompts(prompts, [], stack, reads=True)


def step(mask: Tensor = MASK) -> Step:
    return Step({"input_ids": mask, "attention_mask": mask})


def test_in_front_of_the_text_or_at_its_end() -> None:
    prompts = rows_of(False, True, True)
    columns = Columns(None, None).in_call(step(), prompts, None)
    assert columns.vector_columns(step(), prompts).tolist() == [[2, 2], [5, 5], [2, 2]]


def test_texts_end_where_the_first_call_ended() -> None:
    prompts, first = rows_of(True, True, True), Columns(None, None)
    shown = first.in_call(step(), prompts, None)
    longer = step(torch.cat([MASK, torch.ones(3, 2, dtype=torch.long)], dim=1))
    again = shown.in_call(longer, prompts, None)
    assert shown.text_ends is not None
    assert shown.text_ends.tolist() == ENDS
    assert again.vector_columns(longer, prompts)[:, 0].tolist() == ENDS
    assert first.text_ends is None


def test_ends_that_the_caller_knows_stay() -> None:
    prompts = rows_of(True, True, True)
    columns = Columns(None, torch.tensor([3, 2, 1])).in_call(step(), prompts, None)
    assert columns.vector_columns(step(), prompts)[:, 0].tolist() == [3, 2, 1]


def test_columns_that_are_left_out_are_counted() -> None:
    prompts, cut = rows_of(False, True, True), Trim(left=1, right=1)
    trimmed = step(MASK[:, 1:-1])
    columns = Columns(None, None).in_call(trimmed, prompts, cut)
    assert columns.text_ends is not None
    assert columns.text_ends.tolist() == ENDS
    assert columns.vector_columns(trimmed, prompts)[:, 0].tolist() == [1, 4, 1]


def test_given_columns_are_those_of_the_caller() -> None:
    given, prompts = torch.tensor([[2, 3], [1, 5], [6, 6]]), rows_of(False, True, False)
    assert torch.equal(Columns(given, None).in_call(step(), prompts, None).vector_columns(step(), prompts), given)
    cut = Columns(given, None).in_call(step(MASK[:, 1:-1]), prompts, Trim(left=1, right=1))
    assert cut.vector_columns(step(MASK[:, 1:-1]), prompts).tolist() == [[1, 2], [0, 4], [4, 4]]


def test_beams_multiply_the_rows() -> None:
    prompts = rows_of(False).pick(torch.zeros(6, dtype=torch.long))
    columns = Columns(torch.tensor([[1, 2], [3, 3], [0, 6]]), None)
    beams = step(MASK.repeat_interleave(2, dim=0))
    assert columns.vector_columns(beams, prompts).tolist() == [[1, 2], [1, 2], [3, 3], [3, 3], [0, 6], [0, 6]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[0, 7]] * 3, "from 0 to 7 do not fit: give columns from 0 to 6"),
        ([[-1, 2]] * 3, "from -1 to 2 do not fit"),
        ([[3, 2]] * 3, "do not ascend"),
        ([[1, 2]] * 2, "the batch has 3 rows"),
    ],
)
def test_columns_that_do_not_fit(given: list[list[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Columns(torch.tensor(given), None).vector_columns(step(), rows_of(False, False, False))


def test_an_infix_stands_at_one_place() -> None:
    prompts = rows_of(True, False, True)
    given = torch.tensor([[2, 2], [0, 5], [1, 1]])
    assert Columns(given, None).infix_column(step(), prompts).tolist() == [[2], [0], [1]]
    with pytest.raises(DataError, match="an infix stands at one place"):
        Columns(given.flip(1).sort(dim=1).values + torch.tensor([0, 1]), None).infix_column(step(), prompts)
