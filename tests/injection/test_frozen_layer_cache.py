"""Layers below every prefix run once for each text, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from tests.families import (
    CAUSAL_LM,
    FAMILIES,
    SEQ_CLS,
    P,
    adapted,
    base_model,
    batch,
    labels_for,
    scramble,
    takes,
    texts,
    trained,
)
from torch import Tensor, nn

from softtune import (
    BitFitConfig,
    ConfigError,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningV2Config,
    UnsupportedModelError,
    get_peft_model,
)
from softtune.compat import enable_checkpointing
from softtune.injection.frozen_layer_cache import FrozenLayerCache

EPOCHS = [[(0, 1, 2), (3, 4)], [(4, 0), (2, 3, 1)], [(1,), (3, 2, 4, 0)]]
"""Numbers of the rows in each batch: every epoch has them in another order and company."""
KB = 1e-3
"""Megabytes."""


def rows_of(family: str) -> list[Tensor]:
    """Five texts, three of which begin alike, and some longer than a window."""
    rows = texts(family, CAUSAL_LM, (11, 7, 4, 2, 12))
    rows[1][:5] = rows[0][:5]
    rows[4][:3] = rows[0][:3]
    return rows


def step(model: PeftModel, rows: Sequence[Tensor], side: str = "left", **options: Any) -> list[Tensor]:
    """The loss of a batch, and the gradients."""
    inputs = batch(list(rows), side)
    task = SEQ_CLS if model.backbone.labels_whole_texts else CAUSAL_LM
    labels = labels_for(task, inputs)
    loss = model(**inputs, labels=labels, **options).loss
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in trained(model).values() if p.grad is not None)]


def train(model: PeftModel, rows: list[Tensor], side: str = "left") -> list[Tensor]:
    """All losses and gradients of three epochs, between which the adapter moves."""
    found = []
    for epoch in EPOCHS:
        for numbers in epoch:
            found += step(model, [rows[i] for i in numbers], side)
        with torch.no_grad():
            for parameter in trained(model).values():
                parameter.mul_(0.9)
    return found


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def assert_exact(family: str, side: str = "left", method: str = "prefix_last", **sizes: float) -> FrozenLayerCache:
    """Training with the cache is training without."""
    rows, task = rows_of(family), CAUSAL_LM
    expected = train(adapted(family, task, method).train(), rows, side)
    model = adapted(family, task, method).train()
    with model.trunk_cache(**sizes) as layer_cache:
        assert_alike(train(model, rows, side), expected)
    return layer_cache


def with_prefix(family: str, layers: Any = "last:1", task: str = CAUSAL_LM, **overrides: Any) -> PeftModel:
    base = base_model(family, task, **overrides)
    return scramble(get_peft_model(base, prefix_config(task, P, layers=layers))).train()


def prefix_config(task: str, length: int, **options: Any) -> PrefixTuningConfig:
    return PrefixTuningConfig(task_type=task, num_virtual_tokens=length, **options)


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """How many tokens each call of a module works on."""
    tokens: list[int] = []
    handle = module.register_forward_hook(lambda m, args, output: tokens.append(output.shape[1]))
    yield tokens
    handle.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_epochs_with_the_cache_equal_those_without(family: str, side: str) -> None:
    layer_cache = assert_exact(family, side)
    assert (layer_cache.hits, layer_cache.misses) == (10, 5)


OTHERS = [f for f in FAMILIES if CAUSAL_LM in FAMILIES[f].tasks and takes(f, "prefix_last")]


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("method", ["prefix_last"])
def test_every_decoder_is_exact_or_refused(family: str, method: str) -> None:
    try:
        layer_cache = assert_exact(family, method=method)
    except UnsupportedModelError as error:
        assert "no trunk to cache" in str(error)  # noqa: PT017
    else:
        assert layer_cache.hits


def test_qwen2() -> None:
    """Its layers have biases, and it is a family of the slow suite."""
    assert assert_exact("qwen2").hits == 10


def test_deep_prompts_with_dropout_draw_the_same_numbers() -> None:
    config = PTuningV2Config(task_type=CAUSAL_LM, num_virtual_tokens=P, layers="last:1", prefix_dropout=0.3)
    found = []
    for cached in (False, True):
        model = scramble(get_peft_model(base_model("llama", CAUSAL_LM), config)).train()
        torch.manual_seed(4)
        with model.trunk_cache() if cached else nullcontext():
            found.append(train(model, rows_of("llama")))
    assert_alike(*found)


def test_a_classifier() -> None:
    rows = texts("llama", SEQ_CLS, (11, 7, 4, 2, 12))
    expected = train(with_prefix("llama", task=SEQ_CLS), rows)
    model = with_prefix("llama", task=SEQ_CLS)
    with model.trunk_cache() as layer_cache:
        assert_alike(train(model, rows), expected)
    assert layer_cache.hits == 10


def test_layers_below_run_once_for_each_text() -> None:
    model, rows = with_prefix("gemma3"), rows_of("gemma3")
    first, second, last = (layer.mlp for layer in model.backbone.stacks[0].layers)
    with model.trunk_cache(), counted(first) as below, counted(second) as below_too, counted(last) as above:
        step(model, rows[:3])
        assert below == below_too == above == [11 + 2 + 4]  # less what they have in common
        for numbers in EPOCHS[1]:
            step(model, [rows[i] for i in numbers if i < 3])
        assert below == below_too == [17]
        assert above == [17, 11, 11]
        step(model, [rows[2], rows[4], rows[0]])  # one of them new
        assert below == below_too == [17, 12]
        assert above == [17, 11, 11, 4 + 12 + 8]
    with counted(first) as below:
        step(model, rows[:3])
        assert below == [17]


def test_every_row_of_the_same_length() -> None:
    """There is no padding to leave out, and still a layer_cache."""
    rows = texts("llama", CAUSAL_LM, (6, 6, 6))
    model = with_prefix("llama")
    expected = step(model, rows)
    with model.trunk_cache() as layer_cache:
        assert_alike(step(model, rows), expected)
        assert_alike(step(model, rows), expected)
        assert_alike(step(model, rows[:1] * 2), step(model, rows[:1] * 2))
    assert (layer_cache.hits, layer_cache.misses) == (3 + 4, 3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing(family: str, reentrant: bool) -> None:
    rows = rows_of(family)
    expected = train(with_prefix(family), rows)
    model = with_prefix(family)
    enable_checkpointing(model, use_reentrant=reentrant)
    with model.trunk_cache() as layer_cache:
        assert_alike(train(model, rows), expected)
    assert layer_cache.hits == 10
    assert all(layer.gradient_checkpointing for layer in model.backbone.stacks[0].layers)


def test_spilling_to_a_file() -> None:
    layer_cache = assert_exact("llama", memory=3 * KB, disk=1)
    assert layer_cache.hits == 10


def test_no_room_for_all() -> None:
    layer_cache = assert_exact("llama", memory=3 * KB)
    assert 0 < layer_cache.hits < 10
    assert assert_exact("llama", memory=0.1 * KB).hits == 0


@pytest.mark.filterwarnings("ignore:the trunk cache cannot write:RuntimeWarning")
def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.injection.test_tensor_store import FullDisk

    monkeypatch.setattr("softtune.injection.tensor_store.tempfile.TemporaryFile", lambda **kwargs: FullDisk(4000))
    assert 0 < assert_exact("llama", memory=1 * KB, disk=1).hits < 10


def test_half_precision() -> None:
    rows = rows_of("llama")
    model = with_prefix("llama").to(torch.bfloat16)
    expected = step(model, rows)
    with model.trunk_cache(memory=0, disk=1):
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(step(model, rows), expected, strict=True))


def test_autocast_has_states_of_its_own() -> None:
    rows, model = rows_of("llama"), with_prefix("llama")
    expected = step(model, rows)
    with model.trunk_cache() as layer_cache:
        with torch.autocast("cpu", torch.bfloat16):
            step(model, rows)
        assert_alike(step(model, rows), expected)
    assert layer_cache.misses == 10


# Rows of several adapters


def several() -> PeftModel:
    """Adapters that begin at the third, the second and the first layer, and one beside the text's first position."""
    config = partial(prefix_config, CAUSAL_LM)
    model = with_prefix("gemma3")
    model.add_adapter("two", config(3, layers="last:2"))
    model.add_adapter("all", config(2))
    model.add_adapter("again", config(P, layers="last:1"))
    model.add_adapter("unmoved", config(4, layers="last:1", shift_positions=False))
    model.add_adapter("biases", BitFitConfig(task_type=CAUSAL_LM, add_missing=True))
    model.set_requires_grad([*model.peft_config])
    return scramble(model).train()


