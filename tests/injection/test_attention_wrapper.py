"""Attention with a prefix, by transformers' own functions, against attention in loops."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from tests import flash
from tests.injection.by_hand import Sees, attention, causal, dense_mask, padding_mask
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from softtune import UnsupportedModelError
from softtune.backbone.interface import Attention, MaskForm
from softtune.injection.attention_wrapper import PrefixAttention
from softtune.methods.prompt import KeyValue

HEADS, KEY_HEADS, KEY, VALUE, P = 4, 2, 3, 5, 3
LENGTHS = [5, 2, 3]
FUNCTIONS = {
    "sdpa": Attention(ALL_ATTENTION_FUNCTIONS["sdpa"], MaskForm.DENSE),
    "eager": Attention(eager_attention_forward, MaskForm.DENSE),
}
SCALING = KEY**-0.5
SINGLE = {"atol": 1e-6, "rtol": 1e-5}


class Layer(nn.Module):
    """What attention functions ask of an attention module."""

    def __init__(self, *, is_causal: bool = True, groups: int = HEADS // KEY_HEADS) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.num_key_value_groups = groups


def states(rows: int, queries: int, keys: int, key_heads: int = KEY_HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, heads, T, K], keys [B, H, S, K] and values [B, H, S, V] in double precision."""
    shapes = (rows, HEADS, queries, KEY), (rows, key_heads, keys, KEY), (rows, key_heads, keys, VALUE)
    query, key, value = (torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes)
    return query, key, value


def prefix(rows: int, length: int = P, key_heads: int = KEY_HEADS) -> KeyValue:
    shapes = (rows, key_heads, length, KEY), (rows, key_heads, length, VALUE)
    return KeyValue(*(torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes))


def wrapper(prefixes: dict[nn.Module, KeyValue], **options: Any) -> PrefixAttention:
    return PrefixAttention(prefixes, **{"visible": {}, "biases": {}, **options})


def behind(length: int, sees: Sees, visible: Tensor | None = None) -> Sees:
    """What queries see of a prefix, by ``visible`` [B or 1, T or 1, P] where it is given, and of the text behind it."""

    def sees_either(b: int, t: int, key: int) -> bool:
        if key >= length:
            return sees(b, t, key - length)
        return visible is None or bool(visible[min(b, len(visible) - 1), min(t, visible.shape[1] - 1), key])

    return sees_either


def joined(pair: KeyValue, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with a prefix in front, token by token."""
    keys, values = (
        torch.stack([part[:, :, n] for part in parts for n in range(part.shape[2])], dim=2)
        for parts in ((pair.key, key), (pair.value, value))
    )
    return keys, values


def assert_same(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Outputs and gradients are the same; transformers' eager attention rounds its weights to single precision."""
    torch.testing.assert_close(found, expected, **SINGLE)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((x * weights).sum(), inputs) for x in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **SINGLE)


MASKS: dict[str, torch.dtype | None] = {"none": None, "boolean": torch.bool, "additive": torch.double}
CASES = [
    (function, mask, side, window)
    for function in FUNCTIONS
    for mask in MASKS
    for side in ("left", "right", "both", "none")
    for window in (None, 2)
    if not (mask == "none" and (side != "none" or window)) and not (mask == "boolean" and function == "eager")
]


