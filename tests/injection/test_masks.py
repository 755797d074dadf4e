"""Masks with a prefix in front, against loops over rows, queries and keys."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.injection.by_hand import Sees, causal, dense_mask
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from softtune import UnsupportedModelError
from softtune.backbone.interface import MaskForm
from softtune.injection.masks import MASKS, PACKED, BlockMasks, DenseMasks, LayerShape, PaddingMasks, widen

few = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 99)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
HEADS = 4


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block masks are made without a compiler."""
    monkeypatch.setattr(torch, "compile", lambda function: function)


def layer(
    rows: int,
    queries: int,
    keys: int,
    *,
    is_causal: bool = True,
    is_crossing: bool = False,
    dtype: torch.dtype = torch.float32,
    arguments: dict[str, Any] | None = None,
) -> LayerShape:
    query = torch.zeros(rows, HEADS, queries, 2, dtype=dtype)
    return LayerShape(query=query, keys=keys, is_causal=is_causal, is_crossing=is_crossing, arguments=arguments or {})


def at(table: Tensor, *index: int) -> Any:
    """An entry of a table, some of whose dimensions are 1 and stand for all."""
    return table[tuple(min(i, size - 1) for i, size in zip(index, table.shape, strict=True))].item()


def random(*shape: int) -> Tensor:
    return torch.rand(*shape) < 0.5


def test_every_form_of_mask_has_its_operations() -> None:
    assert {form: type(masks) for form, masks in MASKS.items()} == {
        MaskForm.DENSE: DenseMasks,
        MaskForm.BLOCKS: BlockMasks,
        MaskForm.PADDING: PaddingMasks,
    }


def test_a_shape_counts_queries_and_makes_ones() -> None:
    text = layer(2, 3, 5)
    assert text.queries == 3
    assert text.ones(2, 1).tolist() == [[True], [True]]


# Dense masks


@st.composite
def dense_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, int]:
    """A mask for all rows or for each, what queries see of a prefix, and its length."""
    torch.manual_seed(draw(seeds))
    rows, queries, keys, length = (draw(st.integers(1, n)) for n in (3, 4, 5, 3))
    dtype = draw(st.sampled_from([torch.bool, *FLOATS]))
    mask = random(draw(st.sampled_from([1, rows])), 1, draw(st.sampled_from([1, queries])), keys)
    if dtype != torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, torch.finfo(dtype).min) + draw(st.integers(-2, 0))
    sees = draw(st.booleans())
    visible = random(draw(st.sampled_from([1, rows])), draw(st.sampled_from([1, queries])), length) if sees else None
    return mask, visible, length


@few
@given(dense_cases())
def test_dense_masks_get_columns_in_front(case: tuple[Tensor, Tensor | None, int]) -> None:
    mask, visible, length = case
    before = mask.clone()
    rows, _, queries, keys = mask.shape
    if visible is not None:
        rows, queries = max(rows, len(visible)), max(queries, visible.shape[1])
    is_boolean = mask.dtype == torch.bool
    seen, hidden = (True, False) if is_boolean else (0.0, torch.finfo(mask.dtype).min)
    for found in (
        widen(mask, visible, length),
        DenseMasks().widened(mask, visible, length, layer(rows, queries, keys)),
    ):
        assert isinstance(found, Tensor)
        assert found.shape == (rows, 1, queries, length + keys)
        assert found.dtype == mask.dtype
        for b, t in product(range(rows), range(queries)):
            for p in range(length):
                sees = visible is None or at(visible, b, t, p)
                assert found[b, 0, t, p].item() == (seen if sees else hidden)
            for s in range(keys):
                assert found[b, 0, t, length + s].item() == at(mask, b, 0, t, s)
    assert torch.equal(mask, before)


