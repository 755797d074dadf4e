"""Combined adapters: each part acts, and all that can go wrong in their config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import CAUSAL_LM, adapted, base_model, batch, scramble, texts

from softtune import (
    BitFitConfig,
    CartridgeConfig,
    CombinedConfig,
    ConfigError,
    CPTConfig,
    IA3Config,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PrefixMemoryConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningV2Config,
    TaskType,
    get_peft_model,
)
from softtune.training.trainer import AdapterTrainer, training_arguments


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
        ([BitFitConfig(), CPTConfig(task_type="CAUSAL_LM")], "no part of a combined adapter"),
        ([BitFitConfig(), MultitaskPromptTuningConfig(num_tasks=2)], "no part of a combined adapter"),
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


def test_a_part_whose_tensors_stand_in_parts_comes_back(tmp_path: Path) -> None:
    config = CombinedConfig(parts=[CartridgeConfig(num_virtual_tokens=4), IA3Config()], task_type=CAUSAL_LM)
    model = scramble(get_peft_model(base_model("llama", CAUSAL_LM), config)).eval()
    model.save_pretrained(tmp_path)
    inputs = batch(texts("llama", CAUSAL_LM))
    for trains in (False, True):
        loaded = PeftModel.from_pretrained(base_model("llama", CAUSAL_LM), tmp_path, is_trainable=trains).eval()
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_the_trainer_takes_each_parts_rate(tmp_path: Path) -> None:
    config = CombinedConfig(parts=[PrefixTuningConfig(), IA3Config()], task_type=CAUSAL_LM)
    model = get_peft_model(base_model("llama", CAUSAL_LM), config)
    arguments = training_arguments(tmp_path, torch.device("cpu"), learning_rate=0.02, max_steps=1)
    trainer = AdapterTrainer(model, args=arguments)
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    ratio = IA3Config.learning_rate / PrefixTuningConfig.learning_rate
    for number, expected in ((0, 0.02), (1, 0.02 * ratio)):
        found = {rates[id(p)] for p in model.adapter("default").module.parts[number].parameters()}
        assert [*found] == [pytest.approx(expected)]
    again = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert again == rates
