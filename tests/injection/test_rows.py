"""Prompts of several lengths in one tensor, against loops over prompts and virtual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from softtune import DataError
from softtune.backbone import AttentionLayer, Site, Stack
from softtune.injection.rows import RowPrompts, multiplied
from softtune.methods.prompt import KeyValue, Prompt

HEADS, KEY, VALUE, HIDDEN = 2, 3, 4, 5

few = settings(max_examples=60, deadline=None)


def stack(site: Site = Site.DECODER) -> Stack:
    module: Any = nn.Identity()
    return Stack(module, site)


def layer(index: int, site: Site = Site.DECODER) -> AttentionLayer:
    return AttentionLayer(site=site, index=index, heads=HEADS, key_size=KEY, value_size=VALUE)


def numbers(*shape: int, requires_grad: bool = False) -> Tensor:
    """Random numbers, none of them 0."""
    return torch.rand(*shape).add(1).requires_grad_(requires_grad)


def pair(length: int) -> KeyValue:
    return KeyValue(numbers(HEADS, length, KEY), numbers(HEADS, length, VALUE))


def vectors(length: int, **options: Any) -> Prompt:
    return Prompt(num_virtual_tokens=length, vectors=numbers(length, HIDDEN), **options)


def prefix(length: int, *indices: int, site: Site = Site.DECODER, **options: Any) -> Prompt:
    """A prefix in the layers of these numbers."""
    return Prompt(num_virtual_tokens=length, prefixes={(site, i): pair(length) for i in indices}, **options)


def stacked(prompts: Sequence[Prompt], *indices: int, site: Site = Site.DECODER, reads: bool = True) -> RowPrompts:
    """The prompts of a stack, of whose layers those of these numbers get a prefix."""
    return RowPrompts.from_prompts(prompts, [layer(i, site) for i in indices], stack(site), reads=reads)


def padded(parts: Sequence[Tensor | None], *, front: bool) -> tuple[Tensor, list[list[bool]]]:
    """Tensors [n, ...] in one [R, longest, ...] with zeros in front or behind, and what is no padding, row by row."""
    some = next(part for part in parts if part is not None)
    longest = max(0 if part is None else len(part) for part in parts)
    filled, real = torch.zeros(len(parts), longest, *some.shape[1:]), []
    for row, part in enumerate(parts):
        length = 0 if part is None else len(part)
        first = longest - length if front else 0
        for n in range(length):
            filled[row, first + n] = part[n]  # type: ignore[index]
        real.append([first <= n < first + length for n in range(longest)])
    return filled, real


lengths_of_prompts = st.lists(st.integers(0, 4), min_size=1, max_size=4)
"""Numbers of virtual tokens; 0 for a prompt without any."""


@few
@given(lengths_of_prompts.filter(any), st.sampled_from([Site.DECODER, Site.ENCODER]))
def test_vectors_are_padded_where_it_does_no_harm(lengths: list[int], site: Site) -> None:
    prompts = [vectors(n) if n else Prompt() for n in lengths]
    found = stacked(prompts, site=site)
    expected, real = padded([p.vectors for p in prompts], front=site is Site.DECODER)
    assert found.vectors is not None
    assert torch.equal(found.vectors, expected)
    assert found.is_vector.tolist() == real
    assert found.is_ragged is (len({*lengths}) > 1)
    assert found.shift.tolist() == [0] * len(lengths)
    assert (found.prefixes, found.lengths, found.is_prefix) == ({}, {}, {})
    assert not any((found.shifts, found.has_suffix, found.has_infix))


@few
@given(lengths_of_prompts.filter(any), st.sampled_from([Site.DECODER, Site.ENCODER]), st.data())
def test_prefixes_end_next_to_the_text_in_every_layer(lengths: list[int], site: Site, data: st.DataObject) -> None:
    choices = st.sets(st.integers(0, 1), min_size=1)
    chosen = [data.draw(choices) if n else set() for n in lengths]
    prompts = [prefix(n, *indices, site=site) for n, indices in zip(lengths, chosen, strict=True)]
    indices = sorted(set().union(*chosen))
    found = stacked(prompts, *indices, site=site)
    assert found.vectors is None
    assert found.is_vector.shape == (len(lengths), 0)
    assert [*found.prefixes] == [*found.lengths] == [(site, i) for i in indices]
    for place, kv in found.prefixes.items():
        own = [p.prefixes.get(place) for p in prompts]
        for part, name in zip(kv, ("key", "value"), strict=True):
            parts = [None if x is None else getattr(x, name).transpose(0, 1) for x in own]
            expected, real = padded(parts, front=True)
            assert torch.equal(part, expected.transpose(1, 2)), name
        in_layer = tuple(n if place[1] in some else 0 for n, some in zip(lengths, chosen, strict=True))
        assert found.lengths[place] == in_layer
        if len({*in_layer}) > 1:
            assert found.is_prefix[in_layer].tolist() == real
        else:
            assert in_layer not in found.is_prefix
    assert found.shift.tolist() == lengths
    assert found.shifts
    assert not found.is_ragged


def test_vectors_beside_prefixes() -> None:
    prompts = [vectors(3), prefix(2, 0), Prompt()]
    found = stacked(prompts, 0)
    assert found.is_vector.tolist() == [[True] * 3, [False] * 3, [False] * 3]
    assert found.lengths == {(Site.DECODER, 0): (0, 2, 0)}
    assert found.is_prefix[0, 2, 0].tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert found.shift.tolist() == [0, 2, 0]
    assert found.is_ragged


def test_prompts_that_a_stack_does_not_read() -> None:
    """A decoder gets no vectors where an encoder reads the input."""
    found = stacked([vectors(3), prefix(2, 0)], 0, reads=False)
    assert found.vectors is None
    assert found.is_vector.shape == (2, 0)
    assert not found.is_ragged


def test_nothing_at_all() -> None:
    found = stacked([Prompt(), Prompt()])
    assert found.vectors is None
    assert found.shift.tolist() == [0, 0]
    assert not any((found.shifts, found.is_ragged, found.has_suffix, found.has_infix))
    assert found.pick(torch.tensor([1, 0, 1])).is_vector.shape == (3, 0)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (prefix(3, 0), 3),
        (prefix(3, 0, shifts_positions=False), 0),
        (prefix(3, 0, after_text=True), 3),
        (prefix(3, 0, site=Site.CROSS), 0),
        (vectors(3), 0),
        (vectors(3, after_text=True), 0),
    ],
)
def test_only_prefixes_before_a_stacks_own_keys_take_positions(prompt: Prompt, expected: int) -> None:
    found = RowPrompts.from_prompts(
        [prompt, Prompt()], [layer(0, site) for site, _ in prompt.prefixes], stack(), reads=True
    )
    assert found.shift.tolist() == [expected, 0]
    assert found.shifts is bool(expected)


@pytest.mark.parametrize(
    ("prompt", "is_suffix", "is_infix"),
    [
        (vectors(2), False, False),
        (vectors(2, after_text=True), True, False),
        (prefix(2, 0), False, False),
        (prefix(2, 0, after_text=True), True, True),
    ],
)
def test_what_stands_behind_the_text(prompt: Prompt, is_suffix: bool, is_infix: bool) -> None:
    found = stacked([Prompt(), prompt], *[i for _, i in prompt.prefixes])
    assert found.after_text.tolist() == [False, is_suffix]
    assert (found.has_suffix, found.has_infix) == (is_suffix, is_infix)


def mixed() -> RowPrompts:
    return stacked([vectors(3), prefix(2, 0, 1), prefix(4, 1, after_text=True)], 0, 1)


@few
@given(st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_every_row_gets_the_prompt_of_its_number(rows: list[int]) -> None:
    prompts = mixed()
    picked = prompts.pick(torch.tensor(rows))
    for b, r in enumerate(rows):
        assert picked.vectors is not None
        assert prompts.vectors is not None
        assert torch.equal(picked.vectors[b], prompts.vectors[r])
        assert torch.equal(picked.is_vector[b], prompts.is_vector[r])
        for place, kv in prompts.prefixes.items():
            assert torch.equal(picked.prefixes[place].key[b], kv.key[r])
            assert torch.equal(picked.prefixes[place].value[b], kv.value[r])
        for lengths, real in prompts.is_prefix.items():
            assert torch.equal(picked.is_prefix[lengths][b], real[r])
        assert picked.after_text[b] == prompts.after_text[r]
        assert picked.shift[b] == prompts.shift[r]
    assert picked.lengths == prompts.lengths
    assert {len(x) for x in (picked.shift, picked.after_text, picked.is_vector)} == {len(rows)}
    for name in ("has_suffix", "has_infix", "is_ragged", "shifts"):
        assert getattr(picked, name) == getattr(prompts, name)


def test_picked_rows_may_be_picked_again() -> None:
    prompts = mixed()
    twice, once = (
        prompts.pick(torch.tensor([2, 0, 1])).pick(torch.tensor([1, 1, 0])),
        prompts.pick(torch.tensor([0, 0, 2])),
    )
    assert twice.shift.tolist() == once.shift.tolist() == [0, 0, 4]
    assert torch.equal(twice.prefixes[Site.DECODER, 1].key, once.prefixes[Site.DECODER, 1].key)


def test_one_prompt_for_all_rows_is_not_copied() -> None:
    prompts = stacked([prefix(2, 0)], 0)
    picked = prompts.pick(torch.zeros(1000, dtype=torch.long))
    for part, own in zip(picked.prefixes[Site.DECODER, 0], prompts.prefixes[Site.DECODER, 0], strict=True):
        assert len(part) == 1000
        assert part.data_ptr() == own.data_ptr()
        assert part.untyped_storage().nbytes() == own.untyped_storage().nbytes()


def test_gradients_of_rows_add_up_in_their_prompt() -> None:
    words = [numbers(n, HIDDEN, requires_grad=True) for n in (1, 3)]
    pairs = [[numbers(HEADS, 2, size, requires_grad=True) for size in (KEY, VALUE)] for _ in range(2)]
    place = (Site.DECODER, 0)
    prompts = [
        Prompt(num_virtual_tokens=len(w), vectors=w, prefixes={place: KeyValue(*kv)})
        for w, kv in zip(words, pairs, strict=True)
    ]
    rows = [1, 0, 1]
    picked = stacked(prompts, 0).pick(torch.tensor(rows))
    assert picked.vectors is not None
    weights = [numbers(*x.shape) for x in (picked.vectors, *picked.prefixes[place])]
    total = sum((x * w).sum() for x, w in zip((picked.vectors, *picked.prefixes[place]), weights, strict=True))
    total.backward()  # type: ignore[union-attr]
    for r in range(2):
        own = [b for b, row in enumerate(rows) if row == r]
        length = len(words[r])
        torch.testing.assert_close(words[r].grad, sum(weights[0][b, 3 - length :] for b in own))
        for part, weight in zip(pairs[r], weights[1:], strict=True):
            torch.testing.assert_close(part.grad, sum(weight[b] for b in own))


@few
@given(st.integers(1, 3), st.integers(1, 4))
def test_beams_multiply_rows(rows: int, beams: int) -> None:
    per_row = numbers(rows, 2)
    expected = [per_row[b].tolist() for b in range(rows) for _ in range(beams)]
    assert multiplied(per_row, rows * beams).tolist() == expected


@pytest.mark.parametrize(("given_rows", "rows"), [(2, 3), (3, 2), (4, 2)])
def test_rows_that_are_no_multiple(given_rows: int, rows: int) -> None:
    message = f"the batch has {rows} rows, adapter_names or prompt_positions {given_rows}: give one a row"
    with pytest.raises(DataError, match=message):
        multiplied(torch.zeros(given_rows), rows)
