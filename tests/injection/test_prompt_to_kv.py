"""Virtual tokens as keys and values, against the cache that the base model alone fills with them."""

from __future__ import annotations

import pytest
import torch
from tests.families import CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, base_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from softtune.backbone import Backbone, Site
from softtune.compat import enable_checkpointing, spelled
from softtune.injection.prompt_to_kv import prompt_to_kv
from softtune.methods.prompt import KeyValue, Prompt

P = 3


def vectors_for(model: PreTrainedModel) -> Tensor:
    """[P, D]"""
    return torch.randn(P, model.get_input_embeddings().embedding_dim, requires_grad=True)


def prompt_of(vectors: Tensor, **options: bool) -> Prompt:
    return Prompt(num_virtual_tokens=len(vectors), vectors=vectors, **options)


def cached(model: PreTrainedModel, vectors: Tensor) -> list[KeyValue]:
    """Each layer's keys [H, P, K] and values of a text whose words are these vectors."""
    cache = DynamicCache()
    model.base_model(inputs_embeds=vectors[None], use_cache=True, **{spelled("cache"): cache})
    return [KeyValue(layer.keys[0], layer.values[0]) for layer in cache.layers]


# One with rotary positions and grouped heads, one with a table of positions, one with windows, and one whose layers
# call no attention interface.
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bloom"])
def test_keys_and_values_are_those_of_a_text_of_vectors(name: str) -> None:
    model = base_model(name, CAUSAL_LM)
    vectors = vectors_for(model)
    expected = cached(model, vectors)
    found = prompt_to_kv(Backbone(model), prompt_of(vectors))
    assert found.vectors is None
    assert (found.num_virtual_tokens, found.after_text, found.shifts_positions) == (P, False, True)
    assert [*found.prefixes] == [(Site.DECODER, number) for number in range(len(expected))]
    total_found = total_expected = torch.zeros(())
    for pair, own in zip(found.prefixes.values(), expected, strict=True):
        for part, states in zip(pair, own, strict=True):
            torch.testing.assert_close(part, states, atol=1e-5, rtol=1e-5)
            weights = torch.randn_like(states)
            total_found = total_found + (part * weights).sum()
            total_expected = total_expected + (states * weights).sum()
    gradients = [torch.autograd.grad(total, vectors)[0] for total in (total_found, total_expected)]
    assert gradients[1].abs().max() > 0.1
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_are_kept_under_checkpointing(use_reentrant: bool) -> None:
    """Nothing would run the layers again."""
    model = base_model("llama", CAUSAL_LM)
    vectors = vectors_for(model)
    expected = torch.autograd.grad(cached(model, vectors)[1].value.sum(), vectors)
    enable_checkpointing(model.train(), use_reentrant=use_reentrant)
    found = prompt_to_kv(Backbone(model), prompt_of(vectors))
    gradients = torch.autograd.grad(found.prefixes[Site.DECODER, 1].value.sum(), vectors)
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-5)
    assert model.training


def test_vectors_take_the_type_of_the_base_model_and_stay_as_they_are() -> None:
    model = base_model("llama", CAUSAL_LM).bfloat16()
    vectors = vectors_for(model)
    before = vectors.detach().clone()
    found = prompt_to_kv(Backbone(model), prompt_of(vectors))
    assert {part.dtype for pair in found.prefixes.values() for part in pair} == {torch.bfloat16}
    found.prefixes[Site.DECODER, 1].key.float().sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.dtype == torch.float32
    assert torch.equal(vectors, before)


# What stays as it is


def test_prompts_that_are_no_vectors_in_front_of_the_text() -> None:
    model = base_model("llama", CAUSAL_LM)
    backbone = Backbone(model)
    pair = KeyValue(torch.randn(2, P, 8), torch.randn(2, P, 8))
    for prompt in (
        Prompt(),
        Prompt(num_virtual_tokens=P, prefixes={(Site.DECODER, 0): pair}),
        prompt_of(vectors_for(model), after_text=True),
    ):
        assert prompt_to_kv(backbone, prompt) is prompt


@pytest.mark.parametrize(
    ("name", "task"), [("bert", SEQ_CLS), ("t5", SEQ_2_SEQ_LM), ("lfm2", CAUSAL_LM), ("mamba", CAUSAL_LM)]
)
def test_models_with_more_than_a_decoders_attention(name: str, task: str) -> None:
    """Encoders, and decoders in which some layers have other states."""
    model = base_model(name, task)
    prompt = prompt_of(vectors_for(model))
    assert prompt_to_kv(Backbone(model), prompt) is prompt


def test_layers_that_are_dropped_at_random() -> None:
    """Those that compute the prefix need not be those that read the text."""
    model = base_model("opt", CAUSAL_LM, layerdrop=0.5)
    backbone, prompt = Backbone(model), prompt_of(vectors_for(model))
    assert len(prompt_to_kv(backbone, prompt).prefixes) == 2
    model.train()
    assert prompt_to_kv(backbone, prompt) is prompt
    model.eval()
    assert prompt_to_kv(backbone, prompt).vectors is None