@pytest.mark.parametrize(("function", "mask", "side", "window"), CASES)
def test_every_query_sees_the_prefix(function: str, mask: str, side: str, window: int | None) -> None:
    """Beyond its sliding window too. Query heads share keys, and keys and values have sizes of their own."""
    padding = padding_mask(LENGTHS, side)
    rows, length = padding.shape
    module, pair = Layer(), prefix(rows)
    query, key, value = states(rows, length, length)
    sees = causal(padding, window)
    dtype = MASKS[mask]
    dense = None if dtype is None else dense_mask(sees, rows, length, length, dtype)
    found, weights = wrapper({module: pair})(
        FUNCTIONS[function], module, query, key, value, dense, scaling=SCALING, dropout=0.0
    )
    expected, shares = attention(query, *joined(pair, key, value), behind(P, sees))
    assert_same(found, expected, [query, key, value, *pair])
    if function == "eager":
        assert weights is not None
        torch.testing.assert_close(weights, shares[..., P:], **SINGLE)
    else:
        assert weights is None


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 4), (3, 4)])
def test_queries_that_see_some_of_the_prefix(function: str, has_mask: bool, shape: tuple[int, int]) -> None:
    rows, length = 3, 4
    module, pair = Layer(), prefix(rows)
    query, key, value = states(rows, length, length)
    visible = torch.rand(*shape, P) < 0.5
    sees = causal(torch.ones(rows, length))
    mask = dense_mask(sees, rows, length, length, torch.double) if has_mask else None
    found, _ = wrapper({module: pair}, visible={module: visible})(
        FUNCTIONS[function], module, query, key, value, mask, scaling=SCALING
    )
    expected, _ = attention(query, *joined(pair, key, value), behind(P, sees, visible))
    assert_same(found, expected, [query, key, value, *pair])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("has_mask", [True, False])
def test_queries_that_see_every_key(function: str, has_mask: bool) -> None:
    """In an encoder, in cross-attention with other numbers of queries and keys, and in a decoding step."""
    for module, queries, keys, options in (
        (Layer(is_causal=False), 4, 4, {}),
        (Layer(is_causal=False), 2, 5, {"is_causal": None}),
        (Layer(is_causal=True), 3, 4, {"is_causal": False}),
        (Layer(is_causal=True), 1, 5, {}),
    ):
        pair = prefix(2)
        query, key, value = states(2, queries, keys)
        visible = torch.tensor([[[True, False, True]], [[False, True, True]]])
        mask = torch.zeros(2, 1, queries, keys, dtype=torch.double) if has_mask else None
        for seen in ({}, {module: visible}):
            found, _ = wrapper({module: pair}, visible=seen)(
                FUNCTIONS[function], module, query, key, value, mask, scaling=SCALING, **options
            )
            sees = behind(P, lambda b, t, s: True, seen.get(module))
            expected, _ = attention(query, *joined(pair, key, value), sees)
            assert_same(found, expected, [query, key, value, *pair])


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [(True, None, True), (False, None, False), (False, True, True), (True, False, False), (None, None, True)],
)
def test_an_argument_goes_before_the_modules_causality(own: bool | None, given: bool | None, expected: bool) -> None:
    module, pair = Layer(), prefix(1)
    if own is None:
        del module.is_causal
    else:
        module.is_causal = own
    query, key, value = states(1, 3, 3)
    found, _ = wrapper({module: pair})(
        FUNCTIONS["sdpa"], module, query, key, value, None, scaling=SCALING, is_causal=given
    )
    sees = behind(P, lambda b, t, s: not expected or s <= t)
    assert_same(found, attention(query, *joined(pair, key, value), sees)[0], [query, *pair])


def test_gradients_by_finite_differences() -> None:
    module, pair = Layer(), prefix(2)
    query, key, value = states(2, 3, 3)
    mask = dense_mask(causal(padding_mask([3, 2], "left")), 2, 3, 3, torch.double)

    def outputs(*parts: Tensor) -> Tensor:
        by_prefix = wrapper({module: KeyValue(*parts[3:])})
        return by_prefix(FUNCTIONS["sdpa"], module, *parts[:3], mask, scaling=SCALING)[0]

    assert torch.autograd.gradcheck(outputs, (query, key, value, *pair))


