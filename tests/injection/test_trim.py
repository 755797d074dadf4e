"""Columns that are cut and put back, against loops over rows and columns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPastAndCrossAttentions

from softtune.injection.trim import Trim, each_state

Rows = list[list[int]]

few = settings(max_examples=60, deadline=None)


@st.composite
def masks(draw: st.DrawFn) -> Rows:
    """Attention masks with a token at least in every row, and gaps in some."""
    length = draw(st.integers(1, 7))
    rows = draw(st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=1, max_size=3))
    return [row if any(row) else [*row[:-1], 1] for row in rows]


def used_columns(rows: Rows) -> range:
    """The columns from the first to the last in which any row has a token."""
    used = [t for t in range(len(rows[0])) if any(row[t] for row in rows)]
    return range(used[0], used[-1] + 1)


@few
@given(masks(), st.booleans(), st.sampled_from([torch.long, torch.bool, torch.float32]))
def test_columns_without_any_token_are_cut(rows: Rows, keep_left: bool, dtype: torch.dtype) -> None:
    trim = Trim.from_mask(torch.tensor(rows).to(dtype), keep_left=keep_left)
    used = used_columns(rows)
    assert trim == Trim(0 if keep_left else used.start, len(rows[0]) - used.stop)


def test_a_row_without_any_token_keeps_all_columns() -> None:
    mask = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]])
    assert Trim.from_mask(mask, keep_left=False) == Trim(0, 0)


def numbered(*shape: int) -> Tensor:
    """A tensor of numbers that are all different, from 1 on."""
    return torch.arange(1, 1 + torch.Size(shape).numel()).view(shape)


ROWS, LENGTH = 2, 6
COLUMNS: dict[str, tuple[Tensor, int]] = {
    "input_ids": (numbered(ROWS, LENGTH), 1),
    "inputs_embeds": (numbered(ROWS, LENGTH, 3), 1),
    "attention_mask": (numbered(ROWS, LENGTH), 1),
    "position_ids": (numbered(1, LENGTH), 1),
    "token_type_ids": (numbered(ROWS, LENGTH), 1),
    "bbox": (numbered(1, LENGTH, 4), 1),
}
"""Arguments with a column for each token, and the dimension of the columns."""
OTHERS = {
    "encoder_hidden_states": numbered(ROWS, LENGTH, 3),
    "pixel_values": numbered(ROWS, 3, LENGTH),
    "use_cache": False,
    "cache": None,
}


@pytest.mark.parametrize("trim", [Trim(0, 0), Trim(2, 0), Trim(0, 3), Trim(1, 2), Trim(3, 2)])
@pytest.mark.parametrize("tokens", ["input_ids", "inputs_embeds"])
def test_every_argument_with_columns_is_cut(trim: Trim, tokens: str) -> None:
    left_out = "inputs_embeds" if tokens == "input_ids" else "input_ids"
    call: dict[str, Any] = {name: value for name, (value, _) in COLUMNS.items() if name != left_out}
    call |= {left_out: None, **OTHERS}
    trim.cut(call)
    kept = torch.tensor([t for t in range(LENGTH) if trim.left <= t < LENGTH - trim.right])
    for name, (value, dim) in COLUMNS.items():
        if name != left_out:
            assert torch.equal(call[name], value.index_select(dim, kept)), name
    assert call[left_out] is None
    assert {name: call[name] for name in OTHERS} == OTHERS


def test_positions_in_several_axes() -> None:
    call = {"input_ids": numbered(ROWS, LENGTH), "position_ids": numbered(3, ROWS, LENGTH)}
    Trim(1, 2).cut(call)
    assert torch.equal(call["position_ids"], numbered(3, ROWS, LENGTH)[:, :, [1, 2, 3]])


def with_zeros(states: Tensor, dim: int, trim: Trim) -> Tensor:
    """States between columns of zeros, written one by one."""
    size = states.shape[dim]
    shape = [*states.shape]
    shape[dim] = trim.left + size + trim.right
    whole = torch.zeros(shape, dtype=states.dtype)
    for t in range(size):
        whole.select(dim, trim.left + t).copy_(states.select(dim, t))
    return whole


@pytest.mark.parametrize("trim", [Trim(0, 0), Trim(2, 0), Trim(0, 3), Trim(1, 2)])
def test_outputs_get_zeros_where_columns_were_cut(trim: Trim) -> None:
    states, attention, crossing = numbered(2, 4, 3), numbered(2, 5, 4, 4), numbered(2, 5, 4, 7)
    output = BaseModelOutputWithPastAndCrossAttentions(
        last_hidden_state=states,
        hidden_states=(states, states + 1),
        attentions=(attention, None),
        cross_attentions=(None, crossing),
    )
    trim.restore(output)
    assert torch.equal(output.last_hidden_state, with_zeros(states, 1, trim))
    assert len(output.hidden_states) == len(output.attentions) == len(output.cross_attentions) == 2
    for found, expected in zip(output.hidden_states, (states, states + 1), strict=True):
        assert torch.equal(found, with_zeros(expected, 1, trim))
    assert torch.equal(output.attentions[0], with_zeros(with_zeros(attention, 2, trim), 3, trim))
    assert output.attentions[1] is output.cross_attentions[0] is None
    assert torch.equal(output.cross_attentions[1], with_zeros(crossing, 2, trim))


def test_outputs_without_states_and_weights() -> None:
    output = BaseModelOutputWithPast(last_hidden_state=numbered(1, 2, 3))
    Trim(1, 1).restore(output)
    assert {**output}.keys() == {"last_hidden_state"}
    output = SimpleNamespace(last_hidden_state=None)
    Trim(1, 1).restore(output)
    assert vars(output) == {"last_hidden_state": None}


@few
@given(masks())
def test_what_is_cut_and_restored_stands_where_it_was(rows: Rows) -> None:
    mask = torch.tensor(rows)
    call = {"inputs_embeds": numbered(*mask.shape, 2), "attention_mask": mask}
    trim = Trim.from_mask(mask, keep_left=False)
    trim.cut(call)
    output = BaseModelOutputWithPast(last_hidden_state=call["inputs_embeds"])
    trim.restore(output)
    used = torch.tensor([t in used_columns(rows) for t in range(len(rows[0]))])
    assert torch.equal(output.last_hidden_state, numbered(*mask.shape, 2) * used[:, None])


def test_gradients_are_those_of_the_columns_that_were_kept() -> None:
    states = torch.ones(1, 2, 1, requires_grad=True)
    output = BaseModelOutputWithPast(last_hidden_state=states)
    Trim(1, 2).restore(output)
    (output.last_hidden_state.flatten() * torch.tensor([10.0, 2, 3, 10, 10])).sum().backward()
    assert states.grad is not None
    assert states.grad.flatten().tolist() == [2, 3]


def test_every_state_of_an_output_is_changed_once() -> None:
    output = SimpleNamespace(
        last_hidden_state=numbered(1, 2), hidden_states=(numbered(1, 2) * 10, numbered(1, 2) * 100)
    )
    each_state(output, lambda states: states + 1)
    assert output.last_hidden_state.tolist() == [[2, 3]]
    assert [states.tolist() for states in output.hidden_states] == [[[11, 21]], [[101, 201]]]
    output = SimpleNamespace(last_hidden_state=None, hidden_states=None)
    each_state(output, lambda states: states + 1)
    assert vars(output) == {"last_hidden_state": None, "hidden_states": None}
