"""PrefixMemory-Tuning: what it starts from, its sizes, and where it cannot act."""

from __future__ import annotations

import pytest
import torch
from tests.families import CAUSAL_LM, SEQ_2_SEQ_LM, adapted, base_model, batch, texts

from softtune import PrefixMemoryConfig, UnsupportedModelError, get_peft_model


def test_it_starts_from_the_base_model_and_learns_at_once() -> None:
    base, inputs = base_model("llama", CAUSAL_LM), batch(texts("llama", CAUSAL_LM))
    expected = base(**inputs).logits
    model = get_peft_model(base, PrefixMemoryConfig(task_type=CAUSAL_LM)).eval()
    assert torch.equal(model(**inputs).logits, expected)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


def test_heads_of_a_group_share_a_matrix_on_request() -> None:
    """Llama here has six query heads of eight numbers and two key/value heads."""
    for share, heads in ((False, 6), (True, 2)):
        config = PrefixMemoryConfig(task_type=CAUSAL_LM, share_heads=share, layers="last:1")
        model = get_peft_model(base_model("llama", CAUSAL_LM), config)
        assert {tuple(p.shape) for p in model.parameters() if p.requires_grad} == {(heads, 8, 8)}


def test_every_site_has_its_own() -> None:
    names = {
        name.rsplit(".", 1)[1]
        for name, p in adapted("t5", SEQ_2_SEQ_LM, "memory").named_parameters()
        if p.requires_grad
    }
    assert names == {*(f"encoder_{i}" for i in range(3)), *(f"{s}_{i}" for s in ("decoder", "cross") for i in range(2))}


@pytest.mark.parametrize(("family", "remedy"), [("bloom", "use PrefixTuningConfig"), ("mamba", "PromptTuningConfig")])
def test_models_without_the_attention_interface_are_refused(family: str, remedy: str) -> None:
    with pytest.raises(UnsupportedModelError, match=remedy):
        get_peft_model(base_model(family, CAUSAL_LM), PrefixMemoryConfig(task_type=CAUSAL_LM))
