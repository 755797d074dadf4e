"""Caches that contain a prefix, against keys and values that are put together token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.families import CAUSAL_LM, base_model, family_config
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from softtune import AdapterError, UnsupportedModelError
from softtune.compat import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
    enable_checkpointing,
)
from softtune.injection.cache import (
    PrefixCache,
    PrefixLayer,
    as_long_as,
    begin_with,
    make_room,
    own_cache,
    prepend,
    virtual_slots,
)
from softtune.injection.layout import Layout
from softtune.injection.step import Step
from softtune.methods.prompt import KeyValue

ROWS, HEADS, KEY, VALUE, P = 2, 3, 4, 5, 3


def pair(length: int, rows: int = ROWS, **options: Any) -> KeyValue:
    """Keys [B, H, n, K] and values [B, H, n, V]."""
    return KeyValue(*(torch.randn(rows, HEADS, length, size, **options) for size in (KEY, VALUE)))


def joined(*parts: KeyValue) -> KeyValue:
    """The tokens of all parts, one behind the other."""
    tokens = ([part[which][:, :, n] for part in parts for n in range(part.key.shape[2])] for which in (0, 1))
    return KeyValue(*(torch.stack(states, dim=2) for states in tokens))


def assert_equal(found: tuple[Tensor, Tensor], expected: KeyValue) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def step(length: int, cache: Any = None, rows: int = ROWS) -> Step:
    return Step({"input_ids": torch.zeros(rows, length, dtype=torch.long), "cache": cache})


def test_prepend_takes_the_type_of_the_states() -> None:
    prefix, states = pair(2).key, pair(3).key.bfloat16()
    found = prepend(prefix, states)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.cat([prefix.bfloat16(), states], dim=2))


# PrefixCache


def test_a_prefix_stands_before_the_texts_cache() -> None:
    """Two layers, and three steps of different lengths."""
    prefixes = [pair(P), pair(P)]
    cache = PrefixCache(prefixes, DynamicCache())
    texts: list[list[KeyValue]] = [[], []]
    done = 0
    for length in (2, 1, 3):
        assert cache.get_seq_length() == cache.get_query_offset() == P + done
        assert cache.get_mask_sizes(length, 0) == (P + done + length, 0)
        for number, prefix in enumerate(prefixes):
            texts[number].append(pair(length))
            assert_equal(cache.update(*texts[number][-1], number), joined(prefix, *texts[number]))
        done += length
        assert cache.get_seq_length(1) == P + done
    assert cache.inner is not None
    assert cache.inner.get_seq_length() == done


def test_without_the_texts_cache_nothing_is_kept() -> None:
    """So that a layer may run again when its gradient is computed."""
    prefix = pair(P)
    cache = PrefixCache([prefix], None)
    for text in (pair(2), pair(4)):
        for _ in range(2):
            assert_equal(cache.update(*text, 0), joined(prefix, text))
        assert cache.get_seq_length() == cache.get_query_offset() == P
        assert cache.get_mask_sizes(4, 0) == (P + 4, 0)


def test_a_static_cache_has_its_whole_length_behind_the_prefix() -> None:
    prefix, text = pair(P), pair(2)
    cache = PrefixCache([prefix], StaticCache(config=family_config("llama"), max_cache_len=6))
    assert cache.get_mask_sizes(2, 0) == (P + 6, 0)
    zeros = KeyValue(*(torch.zeros_like(part) for part in pair(4)))
    assert_equal(cache.update(*text, 0), joined(prefix, text, zeros))
    assert int(cache.get_seq_length()) == P + 2


def before(row: int, start: int, prefix: KeyValue, text: KeyValue) -> list[list[Tensor]]:
    """Keys and values of a row, token by token, with a prefix right before the column where its text starts."""
    found = []
    for own, words in zip(prefix, text, strict=True):
        tokens = [words[row, :, t] for t in range(words.shape[2])]
        found.append([*tokens[:start], *(own[row, :, p] for p in range(P)), *tokens[start:]])
    return found


STARTS = [0, 2]


def padded_layout(width: int) -> Layout:
    """The prefix before the texts of rows that start at these columns."""
    columns = torch.tensor(STARTS)[:, None].expand(-1, P)
    return Layout.from_columns(torch.tensor(STARTS), width, columns, columns >= 0, causal=True)


@pytest.mark.parametrize("has_inner", [True, False])
def test_a_prefix_stands_right_before_each_rows_text(has_inner: bool) -> None:
    prefix, text = pair(P), pair(4)
    cache = PrefixCache([prefix], DynamicCache() if has_inner else None, padded_layout(4))
    found = cache.update(*text, 0)
    for row, start in enumerate(STARTS):
        expected = before(row, start, prefix, text)
        for states, tokens in zip(found, expected, strict=True):
            assert torch.equal(states[row], torch.stack(tokens, dim=1))


def test_weights_are_those_of_the_text() -> None:
    weights = torch.randn(ROWS, HEADS, 2, P + 4)
    assert torch.equal(PrefixCache([pair(P)], None).align_keys(weights), weights[..., P:])
    found = PrefixCache([pair(P)], None, padded_layout(4)).align_keys(weights)
    for row, start in enumerate(STARTS):
        kept = [*range(start), *range(start + P, P + 4)]
        assert torch.equal(found[row], weights[row][..., kept])


def test_a_prefix_of_all_rows_gets_the_gradients_of_each() -> None:
    prefix = KeyValue(*(torch.randn(1, HEADS, P, size, requires_grad=True) for size in (KEY, VALUE)))
    cache = PrefixCache([KeyValue(*(part.expand(ROWS, -1, -1, -1) for part in prefix))], None)
    states, weights = cache.update(*pair(2), 0), pair(P + 2)
    sum((x * w).sum() for x, w in zip(states, weights, strict=True)).backward()  # type: ignore[union-attr]
    for part, weight in zip(prefix, weights, strict=True):
        torch.testing.assert_close(part.grad, weight[:, :, :P].sum(dim=0, keepdim=True))


def test_a_cache_with_a_prefix_has_no_window_and_is_not_compiled() -> None:
    cache = PrefixCache([pair(P)] * 2, DynamicCache())
    assert cache.is_sliding == [False, False]
    assert cache.is_compileable is False


# PrefixLayer


def test_a_layer_holds_the_prefix_and_counts_the_text() -> None:
    prefix = pair(P)
    layer, texts = PrefixLayer(prefix, torch.float32), []
    for length in (2, 1):
        assert layer.get_seq_length() == sum(text.key.shape[2] for text in texts)
        assert layer.get_mask_sizes(length) == (layer.get_seq_length() + length, 0)
        texts.append(pair(length))
        assert_equal(layer.update(*texts[-1]), joined(prefix, *texts))
    assert layer.get_seq_length() == 3
    layer.crop(-2)
    assert layer.get_seq_length() == 1
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.holds(prefix)
    layer.reset()
    text = pair(4)
    assert_equal(layer.update(*text), joined(prefix, text))


def test_beams_take_the_prefix_of_their_row_along() -> None:
    prefix, text = pair(P), pair(2)
    layer = PrefixLayer(prefix, torch.float32)
    layer.update(*text)
    rows = torch.tensor([1, 1])
    layer.reorder_cache(rows)
    assert layer.keys is not None
    assert layer.values is not None
    assert_equal((layer.keys, layer.values), KeyValue(*(part[rows] for part in joined(prefix, text))))


def test_a_layer_has_the_type_of_the_base_model() -> None:
    prefix = pair(P)
    layer = PrefixLayer(prefix, torch.bfloat16)
    text = KeyValue(*(part.bfloat16() for part in pair(1)))
    keys, values = layer.update(*text)
    assert keys.dtype == values.dtype == torch.bfloat16
    assert layer.holds(prefix)
    assert layer.holds(KeyValue(*(part.bfloat16() for part in prefix)))


def test_another_prefix_is_told_from_the_layers_own() -> None:
    prefix = pair(P)
    prefix.key[0, 0, 1, 0] = torch.nan  # from a training that diverged
    layer = PrefixLayer(KeyValue(*(part.clone() for part in prefix)), torch.float32)
    layer.update(*pair(2))
    assert layer.holds(prefix)
    for index, value in (((0, 2, 2, 3), 7.0), ((0, 2, 2, 3), -7.0), ((0, 0, 0, 0), torch.nan), ((0, 0, 1, 0), 1.0)):
        other = KeyValue(prefix.key.clone(), prefix.value)
        other.key[index] = value
        assert not layer.holds(other)


# Prefixes in a call's cache


class Module(nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx


def modules() -> dict[nn.Module, KeyValue]:
    """The prefixes of Gemma 3's three attention layers, the second of which has no sliding window."""
    return {Module(number): pair(P) for number in range(3)}


