"""Promise 2 for biases in models that arrange tokens in ways of their own: a mixed row is as alone, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    LongformerConfig,
    NllbMoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    SwitchTransformersConfig,
    XLNetConfig,
)

from softtune import BitFitConfig, PeftModel, UnsupportedModelError
from tests.families import AUTO, CAUSAL_LM, LLAMA, PAD, SEQ_2_SEQ_LM, SEQ_CLS, VOCABULARY, answers, scramble

SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": 2, "decoder_start_token_id": PAD}


def xlnet() -> PretrainedConfig:
    """Its layers see tokens before rows."""
    return XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=40, **SPECIAL)


def longformer() -> PretrainedConfig:
    """Its attention sees tokens before rows."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    return LongformerConfig(attention_window=4, max_position_embeddings=64, **sizes, **SPECIAL)


def nllb_moe() -> PretrainedConfig:
    """Each of its experts sees tokens of its own; with two for a token, in the order of how well they suit it."""
    sizes = {"layers": 2, "attention_heads": 4, "ffn_dim": 40, "sparse_step": 2}
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()}
    return NllbMoeConfig(d_model=32, num_experts=2, max_position_embeddings=64, **sides, **SPECIAL)


def switch() -> PretrainedConfig:
    """Each of its experts sees tokens of its own."""
    layers = {"num_layers": 2, "num_sparse_encoder_layers": 1, "num_decoder_layers": 2, "num_sparse_decoder_layers": 1}
    return SwitchTransformersConfig(d_model=32, d_kv=8, d_ff=40, num_heads=4, num_experts=4, **layers, **SPECIAL)


def qwen2_moe() -> PretrainedConfig:
    """Its shared expert sees all tokens in one dimension."""
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
    return Qwen2MoeConfig(**LLAMA, **sizes, **SPECIAL)


Config = Callable[[], PretrainedConfig]


def with_biases(config: Config, task: str, **settings: Any) -> PeftModel:
    """A tiny model with two adapters of biases."""
    torch.manual_seed(0)
    model = PeftModel(AUTO[task].from_config(config()))
    for seed, name in enumerate("ab"):
        model.add_adapter(name, BitFitConfig(add_missing=True, task_type=task, **settings))
        model.set_adapter(name)
        scramble(model, seed)
    return model.eval()


def inputs_for(task: str) -> dict[str, torch.Tensor]:
    """Three rows of six tokens, so that a guess of rows by length finds some where tokens come first."""
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(3, VOCABULARY, (3, 6), generator=generator), **answers(task, 3)}


@pytest.mark.parametrize(
    ("config", "task", "roles"),
    [
        (xlnet, SEQ_CLS, ["layer_norm"]),
        (longformer, SEQ_CLS, ["query"]),
        (nllb_moe, SEQ_2_SEQ_LM, ["intermediate"]),
        (switch, SEQ_2_SEQ_LM, ["output"]),
    ],
)
def test_outputs_without_rows_in_order_are_refused(config: Config, task: str, roles: list[str]) -> None:
    model = with_biases(config, task, roles=roles)
    with pytest.raises(UnsupportedModelError, match="does not compute row by row: run rows"):
        model(**inputs_for(task), adapter_names=["a", "b", "__base__"])
    assert model(**inputs_for(task), adapter_names=["a", "a", "a"]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("config", "task", "roles"),
    [
        (longformer, SEQ_CLS, ["attention_output", "intermediate", "output", "layer_norm"]),
        (switch, SEQ_2_SEQ_LM, ["query", "key", "value", "attention_output", "layer_norm"]),
        (qwen2_moe, CAUSAL_LM, None),
    ],
)
def test_outputs_with_rows_in_order_are_those_of_each_row_alone(
    config: Config, task: str, roles: list[str] | None
) -> None:
    model, inputs, names = with_biases(config, task, roles=roles), inputs_for(task), ["a", "b", "__base__"]
    logits = model(**inputs, adapter_names=names).logits
    for i, name in enumerate(names):
        alone = model(**{k: x[i : i + 1] for k, x in inputs.items()}, adapter_names=[name]).logits[0]
        torch.testing.assert_close(logits[i], alone, atol=1e-5, rtol=1e-5)


def test_trained_modules_without_rows_in_order_are_refused() -> None:
    model = with_biases(longformer, SEQ_CLS, roles=["output"], modules_to_save=["query"])
    with pytest.raises(UnsupportedModelError, match="query does not compute row by row"):
        model(**inputs_for(SEQ_CLS), adapter_names=["a", "b", "__base__"])
