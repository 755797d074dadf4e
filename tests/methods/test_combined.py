"""Combined adapters: each part acts, and all that can go wrong in their config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import CAUSAL_LM, adapted, base_model, batch, scramble, texts

from softtune import (
    BitFitConfig,
    CombinedConfig,
    ConfigError,
    IA3Config,
    PeftConfig,
    PeftModel,
    PrefixMemoryConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningV2Config,
    TaskType,
    get_peft_model,
)


def test_with_all_parts_but_one_at_their_start_it_is_that_part() -> None:
    parts = [PrefixMemoryConfig(), IA3Config(), BitFitConfig(add_missing=True)]
    inputs = batch(texts("llama", CAUSAL_LM))
    for number, part in enumerate(parts):
        single = scramble(get_peft_model(base_model("llama", CAUSAL_LM), part)).eval()
        whole = get_peft_model(base_model("llama", CAUSAL_LM), CombinedConfig(parts=parts)).eval()
        own = whole.adapter("default").module.parts[number]
        own.load_state_dict(single.adapter("default").module.state_dict())
        torch.testing.assert_close(whole(**inputs).logits, single(**inputs).logits, rtol=0, atol=0)


def test_a_saved_one_says_all_of_its_parts(tmp_path: Path) -> None:
    model = adapted("llama", CAUSAL_LM, "combined")
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, CombinedConfig)
    assert [type(part) for part in config.parts] == [type(part) for part in model.active_peft_config.parts]
    assert config.num_virtual_tokens == model.active_peft_config.num_virtual_tokens == 7
    loaded = PeftModel.from_pretrained(base_model("llama", CAUSAL_LM), tmp_path, is_trainable=True)
    inputs = batch(texts("llama", CAUSAL_LM))
    assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)


def test_parts_learn_at_their_own_rates() -> None:
    config = CombinedConfig(parts=[PrefixTuningConfig(), BitFitConfig()], task_type=CAUSAL_LM)
    task = TaskType.CAUSAL_LM
    assert config.peak_learning_rate(task) == PrefixTuningConfig.learning_rate
    ratio = BitFitConfig.learning_rate / PrefixTuningConfig.learning_rate
    assert config.learning_rate_ratio("parts.0.embedding.weight") == 1
    assert config.learning_rate_ratio("parts.1.changes.x") == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "at least two methods"),
        ([BitFitConfig()], "at least two methods"),
        ([BitFitConfig(), BitFitConfig()], "each once"),
        ([BitFitConfig(), PromptTuningConfig(placement="suffix")], "in front of the text"),
        ([BitFitConfig(), PrefixTuningConfig(placement="infix")], "in front of the text"),
        ([BitFitConfig(), {"peft_type": "LORA"}], "no method of softtune"),
        ([BitFitConfig(), {"peft_type": "IA3", "num_virtual_tokens": 3}], "no key 'num_virtual_tokens'"),
        ([BitFitConfig(), 3], "no part of a combined adapter"),
        ([BitFitConfig(), CombinedConfig(parts=[BitFitConfig(), IA3Config()])], "no part of a combined adapter"),
    ],
)
def test_what_cannot_be_combined_is_told(parts: list[Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        CombinedConfig(parts=parts)


def test_two_prefixes_are_refused() -> None:
    config = CombinedConfig(parts=[PrefixTuningConfig(), PTuningV2Config()], task_type=CAUSAL_LM)
    with pytest.raises(ConfigError, match="two parts have prefixes"):
        get_peft_model(base_model("llama", CAUSAL_LM), config)(**batch(texts("llama", CAUSAL_LM)))
