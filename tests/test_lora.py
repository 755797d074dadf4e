"""A soft prompt beside PEFT's LoRA: both act, and the LoRA stays frozen or is trained along, as it was."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from softtune import AdapterError, PeftModel, get_peft_model
from tests.families import CAUSAL_LM, METHODS, SEQ_CLS, base_model, batch, scramble, texts, trained

FAMILIES = {"llama": ("q_proj", "v_proj"), "gpt2": ("c_attn",), "bloom": ("query_key_value",)}
METHOD_NAMES = ("prompt", "prompt_suffix", "p_tuning_lstm", "prefix", "infix", "p_tuning_v2")


def with_lora(family: str, *, frozen: bool) -> peft.PeftModel:
    config = peft.LoraConfig(
        r=2, target_modules=list(FAMILIES[family]), task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2"
    )
    model = peft.get_peft_model(base_model(family, CAUSAL_LM), config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False) if frozen else model


def test_an_embedding_that_is_saved_along(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    lora = peft.get_peft_model(base_model("llama", CAUSAL_LM), config)
    model = get_peft_model(lora, METHODS["prefix"](task_type=CAUSAL_LM))
    assert model(**batch(texts("llama", CAUSAL_LM))).logits.isfinite().all()


@pytest.mark.parametrize(
    ("family", "method"), [(f, m) for f in FAMILIES for m in METHOD_NAMES if (f, m) != ("bloom", "infix")]
)
@pytest.mark.parametrize("frozen", [True, False])
def test_both_act(family: str, method: str, frozen: bool, tmp_path: Path) -> None:
    inputs = batch(texts(family, CAUSAL_LM))
    merged = with_lora(family, frozen=True).merge_and_unload()
    expected = scramble(get_peft_model(merged, METHODS[method](task_type=CAUSAL_LM))).eval()
    lora = with_lora(family, frozen=frozen)
    before = {n: p.requires_grad for n, p in lora.named_parameters()}
    model = get_peft_model(lora, METHODS[method](task_type=CAUSAL_LM)).eval()
    assert {n: p.requires_grad for n, p in lora.named_parameters()} == before
    own = model.prompt_encoder["default"].state_dict()
    for name, tensor in expected.prompt_encoder["default"].state_dict().items():
        own[name].copy_(tensor)
    torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits, atol=1e-5, rtol=1e-5)

    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    names = {n for n, p in trained(model).items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(n.startswith("prompt_encoder") for n in names)
    assert any("lora_" in n for n in names) is not frozen
    assert any("lora_" in n for n in model.state_dict()) is not frozen

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(with_lora(family, frozen=True), tmp_path)
    assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


def test_a_model_with_soft_prompts_takes_more_by_add_adapter() -> None:
    model = get_peft_model(base_model("bert", SEQ_CLS), METHODS["prefix"]())
    with pytest.raises(AdapterError, match="add_adapter"):
        get_peft_model(model, METHODS["prefix"]())
