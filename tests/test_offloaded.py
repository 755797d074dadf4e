"""A base model whose weights are on disk in part, and brought for each call by accelerate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from softtune import PeftModel, get_peft_model
from tests.families import CAUSAL_LM, METHODS, SEQ_CLS, base_model, scramble

IDS = torch.tensor([[5, 6, 7, 8, 9]])
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def offloaded(folder: Path, part: str) -> PreTrainedModel:
    places = dict.fromkeys(PARTS, "cpu") | {part: "disk"}
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=places, offload_folder=folder / "disk"
    ).eval()


# transformers 5.17 takes the place of the first parameter for the model's.
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize("method", ["prefix", "prompt", "p_tuning_v2", "bitfit_added"])
@pytest.mark.parametrize("part", ["model.embed_tokens", "model.layers.1"])
def test_adapters_act_as_on_a_model_in_memory(part: str, method: str, tmp_path: Path) -> None:
    base_model("llama", CAUSAL_LM).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = METHODS[method](task_type=CAUSAL_LM)
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    torch.manual_seed(0)
    wrapped = get_peft_model(offloaded(tmp_path, part), config).eval()
    assert wrapped.device.type == "cpu"
    torch.testing.assert_close(wrapped(IDS).logits, model(IDS).logits)
    scramble(model).save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(offloaded(tmp_path, part), tmp_path / "adapter")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    assert torch.equal(
        loaded.generate(IDS, max_new_tokens=3, do_sample=False), model.generate(IDS, max_new_tokens=3, do_sample=False)
    )


@pytest.mark.parametrize("where", ["all", "score"])
def test_a_classifiers_head_is_trained_whatever_is_offloaded(where: str, tmp_path: Path) -> None:
    base_model("llama", SEQ_CLS).save_pretrained(tmp_path / "base")
    parts = [part for part in PARTS if part != "lm_head"] + ["score"]
    places = {part: "disk" if where in ("all", part) else "cpu" for part in parts}
    folders = {"device_map": places, "offload_folder": tmp_path / "disk"}
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **folders)
    model = get_peft_model(base, METHODS["prefix"](task_type=SEQ_CLS))
    assert model.device.type == "cpu"
    model(IDS, labels=torch.tensor([1])).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
