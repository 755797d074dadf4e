"""Whether a model is random in training, by dropout of whatever name, noise or layers left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.families import CAUSAL_LM, FAMILIES, LLAMA, PAD, VOCABULARY, base_model
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from softtune.backbone import Backbone

BIOGPT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "activation_dropout": 0.0}
OPT: dict[str, Any] = {"ffn_dim": 40, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}


def biogpt(**rates: float) -> PreTrainedModel:
    sizes = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
    config = BioGptConfig(**{**sizes, **BIOGPT, "layerdrop": 0.0, **rates}, vocab_size=VOCABULARY, pad_token_id=PAD)
    return BioGptForCausalLM(config)


def mixtral(**rates: float) -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**LLAMA, **rates, num_local_experts=4, vocab_size=VOCABULARY))


def opt(**rates: float) -> PreTrainedModel:
    sizes = {name: value for name, value in LLAMA.items() if name not in ("num_key_value_heads", "intermediate_size")}
    return OPTForCausalLM(OPTConfig(**{**sizes, **OPT, **rates}, vocab_size=VOCABULARY, pad_token_id=PAD))


@pytest.mark.parametrize(
    ("make", "rates"),
    [
        (biogpt, {"activation_dropout": 0.1}),
        (biogpt, {"attention_probs_dropout_prob": 0.1}),
        (biogpt, {"layerdrop": 0.01}),
        (mixtral, {"router_jitter_noise": 0.1}),
        (opt, {"layerdrop": 0.01}),
        (opt, {"dropout": 0.01}),
    ],
    ids=lambda x: x.__name__ if callable(x) else next(iter(x)),
)
def test_randomness_of_any_name(make: Any, rates: dict[str, float]) -> None:
    for given, is_random in (({}, False), (rates, True)):
        backbone = Backbone(make(**given).eval())
        assert backbone.is_random_in_training is is_random
        assert not backbone.stacks[0].is_random
        backbone.model.train()
        assert backbone.stacks[0].is_random is is_random
        assert backbone.is_random_in_training is is_random


@pytest.mark.parametrize("family", [f for f, row in FAMILIES.items() if CAUSAL_LM in row.tasks])
def test_families_without_dropout_are_not_random(family: str) -> None:
    assert not Backbone(base_model(family, CAUSAL_LM)).is_random_in_training


def test_dropout_that_is_changed_later() -> None:
    backbone = Backbone(base_model("gpt2", CAUSAL_LM, resid_pdrop=0.1).train())
    stack = backbone.stacks[0]
    dropouts = [m for m in stack.module.modules() if isinstance(m, torch.nn.Dropout)]
    rates = [m.p for m in dropouts]
    for _ in range(2):
        assert stack.is_random
        for module in dropouts:
            module.p = 0.0
        assert not stack.is_random
        for module, rate in zip(dropouts, rates, strict=True):
            module.p = rate


def test_layers_that_alone_are_in_training_mode() -> None:
    backbone = Backbone(base_model("gpt2", CAUSAL_LM, resid_pdrop=0.1).train())
    for layer in backbone.stacks[0].layers:
        layer.eval()
    assert not backbone.stacks[0].is_random


def test_looking_draws_no_number_of_the_callers_and_looks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(base_model("gpt2", CAUSAL_LM, resid_pdrop=0.1).train())
    stack, calls = backbone.stacks[0], []
    forward = stack.module.forward
    monkeypatch.setattr(stack.module, "forward", lambda **inputs: calls.append(1) or forward(**inputs))
    before = torch.get_rng_state()
    assert stack.is_random
    assert stack.is_random
    assert torch.equal(torch.get_rng_state(), before)
    assert len(calls) == 2