def empty_cache() -> DynamicCache:
    return DynamicCache(config=family_config("gemma3"))


@torch.no_grad()
def test_layers_without_a_window_begin_with_their_prefix() -> None:
    prefixes, cache = modules(), empty_cache()
    found = begin_with(prefixes, cache, step(2, cache), torch.bfloat16)
    assert found == {[*prefixes][1]}
    assert [type(layer) for layer in cache.layers] == [
        DynamicSlidingWindowLayer,
        PrefixLayer,
        DynamicSlidingWindowLayer,
    ]
    layer = cache.layers[1]
    assert layer.keys.dtype == torch.bfloat16
    assert layer.holds([*prefixes.values()][1])
    assert cache.get_seq_length(1) == 0


@torch.no_grad()
def test_only_layers_that_have_a_prefix_begin_with_one() -> None:
    cache = DynamicCache(config=family_config("llama"))
    second = Module(1)
    assert begin_with({second: pair(P)}, cache, step(2, cache), torch.float32) == {second}
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, PrefixLayer]
    assert begin_with({}, cache, step(2, cache), torch.float32) == set()


@torch.no_grad()
def test_later_steps_find_the_prefix_in_the_cache() -> None:
    prefixes, cache = modules(), empty_cache()
    found = begin_with(prefixes, cache, step(2, cache), torch.float32)
    for _ in range(2):
        for number in range(3):
            cache.update(*pair(1), number)
        layers = [*cache.layers]
        assert begin_with(prefixes, cache, step(1, cache), torch.float32) == found
        assert [*cache.layers] == layers
    with torch.enable_grad():
        assert begin_with(prefixes, cache, step(1, cache), torch.float32) == found