MIXES = [
    (["default", "two", "default"], 1),
    (["default", "again", "__base__"], 2),
    (["default", "unmoved", "again"], 2),
    (["__base__", "__base__", "again"], 2),
    (["two", "all", "default"], 0),
    (["biases", "default", "default"], 0),
]


@pytest.mark.parametrize(("names", "depth"), MIXES)
def test_rows_of_several_adapters_begin_below_the_lowest_prefix(names: list[str], depth: int) -> None:
    model, rows = several(), rows_of("gemma3")[:3]
    expected = step(model, rows, adapter_names=names)
    layers = model.backbone.stacks[0].layers
    with model.trunk_cache() as layer_cache:
        step(model, rows, adapter_names=names)
        with counted(layers[0].mlp) as first, counted(layers[1].mlp) as second:
            assert_alike(step(model, rows, adapter_names=names), expected)
        assert [len(first), len(second)] == [int(depth < 1), int(depth < 2)]
        assert layer_cache.hits == (3 if depth else 0)


def test_other_adapters_at_the_same_positions_share_a_texts_states() -> None:
    model, rows = several(), rows_of("gemma3")[:1]
    with model.trunk_cache() as layer_cache:
        for name, hits in (("default", 0), ("again", 1), ("unmoved", 1), ("two", 1)):
            step(model, rows, adapter_names=[name])
            assert layer_cache.hits == hits, name