@pytest.mark.parametrize("bias_rows", [1, 2])
@pytest.mark.parametrize("added_rows", [None, 1, 2])
def test_score_biases_get_columns_in_front(bias_rows: int, added_rows: int | None) -> None:
    rows, queries, keys = 2, 3, 4
    module, pair = Layer(is_causal=False, groups=1), prefix(rows, key_heads=HEADS)
    query, key, value = states(rows, queries, keys, key_heads=HEADS)
    bias = torch.randn(bias_rows, HEADS, queries, keys, dtype=torch.double)
    added = torch.zeros(1, HEADS, 1, P) if added_rows is None else torch.randn(added_rows, HEADS, queries, P)
    biases = {} if added_rows is None else {module: added}
    found, _ = wrapper({module: pair}, biases=biases)(
        FUNCTIONS["sdpa"], module, query, key, value, None, scaling=SCALING, position_bias=bias
    )
    whole = torch.cat(
        [added.double().expand(rows, -1, queries, -1), bias.expand(rows, -1, -1, -1)],
        dim=3,
    )
    expected, _ = attention(query, *joined(pair, key, value), lambda b, t, s: True, whole)
    assert_same(found, expected, [query, key, value, *pair])


# The cache holds the prefix


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("mask", ["none", "additive"])
def test_a_prefix_in_the_cache_is_not_added_again(function: str, mask: str) -> None:
    rows, length = 2, 4
    module, pair = Layer(), prefix(rows)
    query, key, value = states(rows, length, length)
    sees = causal(torch.ones(rows, length))
    dtype = MASKS[mask]
    dense = None if dtype is None else dense_mask(sees, rows, length, length, dtype)
    both = joined(pair, key, value)
    visible = torch.tensor([[[False, True, True]], [[True, False, True]]])
    for seen in ({}, {module: visible}):
        expected, shares = attention(query, *both, behind(P, sees, seen.get(module)))
        found, weights = wrapper({module: pair}, visible=seen, cached={module})(
            FUNCTIONS[function], module, query, *both, dense, scaling=SCALING
        )
        torch.testing.assert_close(found, expected, **SINGLE)
        if weights is not None:
            torch.testing.assert_close(weights, shares[..., P:], **SINGLE)


# Slots that stay visible


@pytest.mark.parametrize("mask", ["boolean", "additive"])
@pytest.mark.parametrize("has_prefix", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_open_slots_are_seen_beyond_the_window(mask: str, has_prefix: bool, is_causal: bool) -> None:
    rows, length, window = 2, 5, 2
    module = Layer(is_causal=is_causal)
    query, key, value = states(rows, length, length)
    is_virtual = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0]]).bool()
    slots = is_virtual[:, None]
    if is_causal:
        slots = torch.stack([is_virtual & (torch.arange(length) <= t) for t in range(length)], dim=1)

    def windowed(b: int, t: int, s: int) -> bool:
        return t - window < s <= (t if is_causal else t + window - 1)

    def opened(b: int, t: int, s: int) -> bool:
        return windowed(b, t, s) or (bool(is_virtual[b, s]) and (s <= t or not is_causal))

    dense = dense_mask(windowed, rows, length, length, MASKS[mask])  # type: ignore[arg-type]
    pair = prefix(rows, P if has_prefix else 0)
    found, _ = wrapper({module: pair} if has_prefix else {}, open_slots=slots)(
        FUNCTIONS["sdpa"], module, query, key, value, dense, scaling=SCALING
    )
    expected, _ = attention(query, *joined(pair, key, value), behind(pair.key.shape[2], opened))
    assert_same(found, expected, [query, key, value])


@pytest.mark.parametrize("is_causal", [True, False])
def test_open_slots_without_a_mask_leave_causality_to_attention(is_causal: bool) -> None:
    module = Layer(is_causal=is_causal)
    query, key, value = states(2, 3, 3)
    slots = torch.zeros(2, 1, 3, dtype=torch.bool)
    found, _ = wrapper({}, open_slots=slots)(FUNCTIONS["sdpa"], module, query, key, value, None, scaling=SCALING)
    expected, _ = attention(query, key, value, lambda b, t, s: not is_causal or s <= t)
    assert_same(found, expected, [query, key, value])


# What reaches the attention function


