"""DeBERTa's attention by way of a wrapper is its own, and prompts come back after calls within a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.families import SEQ_CLS, adapted, base_model, batch, texts
from torch import nn
from transformers import DebertaConfig, DebertaModel, DebertaV2Config, DebertaV2Model

from softtune import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from softtune.backbone.disentangled import wrap_disentangled_attention
from softtune.backbone.interface import AttentionRecorder

SIZE = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.2,
    "attention_probs_dropout_prob": 0.2,
}
MODELS = {"v1": (DebertaConfig, DebertaModel), "v2": (DebertaV2Config, DebertaV2Model)}
KINDS: dict[str, dict[str, Any]] = {
    "no positions": {"relative_attention": False},
    "none named": {"relative_attention": True, "pos_att_type": None},
    "empty": {"relative_attention": True, "pos_att_type": []},
    "c2p": {"relative_attention": True, "pos_att_type": ["c2p"]},
    "both": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": False},
    "buckets": {"relative_attention": True, "pos_att_type": ["p2c"], "share_att_key": True, "position_buckets": 4},
}


def deberta(version: str, kind: str) -> nn.Module:
    config, model = MODELS[version]
    made: nn.Module = model(config(**SIZE, **KINDS[kind]))
    return made


@pytest.mark.parametrize("version", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_models_own_attention(version: str, kind: str) -> None:
    """With dropout, so that its random numbers are drawn alike."""
    model, ids = deberta(version, kind).train(), torch.arange(1, 15).view(2, 7)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    recorder, found = AttentionRecorder(), []
    for wrapped in (False, True):
        torch.manual_seed(0)
        call = {"input_ids": ids, "attention_mask": mask, "output_attentions": True}
        if wrapped:
            with wrap_disentangled_attention(model, recorder):
                found.append(model(**call))
        else:
            found.append(model(**call))
    assert len(recorder.calls) == 2
    torch.testing.assert_close(found[1].last_hidden_state, found[0].last_hidden_state, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[1].attentions, found[0].attentions, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("version", MODELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_every_kind_of_scores_takes_a_prompt(version: str, kind: str, config: type[Any]) -> None:
    model = get_peft_model(deberta(version, kind), config(num_virtual_tokens=3)).eval()
    ids = torch.arange(1, 8)[None]
    states = model(input_ids=ids).last_hidden_state
    (states * torch.arange(states.shape[-1])).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_layers_share_a_mask() -> None:
    """By which the wrapper makes its wider one once."""
    model, seen = deberta("v2", "both"), set()

    def note(attend: Any, module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen.add(id(mask))
        return attend(module, query, key, value, mask, **kwargs)

    with wrap_disentangled_attention(model, note):
        model(input_ids=torch.arange(1, 8)[None])
    assert len(seen) == 1


@pytest.mark.parametrize("family", ["bert", "deberta", "deberta_v2"])
def test_a_call_within_a_call_leaves_the_prefix_in_its_place(family: str) -> None:
    model, inputs = adapted(family, SEQ_CLS, "prefix").eval(), batch(texts(family, SEQ_CLS))
    with torch.no_grad():
        expected = model(**inputs).logits
        plain = base_model(family, SEQ_CLS).eval()(**inputs).logits
        within = []

        def call(*_: Any) -> None:
            if not within:
                within.append(None)
                with model.disable_adapter():
                    within[0] = model(**inputs).logits

        first = next(m for m in model.get_base_model().modules() if type(m).__name__.endswith("Layer"))
        handle = first.register_forward_hook(call)
        found = model(**inputs).logits
        handle.remove()
    torch.testing.assert_close(within[0], plain)
    torch.testing.assert_close(found, expected)
