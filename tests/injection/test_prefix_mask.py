"""Virtual tokens that rows do not see, against the base model with a cache from which their keys are deleted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.families import (
    CAUSAL_LM,
    METHODS,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    P,
    adapted,
    answers,
    base_model,
    batch,
    scramble,
    texts,
)
from tests.injection.samples import prefix
from tests.reference.prefixes import split
from torch import Tensor
from transformers import DynamicCache

from softtune import (
    BitFitConfig,
    CombinedConfig,
    ConfigError,
    DataError,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningV2Config,
    UnsupportedModelError,
    get_peft_model,
)
from softtune.backbone import Backbone
from softtune.compat import enable_checkpointing, renamed
from softtune.injection.prefix_mask import PrefixMask
from softtune.methods.prompt import Prompt

SHOWN = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
"""[B, P] some of a row's virtual tokens, all, one and none."""
LENGTHS = (7, 4, 2, 5)


def prefix_weight(model: PeftModel) -> Tensor:
    weight: Tensor = model.adapter(model.active_adapter).module.embedding.weight
    return weight


def without(model: PeftModel, row: Tensor, shown: Tensor) -> Tensor:
    """Logits [T, V] of the base model alone, whose cache has the keys of the shown virtual tokens and no others; the
    text starts at position P."""
    backbone = model.backbone
    layers = backbone.attention_layers
    pairs = split(prefix_weight(model), [(a.heads, a.key_size, a.value_size) for a in layers])
    kept = shown.nonzero().flatten()
    cache = DynamicCache()
    for number, (key, value) in enumerate(pairs):
        cache.update(key[None, :, kept], value[None, :, kept], number)
    call = {
        "input_ids": row[None],
        "attention_mask": torch.ones(1, len(kept) + len(row), dtype=torch.long),
        "position_ids": torch.arange(P, P + len(row))[None],
        "cache": cache,
    }
    logits: Tensor = backbone.model(**renamed(call, backbone.model.forward)).logits[0]
    return logits


def real(logits: Tensor, rows: Sequence[Tensor], side: str) -> list[Tensor]:
    """Each row's logits, without padding."""
    pairs = zip(logits, rows, strict=True)
    return [x[: len(row)] if side == "right" else x[len(x) - len(row) :] for x, row in pairs]