class Recorder:
    """An attention function that keeps its arguments."""

    def __init__(self, form: MaskForm = MaskForm.DENSE) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.attend = Attention(self._note, form)

    def _note(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        self.calls.append((args, kwargs))
        return args[1], None


def test_other_modules_are_passed_through_as_they_are() -> None:
    module, other, recorder = Layer(), Layer(), Recorder()
    query, key, value = states(1, 3, 3)
    mask = torch.zeros(1, 1, 3, 3)
    attend = wrapper({module: prefix(1)})
    output, weights = attend(recorder.attend, other, query, key, value, mask, scaling=0.5, is_causal=None)
    ((args, kwargs),) = recorder.calls
    assert all(a is b for a, b in zip(args, (other, query, key, value, mask), strict=True))
    assert kwargs == {"scaling": 0.5, "is_causal": None}
    assert output is query
    assert weights is None
    assert attend.reached == set()
    attend(recorder.attend, module, query, key, value, mask)
    assert attend.reached == {id(module)}


def test_prefixes_take_the_type_of_the_keys() -> None:
    module, recorder = Layer(), Recorder()
    query, key, value = (part.bfloat16() for part in states(1, 2, 2))
    wrapper({module: prefix(1)})(recorder.attend, module, query, key, value, None)
    (_, _, keys, values, mask), kwargs = recorder.calls[0]
    assert keys.dtype == values.dtype == mask.dtype == torch.bfloat16
    assert (keys.shape[2], values.shape[2]) == (P + 2, P + 2)
    assert kwargs == {"is_causal": False}


def mask_of(attend: PrefixAttention, module: nn.Module, keys: int, mask: Tensor | None) -> Tensor:
    """The mask that a module's attention function gets."""
    recorder = Recorder()
    query, key, value = states(2, 3, keys)
    attend(recorder.attend, module, query, key, value, mask)
    found: Tensor = recorder.calls[0][0][4]
    return found


@pytest.mark.parametrize("has_slots", [True, False])
@pytest.mark.parametrize("has_mask", [True, False])
def test_layers_with_the_same_mask_share_the_one_that_is_made(has_mask: bool, has_slots: bool) -> None:
    """Making one for each of many layers would cost more than their attention."""
    first, second, unlike, whole, longer, crossing = (Layer() for _ in range(6))
    crossing.is_causal = False
    prefixes = {m: prefix(2) for m in (first, second, unlike, whole, crossing)} | {longer: prefix(2, P + 1)}
    seen, other_seen = torch.ones(2, 1, P, dtype=torch.bool), torch.ones(2, 1, P, dtype=torch.bool)
    slots = torch.zeros(2, 1, 3, dtype=torch.bool) if has_slots else None
    visible = {first: seen, second: seen, unlike: other_seen, crossing: seen}
    attend = wrapper(prefixes, visible=visible, open_slots=slots)
    mask = torch.zeros(2, 1, 3, 3) if has_mask else None
    own = mask_of(attend, first, 3, mask)
    assert mask_of(attend, first, 3, mask) is own
    assert mask_of(attend, second, 3, mask) is own
    assert mask_of(attend, unlike, 3, mask) is not own
    assert mask_of(attend, whole, 3, mask).shape[-1] == P + 3
    assert mask_of(attend, longer, 3, mask).shape[-1] == P + 4
    if has_mask:
        assert mask_of(attend, first, 3, torch.zeros(2, 1, 3, 3)) is not own
    else:
        assert mask_of(attend, first, 4, None).shape[-1] == P + 4
        assert mask_of(attend, crossing, 3, None).tolist() != own.tolist()


@pytest.mark.parametrize("has_slots", [True, False])
def test_masks_live_as_long_as_the_wrapper(has_slots: bool) -> None:
    """They are told apart by their addresses, which are given out again."""
    module = Layer()
    slots = torch.zeros(1, 1, 3, dtype=torch.bool) if has_slots else None
    attend = wrapper({module: prefix(2)}, open_slots=slots)
    masks = [torch.full((1, 1, 3, 3), float(number)) for number in range(3)]
    kept = [weakref.ref(mask) for mask in masks]
    for number, mask in enumerate(masks):
        assert mask_of(attend, module, 3, mask)[..., P:].unique().tolist() == [number]
    del mask, masks
    gc.collect()
    assert all(ref() is not None for ref in kept)
    del attend
    gc.collect()
    assert all(ref() is None for ref in kept)


# The other forms of masks


def block_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask
) -> tuple[Tensor, None]:
    """Attention in loops, by the function of a block mask."""
    assert mask.shape == (len(query), 1, query.shape[2], key.shape[2])

    def sees(b: int, t: int, s: int) -> bool:
        return bool(mask.mask_mod(*map(torch.tensor, (b, 0, t, s))))

    return attention(query, key, value, sees)[0], None