@torch.no_grad()
@pytest.mark.parametrize("is_continued", [True, False])
def test_a_cache_with_another_prefix_is_refused(is_continued: bool) -> None:
    prefixes, cache = modules(), empty_cache()
    begin_with(prefixes, cache, step(2, cache), torch.float32)
    if is_continued:
        for number in range(3):
            cache.update(*pair(2), number)
    others = {module: pair(P) for module in prefixes}
    with pytest.raises(AdapterError, match="computed with another adapter: leave it out"):
        begin_with(others, cache, step(1, cache), torch.float32)


@pytest.mark.parametrize("reason", ["gradients", "text", "static", "no layers", "no cache"])
def test_caches_that_are_left_alone(reason: str) -> None:
    config = family_config("llama")
    cache = {
        "static": lambda: StaticCache(config=config, max_cache_len=6),
        "no layers": DynamicCache,
        "no cache": lambda: None,
    }.get(reason, lambda: DynamicCache(config=config))()
    if reason == "text":
        cache.update(*pair(2), 0)
    layers = [*getattr(cache, "layers", [])]
    with torch.set_grad_enabled(reason == "gradients"):
        assert begin_with(modules(), cache, step(2, cache), torch.float32) == set()
    assert [*getattr(cache, "layers", [])] == layers


# Room for virtual tokens at the input

IS_VIRTUAL = torch.tensor([[False, True, True, True, False], [True, True, False, False, False]])
"""[B, S] of rows with three virtual tokens and two."""


def test_layers_with_a_window_keep_virtual_tokens() -> None:
    cache = empty_cache()
    full = cache.layers[1]
    make_room(cache, IS_VIRTUAL)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 3
    assert cache.layers[1] is full
    assert cache.softtune_virtual is IS_VIRTUAL


def test_static_layers_have_room_for_the_virtual_tokens_of_the_longest_row() -> None:
    cache = StaticCache(config=family_config("gemma3"), max_cache_len=20)
    assert [layer.max_cache_len for layer in cache.layers] == [8, 20, 8]
    make_room(cache, IS_VIRTUAL)
    assert [type(layer) for layer in cache.layers] == [StaticLayer] * 3
    assert [layer.max_cache_len for layer in cache.layers] == [23] * 3


def test_static_layers_that_all_have_windows_are_refused() -> None:
    cache = StaticCache(config=family_config("mistral"), max_cache_len=20)
    assert {type(layer) for layer in cache.layers} == {StaticSlidingWindowLayer}
    with pytest.raises(UnsupportedModelError, match=r"no place: leave out cache_implementation"):
        make_room(cache, IS_VIRTUAL)


@pytest.mark.parametrize("beams", [1, 2])
def test_slots_of_virtual_tokens_in_later_steps(beams: int) -> None:
    cache = empty_cache()
    make_room(cache, IS_VIRTUAL)
    expected = [[*row, False, False] for row in IS_VIRTUAL.tolist() for _ in range(beams)]
    assert virtual_slots(cache, 7, 2 * beams).tolist() == expected


def test_a_mask_is_as_long_as_a_static_cache() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    cache = StaticCache(config=family_config("llama"), max_cache_len=5)
    assert as_long_as(cache, mask).tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    for other in (None, DynamicCache(), DynamicCache(config=family_config("llama"))):
        assert as_long_as(other, mask) is mask


# A cache of one's own


@pytest.mark.parametrize(
    ("use_cache", "by_config", "expected"),
    [(True, False, True), (False, True, False), (None, True, True), (None, False, False)],
)
def test_a_call_gets_a_cache_where_it_uses_one(use_cache: bool | None, by_config: bool, expected: bool) -> None:
    stack = base_model("gemma3", CAUSAL_LM).model
    stack.config.use_cache = by_config
    calls: list[dict[str, Any]] = [{"use_cache": use_cache}, {"use_cache": use_cache, "cache": None}]
    if use_cache is None:
        calls.append({})
    for call in calls:
        cache = own_cache(stack, call)
        assert (cache is not None) is expected
        if cache is not None:
            windowed = [type(layer) is DynamicSlidingWindowLayer for layer in cache.layers]
            assert windowed == [True, False, True]


def test_a_call_keeps_the_cache_that_it_has() -> None:
    stack, cache = base_model("llama", CAUSAL_LM).model, DynamicCache()
    for use_cache in (True, False, None):
        assert own_cache(stack, {"use_cache": use_cache, "cache": cache}) is cache


def test_layers_that_run_again_get_no_cache() -> None:
    model = base_model("llama", CAUSAL_LM)
    enable_checkpointing(model, use_reentrant=False)
    assert own_cache(model.model, {"use_cache": True}) is not None
    model.train()
    assert own_cache(model.model, {"use_cache": True}) is None
