"""A pool of keys and values, and attention that continues its sequences, against attention in loops."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.families import CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, base_model
from tests.injection.by_hand import attention, causal, dense_mask
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from softtune import UnsupportedModelError
from softtune.backbone import Backbone, Place, Site, model_session
from softtune.backbone.interface import WRAPPER, Attention, MaskForm
from softtune.compat import set_attention_name
from softtune.injection.kv_pool import SHORTEST_MASK, KVPool, PooledAttention, PooledSequence
from softtune.methods.prompt import KeyValue

SLOTS = 200
HEADS, KEY_HEADS, SIZE = 6, 2, 8
"""Those of the attention of the families' Llama."""
LAYERS: list[Place] = [(Site.DECODER, 0), (Site.DECODER, 1)]


def new_pool(name: str = "llama", slots: int = SLOTS) -> KVPool:
    """A pool whose memory holds what must not be read: its slots are NaN."""
    pool = KVPool(Backbone(base_model(name, CAUSAL_LM)), slots)
    for states in (*pool.keys.values(), *pool.values.values()):
        states.fill_(torch.nan)
    return pool


def by_mask(*args: Any, is_causal: bool, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Attention that leaves what is causal to the mask."""
    assert is_causal is False
    return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, is_causal=False, **kwargs)


# Slots


@pytest.fixture(scope="module")
def llama() -> Backbone:
    return Backbone(base_model("llama", CAUSAL_LM))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=20), st.data())
def test_a_slot_belongs_to_one_owner_at_a_time(
    llama: Backbone, steps: list[tuple[bool, int]], data: st.DataObject
) -> None:
    size = 12
    pool = KVPool(llama, size)
    owned: list[list[int]] = []
    for takes, count in steps:
        free = size - sum(map(len, owned))
        assert pool.num_free == free
        if takes and count <= free:
            slots = pool.allocate(count)
            assert (slots.dtype, slots.shape) == (torch.long, (count,))
            owned.append(slots.tolist())
        elif owned:
            pool.free(torch.tensor(owned.pop(data.draw(st.integers(0, len(owned) - 1))), dtype=torch.long))
        together = [slot for slots in owned for slot in slots]
        assert len({*together}) == len(together)
        assert {*together} <= {*range(size)}
    for slots in owned:
        pool.free(torch.tensor(slots, dtype=torch.long))
    assert pool.num_free == size


def test_all_slots_can_be_allocated_and_no_more() -> None:
    pool = new_pool(slots=5)
    assert sorted(pool.allocate(5).tolist()) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    with pytest.raises(AssertionError):
        pool.allocate(1)
    assert pool.allocate(0).tolist() == []


def test_the_size_of_a_slot() -> None:
    model = base_model("deepseek_v3", CAUSAL_LM).bfloat16()  # keys and values of different sizes
    pool = KVPool(Backbone(model), 3)
    assert pool.token_bytes == 2 * 2 * 4 * (12 + 6)  # bytes, layers, heads, of a key and a value
    assert {states.dtype for states in (*pool.keys.values(), *pool.values.values())} == {torch.bfloat16}
    assert {tuple(states.shape) for states in pool.keys.values()} == {(3, 4, 12)}
    assert {tuple(states.shape) for states in pool.values.values()} == {(3, 4, 6)}


@pytest.mark.parametrize(
    ("name", "task"), [("bert", SEQ_CLS), ("t5", SEQ_2_SEQ_LM), ("bloom", CAUSAL_LM), ("lfm2", CAUSAL_LM)]
)
def test_models_that_need_padding_are_refused(name: str, task: str) -> None:
    model = base_model(name, task)
    message = rf"{type(model).__name__} cannot read several texts without padding: use a decoder .*'sdpa' or 'eager'"
    with pytest.raises(UnsupportedModelError, match=message):
        KVPool(Backbone(model), 3)


def test_attention_that_takes_no_dense_mask_is_refused() -> None:
    backbone = Backbone(base_model("llama", CAUSAL_LM))
    assert backbone.packs
    set_attention_name(backbone.model.config, "softtune_flex_attention")
    with pytest.raises(UnsupportedModelError, match="loaded with attn_implementation='sdpa' or 'eager'"):
        KVPool(backbone, 3)


# Prefixes


def pair(length: int, *, dtype: torch.dtype = torch.float32) -> KeyValue:
    """A prefix [H, P, K]."""
    return KeyValue(*(torch.randn(KEY_HEADS, length, SIZE, dtype=dtype) for _ in range(2)))


def test_a_prefix_is_written_into_its_slots() -> None:
    pool, prefix = new_pool(), pair(3, dtype=torch.double)
    slots = torch.tensor([7, 2, 5])
    pool.write_prefix({LAYERS[1]: prefix}, slots)
    for module, layer in pool.layers.items():
        for states, part in zip((pool.keys, pool.values), prefix, strict=True):
            for number, slot in enumerate(slots.tolist()):
                expected = part[:, number].float() if layer.place == LAYERS[1] else torch.zeros(KEY_HEADS, SIZE)
                assert torch.equal(states[module][slot], expected)
            others = [slot for slot in range(SLOTS) if slot not in slots]
            assert states[module][others].isnan().all()


# Masks


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_masks_grow_with_the_longest_sequence(name: str) -> None:
    pool = new_pool(name)
    first = pool.masks(3)
    assert pool.masks(SHORTEST_MASK) is first
    longer = pool.masks(SHORTEST_MASK + 1)
    assert longer is not first
    assert pool.masks(2) is pool.masks(2 * SHORTEST_MASK) is longer
    for masks, length in ((first, SHORTEST_MASK), (longer, 2 * SHORTEST_MASK)):
        windows = {"full_attention": None, "sliding_attention": 8}
        by_kind = masks if isinstance(masks, dict) else {"full_attention": masks}
        assert {*by_kind} == ({*windows} if name == "gemma3" else {"full_attention"})
        for kind, mask in by_kind.items():
            sees = causal(torch.ones(1, length), windows[kind])
            assert torch.equal(mask, dense_mask(sees, 1, length, length, torch.bool))


# Attention


@dataclass
class Text:
    """A sequence with the queries, keys and values that each layer has had for it so far."""

    prefix: Tensor
    pairs: dict[Place, KeyValue]
    seen_from: int = 0
    slots: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    keys: dict[Place, list[Tensor]] = field(default_factory=lambda: {place: [] for place in LAYERS})
    values: dict[Place, list[Tensor]] = field(default_factory=lambda: {place: [] for place in LAYERS})

    def piece(self, count: int) -> PooledSequence:
        return PooledSequence(
            slots=self.slots, count=count, prefix=self.prefix, places=frozenset(self.pairs), seen_from=self.seen_from
        )

    def expected(self, place: Place, query: Tensor, window: int | None) -> Tensor:
        """[Q, heads, K] attention outputs of the last queries [heads, Q, K], which see a prefix beyond a window too."""
        own = [torch.stack(states[place], dim=1) for states in (self.keys, self.values)]
        prefix = self.pairs.get(place, KeyValue(*(part[:, :0] for part in own)))
        length, count = prefix.key.shape[1], len(self.keys[place])
        key, value = (torch.cat(parts, dim=1)[None] for parts in zip(prefix, own, strict=True))
        in_text = causal(torch.ones(1, count), window)
        first = count - query.shape[1]

        def sees(b: int, t: int, s: int) -> bool:
            number = first + t
            return number >= self.seen_from if s < length else in_text(b, number, s - length)

        return attention(query[None], key, value, sees)[0][0]


def new_text(pool: KVPool, length: int, *places: Place, seen_from: int = 0) -> Text:
    """A sequence with a prefix in layers of these places, which lies in the pool."""
    pairs, slots = {place: pair(length) for place in places}, pool.allocate(length)
    pool.write_prefix(pairs, slots)
    return Text(slots, pairs, seen_from)


def step(pool: KVPool, texts: list[Text], counts: list[int], windows: dict[Place, int | None]) -> None:
    """Continue texts by so many tokens, in all layers, and compare every output."""
    draw = random.Random(sum(counts))
    for text, count in zip(texts, counts, strict=True):
        free = pool.allocate(min(3 * count, pool.num_free)).tolist()
        chosen = draw.sample(free, count)  # in any order, and apart
        text.slots = torch.cat([text.slots, torch.tensor(chosen)])
        pool.free(torch.tensor([slot for slot in free if slot not in chosen], dtype=torch.long))
    attend = PooledAttention(pool, [text.piece(count) for text, count in zip(texts, counts, strict=True)])
    longest = 2 + max(len(text.slots) for text in texts)
    for module, layer in pool.layers.items():
        query = torch.randn(1, HEADS, sum(counts), SIZE)
        key, value = (torch.randn(1, KEY_HEADS, sum(counts), SIZE) for _ in range(2))
        for text, *own in zip(texts, *(part[0].split(counts, dim=1) for part in (key, value)), strict=True):
            for states, part in zip((text.keys, text.values), own, strict=True):
                states[layer.place] += part.unbind(dim=1)
        sees = causal(torch.ones(1, longest), windows[layer.place])
        mask = dense_mask(sees, 1, longest, longest, torch.bool)
        output, weights = attend(
            Attention(by_mask, MaskForm.DENSE), module, query, key, value, mask, scaling=SIZE**-0.5
        )
        assert weights is None
        assert output.shape == (1, sum(counts), HEADS, SIZE)
        queries, outputs = query[0].split(counts, dim=1), output[0].split(counts)
        for text, own_query, found in zip(texts, queries, outputs, strict=True):
            expected = text.expected(layer.place, own_query, windows[layer.place])
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


NO_WINDOWS: dict[Place, int | None] = dict.fromkeys(LAYERS)
WINDOWS: dict[Place, int | None] = {LAYERS[0]: 2, LAYERS[1]: None}


@pytest.mark.parametrize("windows", [NO_WINDOWS, WINDOWS])
@pytest.mark.parametrize("seed", range(3))
def test_every_sequence_sees_its_own_keys_and_prefix(seed: int, windows: dict[Place, int | None]) -> None:
    """Sequences of any length that start and go on at any time, with prefixes of their own in some layers."""
    pool, draw = new_pool(), random.Random(seed)
    texts = [
        new_text(pool, 3, *LAYERS),
        new_text(pool, 5, LAYERS[1]),
        new_text(pool, 2, LAYERS[0]),
        new_text(pool, 0),
        new_text(pool, 4, *LAYERS, seen_from=3),
    ]
    for _ in range(4):
        chosen = draw.sample(texts, draw.randint(1, len(texts)))
        step(pool, chosen, [draw.choice([1, 1, 2, 3, 7]) for _ in chosen], windows)


@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("count", [1, 4])
def test_one_sequence_alone(count: int, length: int) -> None:
    pool = new_pool()
    text = new_text(pool, length, *(LAYERS if length else []))
    for _ in range(2):
        step(pool, [text], [count], NO_WINDOWS)


def test_sequences_share_the_prefix_of_their_adapter() -> None:
    pool = new_pool()
    first = new_text(pool, 3, *LAYERS)
    texts = [first, Text(first.prefix, first.pairs), Text(first.prefix, first.pairs, seen_from=2)]
    step(pool, texts, [3, 1, 4], NO_WINDOWS)
    step(pool, texts[::-1], [1, 2, 1], NO_WINDOWS)


def test_a_sequence_takes_the_slots_of_one_that_is_gone() -> None:
    pool = new_pool()
    text, other = new_text(pool, 2, *LAYERS), new_text(pool, 2, *LAYERS)
    step(pool, [text, other], [4, 3], NO_WINDOWS)
    pool.free(text.slots)
    free = pool.num_free
    step(pool, [other, new_text(pool, 0)], [1, 4], NO_WINDOWS)
    assert pool.num_free == free - 5


def test_only_the_next_tokens_are_written() -> None:
    pool = new_pool()
    text = new_text(pool, 2, *LAYERS)
    step(pool, [text], [3], NO_WINDOWS)
    before = {module: states.clone() for module, states in pool.keys.items()}
    step(pool, [text], [2], NO_WINDOWS)
    for module, layer in pool.layers.items():
        for slot in range(SLOTS):
            if slot in text.slots[-2:]:
                number = text.slots.tolist().index(slot)
                assert torch.equal(pool.keys[module][slot], text.keys[layer.place][number])
            else:
                torch.testing.assert_close(
                    pool.keys[module][slot], before[module][slot], equal_nan=True, atol=0, rtol=0
                )


# Reading


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_forward_continues_the_sequences_of_the_pool(name: str) -> None:
    pool = new_pool(name)
    model = pool.stack.module
    words = [torch.arange(3, 13), torch.arange(20, 24)]
    expected = [model(input_ids=ids[None]).last_hidden_state[0] for ids in words]
    slots = [pool.allocate(len(ids)) for ids in words]
    nothing = torch.zeros(0, dtype=torch.long)
    done = [0, 0]
    for counts in ([9, 1], [1, 3]):
        ends = [n + count for n, count in zip(done, counts, strict=True)]
        pieces = [
            PooledSequence(slots=own[:end], count=count, prefix=nothing)
            for own, end, count in zip(slots, ends, counts, strict=True)
        ]
        tokens = torch.cat([ids[n:end] for ids, n, end in zip(words, done, ends, strict=True)])
        positions = torch.cat([torch.arange(n, end) for n, end in zip(done, ends, strict=True)])
        with model_session(model), pool.reading(pieces):
            states = model(input_ids=tokens[None], position_ids=positions[None]).last_hidden_state[0]
        parts = zip(states.split(counts), expected, done, ends, strict=True)
        for found, own, n, end in parts:
            torch.testing.assert_close(found, own[n:end], atol=1e-5, rtol=1e-5)
        done = ends


@torch.no_grad()
def test_reading_ends_with_its_block() -> None:
    pool = new_pool()
    model, ids = pool.stack.module, torch.tensor([[5, 6]])
    calls: list[dict[str, Any]] = []

    def stop(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        calls.append(kwargs)
        raise KeyError

    handle = model.register_forward_hook(stop, with_kwargs=True)
    piece = PooledSequence(slots=pool.allocate(2), count=2, prefix=torch.zeros(0, dtype=torch.long))
    with pytest.raises(KeyError), model_session(model), pool.reading([piece]):
        model(input_ids=ids, use_cache=True)
    with pytest.raises(KeyError):
        model(input_ids=ids)
    handle.remove()
    within, after = calls
    assert within["use_cache"] is False
    assert within["attention_mask"] is pool.masks(2)
    assert isinstance(within[WRAPPER], PooledAttention)
    assert after.keys() == {"input_ids"}