def test_with_a_block_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    padding = padding_mask([4, 2], "left")
    table = dense_mask(causal(padding, window=2), 2, 4, 4, torch.bool)[:, 0]
    mask = create_block_mask(lambda b, h, t, s: table[b, t, s], 2, None, 4, 4, "cpu")
    module, pair = Layer(), prefix(2)
    query, key, value = states(2, 4, 4)
    visible = torch.tensor([[[True, False, True]], [[False, True, True]]])
    for seen in ({}, {module: visible}):
        found, _ = wrapper({module: pair}, visible=seen)(
            Attention(block_attention, MaskForm.BLOCKS), module, query, key, value, mask
        )
        sees = behind(P, causal(padding, window=2), seen.get(module))
        assert_same(found, attention(query, *joined(pair, key, value), sees)[0], [query, key, value, *pair])


def flash_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_causal: bool
) -> tuple[Tensor, None]:
    """The kernels on each row's real keys, and on as many of its queries as stand at the last of them."""
    rows, _, queries, _ = query.shape
    outputs = query.new_zeros(rows, queries, HEADS, VALUE)
    for b in range(rows):
        is_key = torch.ones(key.shape[2], dtype=torch.bool) if mask is None else mask[b]
        is_query = is_key[-queries:]
        own = (x[b].transpose(0, 1)[real][None] for x, real in ((query, is_query), (key, is_key), (value, is_key)))
        outputs[b, is_query] = flash.flash_attn_func(*own, causal=is_causal)[0]
    return outputs, None


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_with_a_padding_mask(side: str, is_causal: bool) -> None:
    padding = padding_mask([4, 2], side)
    rows, length = padding.shape
    module, pair = Layer(is_causal=is_causal), prefix(rows)
    query, key, value = states(rows, length, length)
    visible = torch.tensor([[[True, True, True]], [[False, True, True]]])
    for seen in ({}, {module: visible}):
        found, _ = wrapper({module: pair}, visible=seen, open_slots=torch.zeros(rows, 1, length, dtype=torch.bool))(
            Attention(flash_attention, MaskForm.PADDING), module, query, key, value, None if side == "none" else padding
        )

        def in_text(b: int, t: int, s: int) -> bool:
            return bool(padding[b, s]) and (s <= t or not is_causal)

        expected, _ = attention(query, *joined(pair, key, value), behind(P, in_text, seen.get(module)))
        is_real = padding != 0
        assert_same(found[is_real], expected[is_real], [query, key, value, *pair])


def test_cross_attention_is_told_from_other_attention() -> None:
    """Flash attention would take the padding of prefixes for that of the decoder's texts."""
    module, other = Layer(is_causal=False), Layer()
    pair, visible = prefix(2), torch.tensor([[[True, True, True]], [[False, True, True]]])
    attend = wrapper({module: pair, other: pair}, visible={module: visible, other: visible}, crossing={module})
    flash_of = Attention(flash_attention, MaskForm.PADDING)
    assert attend(flash_of, other, *states(2, 3, 3), None)[0].shape == (2, 3, HEADS, VALUE)
    with pytest.raises(UnsupportedModelError, match="flash attention takes the padding of the encoder's prefixes"):
        attend(flash_of, module, *states(2, 3, 3), None)
    assert attend(flash_of, module, *states(2, 1, 4), None)[0].shape == (2, 1, HEADS, VALUE)