def test_a_prefix_of_no_tokens_changes_nothing() -> None:
    mask = random(2, 1, 3, 4)
    assert torch.equal(widen(mask, None, 0), mask)
    assert torch.equal(widen(mask, random(2, 3, 0), 0), mask)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("visible_rows", [None, 1, 2])
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_mask_that_attention_without_one_implies(
    is_causal: bool, visible_rows: int | None, dtype: torch.dtype
) -> None:
    queries = keys = 4
    visible = None if visible_rows is None else random(visible_rows, queries, 3)
    found = DenseMasks().widened(None, visible, 3, layer(2, queries, keys, is_causal=is_causal, dtype=dtype))
    if visible is None and not is_causal:
        assert found is None
        return

    def sees(b: int, t: int, key: int) -> bool:
        if key < 3:
            return visible is None or bool(visible[b, t, key])
        return not is_causal or key - 3 <= t

    expected = dense_mask(sees, visible_rows or 1, queries, 3 + keys, dtype)  # additive: eager attention adds it
    assert isinstance(found, Tensor)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_one_query_sees_all_keys_without_a_mask() -> None:
    """A decoding step's query is the last token, whatever the number of keys."""
    assert DenseMasks().widened(None, None, 3, layer(2, 1, 5)) is None
    visible = torch.tensor([[[True, False, True]]])
    found = DenseMasks().widened(None, visible, 3, layer(2, 1, 5))
    assert isinstance(found, Tensor)
    assert found.tolist() == [[[[0.0, torch.finfo(torch.float32).min, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]]]


@st.composite
def opened_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Open slots [B, T or 1, S'], and a mask of as many keys or more."""
    torch.manual_seed(draw(seeds))
    rows, queries, slots = (draw(st.integers(1, n)) for n in (3, 4, 4))
    keys = slots + draw(st.integers(0, 2))
    open_slots = random(rows, draw(st.sampled_from([1, queries])), slots)
    return random(draw(st.sampled_from([1, rows])), 1, queries, keys), open_slots


@few
@given(opened_cases(), st.sampled_from([torch.bool, *FLOATS]))
def test_open_slots_are_seen_in_dense_masks(case: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    seen, slots = case
    rows, queries, keys = len(slots), *seen.shape[2:]
    hidden = False if dtype == torch.bool else torch.finfo(dtype).min
    mask = seen if dtype == torch.bool else torch.full(seen.shape, -0.5, dtype=dtype).masked_fill(~seen, hidden)
    found = DenseMasks().opened(mask, slots, layer(rows, queries, keys))
    assert isinstance(found, Tensor)
    assert found.shape == (rows, 1, queries, keys)
    for b, t, s in product(range(rows), range(queries), range(keys)):
        is_open = s < slots.shape[2] and at(slots, b, t, s)
        own = at(mask, b, 0, t, s)
        assert found[b, 0, t, s].item() == ((True if dtype == torch.bool else 0.0) if is_open else own)


def test_without_a_dense_mask_all_slots_are_open() -> None:
    for masks in (DenseMasks(), BlockMasks(), PaddingMasks()):
        assert masks.opened(None, random(2, 1, 4), layer(2, 4, 4)) is None


def test_a_dense_mask_says_all_that_causality_says() -> None:
    arguments = {"scaling": 0.5, "is_causal": True}
    assert DenseMasks().arguments(layer(1, 2, 2, arguments=arguments)) == {"scaling": 0.5, "is_causal": False}
    assert arguments == {"scaling": 0.5, "is_causal": True}


# Block masks


def block_mask(sees: Tensor) -> BlockMask:
    """The block mask of a table [B, T, S]."""
    rows, queries, keys = sees.shape
    return create_block_mask(lambda b, h, t, s: sees[b, t, s], rows, None, queries, keys, "cpu")


def table(mask: Any, rows: int, queries: int, keys: int) -> list[list[list[bool]]]:
    """What a block mask says of each row, query and key; it says the same of every head."""
    assert isinstance(mask, BlockMask)
    assert mask.shape == (rows, 1, queries, keys)

    def says(*index: int) -> bool:
        return bool(mask.mask_mod(*map(torch.tensor, index)))

    for head in range(1, HEADS):
        assert says(0, head, 0, 0) == says(0, 0, 0, 0)
    return [[[says(b, 0, t, s) for s in range(keys)] for t in range(queries)] for b in range(rows)]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("visible_shape", [None, (1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("has_mask", [True, False])
def test_block_masks_answer_for_the_prefix_and_ask_about_the_text(
    has_mask: bool, visible_shape: tuple[int, int] | None
) -> None:
    rows, queries, keys, length = 2, 3, 4, 2
    own = random(rows, queries, keys)
    visible = None if visible_shape is None else random(*visible_shape, length)
    found = BlockMasks().widened(block_mask(own) if has_mask else None, visible, length, layer(rows, queries, keys))
    if not has_mask and visible is None:
        assert found is None
        return
    expected = [
        [
            [visible is None or at(visible, b, t, p) for p in range(length)]
            + [not has_mask or bool(own[b, t, s]) for s in range(keys)]
            for t in range(queries)
        ]
        for b in range(rows)
    ]
    assert table(found, rows, queries, length + keys) == expected


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("shape", [(2, 1, 4), (2, 3, 4), (2, 1, 3)])
def test_open_slots_are_seen_in_block_masks(shape: tuple[int, int, int]) -> None:
    rows, queries, keys = 2, 3, 4
    own, slots = random(rows, queries, keys), random(*shape)
    found = BlockMasks().opened(block_mask(own), slots, layer(rows, queries, keys))
    expected = [
        [[bool(own[b, t, s]) or (s < shape[2] and at(slots, b, t, s)) for s in range(keys)] for t in range(queries)]
        for b in range(rows)
    ]
    assert table(found, rows, queries, keys) == expected


@pytest.mark.usefixtures("uncompiled")
def test_blocks_that_a_query_sees_something_of_are_kept() -> None:
    """A kernel skips whole blocks of 128 queries and 128 keys."""
    rows, queries, keys, length, window = 1, 300, 300, 100, 20
    own = torch.tensor([[[t - window < s <= t for s in range(keys)] for t in range(queries)]])
    visible = torch.zeros(1, queries, length, dtype=torch.bool)
    visible[:, 290:] = True
    found = BlockMasks().widened(block_mask(own), visible, length, layer(rows, queries, keys))
    assert isinstance(found, BlockMask)
    whole = torch.nn.functional.pad(torch.cat([visible, own], dim=2), (0, 512 - length - keys, 0, 384 - queries))
    expected = whole.view(3, 128, 4, 128).any(dim=3).any(dim=1)
    assert found.to_dense()[0, 0].bool().tolist() == expected.tolist()


def test_block_attention_takes_dense_masks_too() -> None:
    mask, visible, slots = random(2, 1, 3, 4), random(2, 3, 2), random(2, 1, 4)
    text = layer(2, 3, 4)
    for dtype in (torch.bool, torch.float32):
        own = mask if dtype == torch.bool else mask.float()
        assert torch.equal(BlockMasks().widened(own, visible, 2, text), widen(own, visible, 2))  # type: ignore[arg-type]
        expected = DenseMasks().opened(own, slots, text)
        assert torch.equal(BlockMasks().opened(own, slots, text), expected)  # type: ignore[arg-type]


def test_one_bias_for_all_rows_gets_a_row_for_each() -> None:
    bias = torch.randn(1, HEADS, 3, 4)
    found = BlockMasks().arguments(layer(2, 3, 4, arguments={"position_bias": bias, "scaling": 0.5}))
    assert found["scaling"] == 0.5
    assert torch.equal(found["position_bias"], torch.cat([bias, bias]))
    for arguments in ({"scaling": 0.5}, {"position_bias": None}):
        assert BlockMasks().arguments(layer(2, 3, 4, arguments=arguments)) == arguments


# Padding masks


@few
@given(st.data())
def test_padding_masks_get_columns_in_front(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(seeds))
    rows, keys, length = (data.draw(st.integers(1, n)) for n in (3, 5, 3))
    visible = random(data.draw(st.sampled_from([1, rows])), 1, length) if data.draw(st.booleans()) else None
    mask = random(rows, keys) if data.draw(st.booleans()) else None
    if mask is not None:
        mask = mask.to(data.draw(st.sampled_from([torch.bool, torch.long])))
    found = PaddingMasks().widened(mask, visible, length, layer(rows, 2, keys))
    if mask is None and visible is None:
        assert found is None
        return
    assert isinstance(found, Tensor)
    assert found.tolist() == [
        [visible is None or at(visible, b, 0, p) for p in range(length)]
        + [mask is None or bool(mask[b, s]) for s in range(keys)]
        for b in range(rows)
    ]


def test_padding_is_all_that_a_padding_mask_says() -> None:
    mask = random(2, 4)
    assert PaddingMasks().opened(mask, random(2, 1, 4), layer(2, 4, 4)) is mask


@pytest.mark.parametrize("is_causal", [True, False])
def test_arguments_without_a_window_that_the_text_does_not_fill(is_causal: bool) -> None:
    arguments = {"sliding_window": 4, "position_ids": torch.zeros(2, 3), "scaling": 0.5}
    text = layer(2, 3, 4, is_causal=is_causal, arguments=arguments)
    assert PaddingMasks().arguments(text) == {"scaling": 0.5, "is_causal": is_causal}
    text = layer(2, 3, 4, arguments={"sliding_window": None, "position_bias": None})
    assert PaddingMasks().arguments(text) == {"is_causal": True, "position_bias": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sliding_window": 3}, "hides virtual tokens behind a window of 3 tokens in a text of 4: load the model with"),
        ({"position_bias": torch.zeros(1, HEADS, 3, 4)}, "has no position bias for virtual tokens"),
    ],
)
def test_arguments_that_flash_attention_does_not_take(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"flash attention {message}"):
        PaddingMasks().arguments(layer(2, 3, 4, arguments=arguments))


REFUSED: dict[str, tuple[Tensor | None, Tensor | None, dict[str, Any]]] = {
    "takes no ready mask beside a prefix": (torch.zeros(2, 1, 3, 4), None, {}),
    "cannot hide an infix from the tokens before it": (None, random(2, 3, 2), {}),
    "takes the padding of the encoder's prefixes": (None, random(2, 1, 2), {"is_crossing": True}),
    PACKED: (None, None, {"arguments": {"cu_seq_lens_q": torch.tensor([0, 2, 3])}}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_masks_that_flash_attention_does_not_take(message: str) -> None:
    mask, visible, options = REFUSED[message]
    with pytest.raises(UnsupportedModelError, match=f"flash attention {message}.*'sdpa' or 'eager'"):
        PaddingMasks().widened(mask, visible, 2, layer(2, 3, 4, **options))


def test_one_query_of_cross_attention_may_have_padding() -> None:
    visible = torch.tensor([[[False, True]], [[True, True]]])
    found = PaddingMasks().widened(None, visible, 2, layer(2, 1, 1, is_crossing=True))
    assert isinstance(found, Tensor)
    assert found.tolist() == [[False, True, True], [True, True, True]]
    assert PaddingMasks().widened(None, None, 2, layer(2, 3, 4, is_crossing=True)) is None


# All forms say the same


@pytest.mark.usefixtures("uncompiled")
def test_forms_agree_on_padded_causal_texts() -> None:
    """Flash attention's kernels see a key where it is no padding, and not behind the query."""
    padding = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])
    visible = torch.tensor([[[False, True]], [[True, True]]])
    sees: Sees = causal(padding)
    text = layer(2, 4, 4)
    dense = DenseMasks().widened(dense_mask(sees, 2, 4, 4, torch.bool), visible, 2, text)
    blocks = BlockMasks().widened(block_mask(dense_mask(sees, 2, 4, 4, torch.bool)[:, 0]), visible, 2, text)
    flat = PaddingMasks().widened(padding, visible, 2, text)
    assert isinstance(dense, Tensor)
    assert isinstance(flat, Tensor)
    assert dense[:, 0].tolist() == table(blocks, 2, 4, 6)
    behind = torch.tensor([[key <= query + 2 for key in range(6)] for query in range(4)])
    assert dense[:, 0].tolist() == (flat[:, None] & behind).tolist()