# What is left alone


def test_calls_without_gradients_are_those_without_a_cache() -> None:
    model, inputs = with_prefix("llama"), batch(rows_of("llama"), "left")
    with torch.no_grad():
        expected = [model(**inputs).logits, model.generate(**inputs, max_new_tokens=3)]
        with model.trunk_cache() as layer_cache:
            with torch.enable_grad():
                step(model, rows_of("llama"))
            found = [model(**inputs).logits, model.generate(**inputs, max_new_tokens=3)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (layer_cache.hits, layer_cache.misses) == (0, 5)


def ways_to_ask(model: PeftModel) -> dict[str, dict[str, Any]]:
    inputs = batch(rows_of("llama"), "right")
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    vectors = model.get_input_embeddings()(inputs["input_ids"])
    return {
        "word vectors": {"inputs_embeds": vectors, "attention_mask": inputs["attention_mask"]},
        "hidden states": {**inputs, "output_hidden_states": True},
        "attention weights": {**inputs, "output_attentions": True},
        "positions": {**inputs, "position_ids": positions},
        "a cache": {**inputs, "use_cache": True},
    }


@pytest.mark.parametrize("way", ["word vectors", "hidden states", "attention weights", "positions", "a cache"])
def test_calls_that_run_all_layers(way: str) -> None:
    model = with_prefix("llama", **({"attn_implementation": "eager"} if way == "attention weights" else {}))
    call = ways_to_ask(model)[way]
    expected = model(**call)
    with model.trunk_cache() as layer_cache:
        step(model, rows_of("llama"))
        found = model(**call)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    for a, b in zip(found.hidden_states or (), expected.hidden_states or (), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert layer_cache.hits == 0


def test_token_types_are_no_matter_of_ids_alone() -> None:
    model, inputs = with_prefix("gpt2"), batch(rows_of("gpt2"), "right")
    types = inputs["input_ids"].flip(0)
    expected = model(**inputs, token_type_ids=types).logits
    with model.trunk_cache():
        step(model, rows_of("gpt2"), "right")
        torch.testing.assert_close(model(**inputs, token_type_ids=types).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_call_that_fails_leaves_all_layers_running(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = with_prefix("llama"), rows_of("llama")
    expected = step(model, rows)

    def fail(*args: Any) -> None:
        raise RuntimeError("norm")

    with model.trunk_cache():
        with monkeypatch.context() as patch:
            patch.setattr(model.backbone.stacks[0].module.norm, "forward", fail)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="norm"):
                    step(model, rows)
        with model.disable_adapter():
            alone = model(**batch(rows)).logits
        assert_alike(step(model, rows), expected)
    assert torch.equal(alone, base_model("llama", CAUSAL_LM)(**batch(rows)).logits)


def test_the_cache_ends_with_its_block() -> None:
    model, rows = with_prefix("llama"), rows_of("llama")
    with model.trunk_cache() as outer:
        step(model, rows)
        with model.trunk_cache() as inner:
            step(model, rows)
        step(model, rows)
    step(model, rows)
    assert (outer.hits, outer.misses, inner.hits, inner.misses) == (5, 5, 0, 5)
    assert len(outer.store) == 0


# Refused


@pytest.mark.parametrize("sizes", [{"memory": -1}, {"disk": -0.5}, {"memory": 0}])
def test_sizes(sizes: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="use 0 or more"):
        with_prefix("llama").trunk_cache(**sizes)


@pytest.mark.parametrize(
    "config",
    [
        PrefixTuningConfig(),
        PrefixTuningConfig(layers="first:1"),
        PrefixTuningConfig(layers="last:1", placement="infix"),
        PromptTuningConfig(),
        BitFitConfig(add_missing=True),
        PrefixTuningConfig(layers="last:1", modules_to_save=["up_proj"]),
    ],
)
def test_adapters_that_act_from_the_first_layer_on(config: Any) -> None:
    with pytest.raises(ConfigError, match="set layers, such as 'last:10'"):
        get_peft_model(base_model("llama", CAUSAL_LM), config).trunk_cache()


def test_dropout() -> None:
    model = with_prefix("gpt2", resid_pdrop=0.1).eval()
    with pytest.raises(UnsupportedModelError, match="dropout 0"):
        model.trunk_cache()


def test_dropout_that_comes_later_stops_the_caching() -> None:
    model, rows = with_prefix("gpt2"), rows_of("gpt2")
    with model.trunk_cache() as layer_cache:
        step(model, rows)
        model.backbone.stacks[0].layers[0].mlp.dropout.p = 0.5
        step(model, rows)
    assert (layer_cache.hits, layer_cache.misses) == (0, 5)


def test_trained_layers() -> None:
    model = with_prefix("llama")
    with model.trunk_cache():
        model.backbone.stacks[0].layers[0].requires_grad_(True)
        with pytest.raises(UnsupportedModelError, match="freeze them"):
            step(model, rows_of("llama"))
    with pytest.raises(UnsupportedModelError, match="freeze them"):
        model.trunk_cache()


@pytest.mark.parametrize(("family", "task"), [("bert", SEQ_CLS), ("t5", "SEQ_2_SEQ_LM"), ("gemma4_small", CAUSAL_LM)])
def test_models_without_a_trunk(family: str, task: str) -> None:
    model = with_prefix(family, task=task)
    with pytest.raises(UnsupportedModelError, match="no trunk to cache"):
        model.trunk_cache()