def weighed(parts: Sequence[Tensor]) -> Tensor:
    """One number that depends on every output in another way."""
    generator = torch.Generator().manual_seed(5)
    return torch.stack([(x * torch.randn(x.shape, generator=generator)).sum() for x in parts]).sum()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("method", ["prefix", "p_tuning_v2"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_hidden_tokens_are_keys_of_no_layer(family: str, method: str, side: str, use_cache: bool) -> None:
    model = adapted(family, CAUSAL_LM, method)
    rows, weight = texts(family, CAUSAL_LM, LENGTHS), prefix_weight(model)
    found = model(**batch(rows, side), prefix_mask=SHOWN, use_cache=use_cache).logits
    own = real(found, rows, side)
    [gradient] = torch.autograd.grad(weighed(own), [weight])
    expected = [without(model, row, shown) for row, shown in zip(rows, SHOWN, strict=True)]
    [wanted] = torch.autograd.grad(weighed(expected), [weight])
    for mine, other in zip(own, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kept", [[0, 2], [4]])
def test_a_row_gives_hidden_tokens_no_gradient(kept: list[int]) -> None:
    model = adapted("llama", CAUSAL_LM, "prefix")
    shown = torch.zeros(1, P).index_fill(1, torch.tensor(kept), 1)
    (row,) = texts("llama", CAUSAL_LM, (6,))
    model(row[None], prefix_mask=shown).logits.sum().backward()
    gradient = prefix_weight(model).grad
    assert gradient is not None
    assert [number for number in range(P) if gradient[number].any()] == kept


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_of_one_text_that_see_other_tokens_share_nothing(side: str) -> None:
    model = adapted("llama", CAUSAL_LM, "prefix")
    (text,) = texts("llama", CAUSAL_LM, (6,))
    rows = [text, text, text[:4], text]
    found = real(model(**batch(rows, side), prefix_mask=SHOWN, use_cache=False).logits, rows, side)
    for mine, row, shown in zip(found, rows, SHOWN, strict=True):
        torch.testing.assert_close(mine, without(model, row, shown), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_mixed_rows_are_those_of_each_adapter_alone(family: str, use_cache: bool) -> None:
    """Shorter prefixes have the last columns; rows without a prefix have none."""
    model = adapted(family, CAUSAL_LM, "prefix")
    for name, tokens, options in (("short", 3, {}), ("infix", 2, {"placement": "infix"}), ("last", 4, {})):
        layers = {"layers": "last:1"} if name == "last" else {}
        config = PrefixTuningConfig(num_virtual_tokens=tokens, task_type=CAUSAL_LM, **options, **layers)
        model.add_adapter(name, config)
    names = ["default", "short", "infix", "last", "__base__", "short"]
    lengths = {"default": P, "short": 3, "infix": 2, "last": 4}
    rows = texts(family, CAUSAL_LM, (7, 4, 2, 5, 3, 6))
    shown = torch.randint(2, (len(rows), P), generator=torch.Generator().manual_seed(0))
    together = model(**batch(rows), adapter_names=names, prefix_mask=shown, use_cache=use_cache).logits
    for name, row, mask, mine in zip(names, rows, shown, real(together, rows, "right"), strict=True):
        own = {"prefix_mask": mask[None, P - lengths[name] :]} if name in lengths else {}
        alone = model(row[None], adapter_names=[name], **own).logits[0]
        torch.testing.assert_close(mine, alone, atol=1e-5, rtol=1e-5)


def test_an_infix_hides_tokens_from_the_rows_that_see_it() -> None:
    """Of a text without labels, the last token alone sees an infix."""
    model = adapted("gpt2", CAUSAL_LM, "infix")
    (row,) = texts("gpt2", CAUSAL_LM, (6,))
    plain, hidden = (model(row[None], prefix_mask=torch.full((1, P), n)).logits[0] for n in (1, 0))
    with model.disable_adapter():
        alone = model(row[None]).logits[0]
    torch.testing.assert_close(hidden, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain[:-1], alone[:-1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain[-1], alone[-1], atol=1e-3)


@pytest.mark.parametrize(
    ("family", "task"), [("bert", SEQ_CLS), ("deberta_v2", SEQ_CLS), ("t5", SEQ_2_SEQ_LM), ("bart", SEQ_2_SEQ_LM)]
)
def test_encoders_and_cross_attention(family: str, task: str) -> None:
    """Hiding the first virtual tokens is a shorter prefix, where it takes no positions."""
    config = PrefixTuningConfig(num_virtual_tokens=P, task_type=task, shift_positions=False)
    model = get_peft_model(base_model(family, task), config).eval()
    model.add_adapter("short", dataclasses.replace(config, num_virtual_tokens=P - 2))
    with torch.no_grad():
        prefix_weight(model).copy_(0.4 * torch.randn_like(prefix_weight(model)))
        model.adapter("short").module.embedding.weight.copy_(prefix_weight(model)[2:])
    for side, rows in (("right", texts(family, task)), ("left", texts(family, task))):
        inputs = {**batch(rows, side), **answers(task, len(rows))}
        shown = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
        found = model(**inputs, adapter_names=["default"] * 3, prefix_mask=shown).logits
        expected = model(**inputs, adapter_names=["short", "default", "short"]).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("family", "task"), [("llama", CAUSAL_LM), ("gemma3", CAUSAL_LM), ("t5", SEQ_2_SEQ_LM)])
def test_generation_hides_the_same_tokens(family: str, task: str, beams: int) -> None:
    model = adapted(family, task, "prefix")
    rows, shown = texts(family, task, (5, 3)), SHOWN[:2]
    options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "eos_token_id": None}
    together = model.generate(**batch(rows, "left"), prefix_mask=shown, **options)
    for row, mask, mine in zip(rows, shown, together, strict=True):
        text = row[None]
        alone = model.generate(text, prefix_mask=mask[None], **options)[0]
        assert torch.equal(mine[-4:], alone[-4:])
        if beams == 1 and task == CAUSAL_LM:
            for _ in range(4):
                step = model(text, prefix_mask=mask[None], use_cache=False).logits[0, -1].argmax()
                text = torch.cat([text, step[None, None]], dim=1)
            assert torch.equal(mine[-4:], text[0, -4:])


def test_generation_sees_the_mask() -> None:
    model = adapted("llama", CAUSAL_LM, "prefix")
    rows = texts("llama", CAUSAL_LM, (5,))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    hidden = model.generate(rows[0][None], prefix_mask=torch.zeros(1, P), **options)
    assert not torch.equal(hidden, model.generate(rows[0][None], **options))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    gradients = []
    for checkpoints in (False, True):
        model = adapted("llama", CAUSAL_LM, "prefix")
        if checkpoints:
            enable_checkpointing(model, use_reentrant=reentrant)
        model.train()
        rows = texts("llama", CAUSAL_LM, LENGTHS)
        output = model(**batch(rows), prefix_mask=SHOWN).logits
        weighed(real(output, rows, "right")).backward()
        gradients.append(prefix_weight(model).grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_the_frozen_layer_cache_changes_nothing() -> None:
    model = adapted("llama", CAUSAL_LM, "prefix_last").train()
    rows = texts("llama", CAUSAL_LM, LENGTHS)
    inputs = {**batch(rows), "prefix_mask": SHOWN, "use_cache": False}
    expected = model(**inputs).logits
    with model.trunk_cache(memory=1) as cache:
        for _ in range(2):
            torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert cache.hits


@pytest.mark.parametrize(
    ("family", "config", "mask", "message"),
    [
        (
            "llama",
            PrefixTuningConfig(num_virtual_tokens=3),
            torch.ones(1, 3),
            r"prefix_mask \[1, 3\] do not fit 2 rows",
        ),
        ("llama", PrefixTuningConfig(num_virtual_tokens=3), torch.ones(2, 4), r"\[2, 4\] does not fit: give 3 numbers"),
        ("llama", PrefixTuningConfig(num_virtual_tokens=3), torch.ones(2, 3, 1), r"\[2, 3, 1\] does not fit"),
        ("llama", PromptTuningConfig(num_virtual_tokens=3), torch.ones(2, 3), "hides keys and values of prefixes"),
        ("llama", BitFitConfig(add_missing=True), torch.ones(2, 3), "hides keys and values of prefixes"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_what_does_not_fit_is_refused(family: str, config: Any, mask: Tensor, message: str, call: str) -> None:
    model = get_peft_model(base_model(family, CAUSAL_LM), config)
    with pytest.raises(DataError, match=message):
        getattr(model, call)(input_ids=torch.full((2, 4), 7), prefix_mask=mask)


def test_a_prefix_in_a_cache_is_seen_by_every_row() -> None:
    config = PrefixTuningConfig(num_virtual_tokens=3, token_dropout=0.5)
    model = get_peft_model(base_model("bloom", CAUSAL_LM), config).eval()
    with pytest.raises(UnsupportedModelError, match="as a cache, of which every row sees all: leave out prefix_mask"):
        model(input_ids=torch.full((2, 4), 7), prefix_mask=torch.ones(2, 3))
    model(input_ids=torch.full((2, 4), 7))
    with pytest.raises(UnsupportedModelError, match="as a cache"):
        model.train()(input_ids=torch.full((2, 4), 7))


def drawn(prompts: list[Prompt], rows: Tensor | None, given: Tensor | None, count: int) -> Tensor | None:
    backbone = Backbone.shared(base_model("llama", CAUSAL_LM))
    return PrefixMask(backbone, prompts, rows, given).for_rows(count, torch.device("cpu"))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(any),
    st.floats(0, 0.99),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_dropout_leaves_every_row_a_token(lengths: list[int], dropout: float, is_given: bool, random: Any) -> None:
    layers = Backbone.shared(base_model("llama", CAUSAL_LM)).attention_layers
    prompts = [prefix(layers, n, token_dropout=dropout) if n else Prompt() for n in lengths]
    rows = [random.randrange(len(lengths)) for _ in range(5)]
    given_mask = torch.tensor([[random.randrange(2) for _ in range(max(lengths))] for _ in rows]) if is_given else None
    found = drawn(prompts, torch.tensor(rows), given_mask, len(rows))
    if found is None:
        assert not is_given
        assert not dropout
        return
    for number, row in enumerate(rows):
        allowed = [
            column >= max(lengths) - lengths[row] and (given_mask is None or bool(given_mask[number, column]))
            for column in range(max(lengths))
        ]
        shown = found[number].tolist()
        assert not any(is_shown and not may for is_shown, may in zip(shown, allowed, strict=True))
        assert any(shown) is any(allowed)
        assert dropout or shown == allowed


def test_dropout_hides_the_prefix_of_an_adapter_that_has_vectors_too() -> None:
    """Its virtual tokens at the input stay; they stand behind the places of the whole prefix."""
    parts = [PrefixTuningConfig(num_virtual_tokens=3, token_dropout=0.6), PromptTuningConfig(num_virtual_tokens=2)]
    config = CombinedConfig(parts=parts, task_type=CAUSAL_LM)
    model = scramble(get_peft_model(base_model("llama", CAUSAL_LM), config)).train()
    prompt, backbone = model.adapter("default").prompt(), model.backbone
    assert prompt.vectors is not None
    rows = texts("llama", CAUSAL_LM, LENGTHS)
    torch.manual_seed(3)
    shown = drawn([prompt], None, None, len(rows))
    assert shown is not None
    assert shown.shape == (len(rows), 3)
    assert not shown.all()
    torch.manual_seed(3)
    found = real(model(**batch(rows), use_cache=False).logits, rows, "right")
    for mine, row, mask in zip(found, rows, shown, strict=True):
        kept, cache = mask.nonzero().flatten(), DynamicCache()
        for layer in backbone.attention_layers:
            key, value = prompt.prefixes[layer.place]
            cache.update(key[None, :, kept], value[None, :, kept], layer.index)
        call = {
            "inputs_embeds": torch.cat([prompt.vectors, backbone.embedding(row)])[None],
            "attention_mask": torch.ones(1, len(kept) + 2 + len(row), dtype=torch.long),
            "position_ids": torch.arange(3, 5 + len(row))[None],
            "cache": cache,
        }
        logits = backbone.model(**renamed(call, backbone.model.forward)).logits[0, 2:]
        torch.testing.assert_close(mine, logits, atol=1e-5, rtol=1e-5)


def test_dropout_hides_each_rows_tokens_independently() -> None:
    layers = Backbone.shared(base_model("llama", CAUSAL_LM)).attention_layers
    torch.manual_seed(0)
    found = drawn([prefix(layers, 40, token_dropout=0.25)], None, None, 500)
    assert found is not None
    assert abs(float((~found).float().mean()) - 0.25) < 0.01
    assert len(found.unique(dim=0)) == 500
    assert float((~found).float().mean(dim=0).std()) < 0.03


@pytest.mark.parametrize("config", [PrefixTuningConfig, PTuningV2Config])
def test_dropout_is_a_mask_that_is_drawn_in_training(config: Any) -> None:
    """One for all layers; the same seed draws the same."""
    model = get_peft_model(base_model("llama", CAUSAL_LM), config(num_virtual_tokens=P, token_dropout=0.4))
    rows = texts("llama", CAUSAL_LM, LENGTHS)
    torch.manual_seed(3)
    kept = torch.rand(len(rows), P) >= 0.4
    assert kept.any(dim=1).all()
    expected = torch.cat(real(model.eval()(**batch(rows), prefix_mask=kept).logits, rows, "right"))
    model.train()
    for _ in range(2):
        torch.manual_seed(3)
        found = torch.cat(real(model(**batch(rows)).logits, rows, "right"))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    other = torch.cat(real(model(**batch(rows)).logits, rows, "right"))
    assert not torch.allclose(other, expected, atol=1e-3)
    plain = model.eval()(**batch(rows)).logits
    torch.testing.assert_close(plain, model(**batch(rows), prefix_mask=torch.ones(len(rows), P)).logits)


def test_dropout_is_for_prefixes() -> None:
    with pytest.raises(ConfigError, match="drop token_dropout"):
        PrefixTuningConfig(embedding_only=True, token_dropout=0.1)
    with pytest.raises(ConfigError, match="token_dropout"):
        PrefixTuningConfig(token_dropout=1.0)
    assert METHODS["prefix"]().token_dropout == 0
