"""Combined adapters: each part acts, and all that can go wrong in their config."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import CAUSAL_LM, METHODS, SEQ_CLS, adapted, base_model, batch, scramble, texts

from softtune import (
    BitFitConfig,
    CartridgeConfig,
    CheckpointError,
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
    methods = "PREFIX_TUNING + PROMPT_TUNING + BITFIT + IA3 + PREFIX_MEMORY"
    assert f"- Method: COMBINED ({methods}), 7 virtual tokens" in (tmp_path / "README.md").read_text()
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
        get_peft_model(base_model("llama", CAUSAL_LM), config)


@pytest.mark.parametrize(
    ("field", "of_part", "of_whole"),
    [("modules_to_save", ["lm_head"], None), ("modules_to_save", ["lm_head"], ["norm"]), ("task_type", SEQ_CLS, None)],
)
@pytest.mark.parametrize("kind", ["config", "mapping"])
def test_fields_of_the_whole_are_said_once(field: str, of_part: Any, of_whole: Any, kind: str) -> None:
    part = IA3Config(**{field: of_part}) if kind == "config" else {"peft_type": "IA3", field: of_part}
    with pytest.raises(ConfigError, match=f"IA3Config has its own {field}: say it once, of the whole"):
        CombinedConfig(parts=[PrefixTuningConfig(), part], **{field: of_whole})
    config = CombinedConfig(parts=[PrefixTuningConfig(), part], **{field: of_part})
    again = dataclasses.replace(config, **{field: None})
    assert getattr(again, field) is None


def test_parts_have_the_modules_to_save_of_the_whole(tmp_path: Path) -> None:
    """IA3 leaves a module out that is trained as a whole."""
    parts = [PrefixTuningConfig(num_virtual_tokens=2), IA3Config(target_modules="all-linear")]
    config = CombinedConfig(parts=parts, task_type=CAUSAL_LM, modules_to_save=["down_proj"])
    model = scramble(get_peft_model(base_model("llama", CAUSAL_LM), config)).eval()
    module = model.adapter("default").module.parts[1]
    assert not any("down_proj" in slot.module for slot in module.slots)
    model.save_pretrained(tmp_path)
    inputs = batch(texts("llama", CAUSAL_LM))
    loaded = PeftModel.from_pretrained(base_model("llama", CAUSAL_LM), tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    loaded.load_adapter(tmp_path, "default")


def test_the_library_that_was_loaded_makes_no_other_adapter(tmp_path: Path) -> None:
    """A folder that was written where PEFT was not imported, or where all of a part was written."""
    model = adapted("llama", CAUSAL_LM, "combined")
    model.save_pretrained(tmp_path)
    path = tmp_path / "softtune_config.json"
    values = json.loads(path.read_text())
    parts = values["config"]["parts"]
    assert not any({"peft_version", "auto_mapping"} & {*part} for part in parts)
    for part in parts:
        part |= {"peft_version": "0.1", "auto_mapping": None}
    path.write_text(json.dumps(values))
    model.load_adapter(tmp_path, "default")


def test_a_part_whose_tensors_stand_in_parts_comes_back(tmp_path: Path) -> None:
    config = CombinedConfig(parts=[CartridgeConfig(num_virtual_tokens=4), IA3Config()], task_type=CAUSAL_LM)
    model = scramble(get_peft_model(base_model("llama", CAUSAL_LM), config)).eval()
    model.save_pretrained(tmp_path)
    inputs = batch(texts("llama", CAUSAL_LM))
    for trains in (False, True):
        loaded = PeftModel.from_pretrained(base_model("llama", CAUSAL_LM), tmp_path, is_trainable=trains).eval()
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("part", ["p_tuning_lstm", "p_tuning_mlp"])
def test_parts_beside_one_with_an_encoder_come_back(part: str, tmp_path: Path) -> None:
    """For inference by the computed prompts alone, and for training with the encoder's own tensors."""
    parts = [CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=1), METHODS[part](), IA3Config()]
    model = scramble(get_peft_model(base_model("llama", CAUSAL_LM), CombinedConfig(parts=parts))).eval()
    model.save_pretrained(tmp_path)
    inputs = batch(texts("llama", CAUSAL_LM))
    expected = model(**inputs).logits
    trains = PeftModel.from_pretrained(base_model("llama", CAUSAL_LM), tmp_path, is_trainable=True).eval()
    assert trains.adapter("default").is_reparameterised
    assert torch.equal(trains(**inputs).logits, expected)
    torch.testing.assert_close(dict(trains.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    (tmp_path / "training_state.safetensors").unlink()
    loaded = PeftModel.from_pretrained(base_model("llama", CAUSAL_LM), tmp_path).eval()
    assert not loaded.adapter("default").is_reparameterised
    torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(CheckpointError, match="not the encoder behind it: load them with is_trainable=False"):
        PeftModel.from_pretrained(base_model("llama", CAUSAL_LM), tmp_path, is_trainable=True)


def test_without_an_encoder_there_is_no_state_of_training(tmp_path: Path) -> None:
    parts = [CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=1), IA3Config()]
    model = scramble(get_peft_model(base_model("llama", CAUSAL_LM), CombinedConfig(parts=parts)))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "training_state.safetensors").exists()


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
