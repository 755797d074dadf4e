"""A saved adapter and its base model by one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import softtune
from softtune import BitFitConfig, ConfigError, PeftConfig, PromptTuningConfig, get_peft_model
from tests.families import (
    AUTO,
    CAUSAL_LM,
    METHODS,
    QUESTION_ANS,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    TOKEN_CLS,
    base_model,
    scramble,
)
from tests.tiny import tokenizer

IDS = torch.tensor([[5, 6, 7, 2]])
CLASSES = {
    CAUSAL_LM: ("llama", "AutoPeftModelForCausalLM"),
    SEQ_2_SEQ_LM: ("t5", "AutoPeftModelForSeq2SeqLM"),
    SEQ_CLS: ("bert", "AutoPeftModelForSequenceClassification"),
    TOKEN_CLS: ("bert", "AutoPeftModelForTokenClassification"),
    QUESTION_ANS: ("bert", "AutoPeftModelForQuestionAnswering"),
}


def saved(folder: Path, family: str, task: str) -> softtune.PeftModel:
    """An adapter in a folder, on a base model in another."""
    base_model(family, task).save_pretrained(folder / "base")
    base = AUTO[task].from_pretrained(folder / "base")
    model = scramble(get_peft_model(base, METHODS["prompt"](task_type=task))).eval()
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("task", CLASSES)
def test_an_adapter_comes_with_its_base_model(task: str, tmp_path: Path) -> None:
    family, name = CLASSES[task]
    model = saved(tmp_path, family, task)
    again = getattr(softtune, name).from_pretrained(tmp_path / "adapter")
    call = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if task == SEQ_2_SEQ_LM else {})
    for found, expected in zip(again(**call).to_tuple(), model(**call).to_tuple(), strict=True):
        if isinstance(found, torch.Tensor):
            torch.testing.assert_close(found, expected)
    with pytest.warns(UserWarning, match=r"was trained on its base model in float32, which is in bfloat16 now"):
        trainable = getattr(softtune, name).from_pretrained(
            tmp_path / "adapter", is_trainable=True, dtype=torch.bfloat16
        )
    assert trainable.training
    assert trainable.get_base_model().dtype == torch.bfloat16


def test_without_a_task_the_config_names_the_class(tmp_path: Path) -> None:
    base_model("llama", CAUSAL_LM).save_pretrained(tmp_path / "base")
    base = AUTO[CAUSAL_LM].from_pretrained(tmp_path / "base")
    get_peft_model(base, BitFitConfig(add_missing=True)).save_pretrained(tmp_path / "adapter")
    again = softtune.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert type(again.get_base_model()) is type(base)


def test_another_task_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama", CAUSAL_LM)
    for other in (softtune.AutoPeftModelForSeq2SeqLM, softtune.AutoPeftModel):
        with pytest.raises(ConfigError, match="is not for adapters with task_type CAUSAL_LM"):
            other.from_pretrained(tmp_path / "adapter")
    with pytest.raises(TypeError, match=r"use AutoPeftModel\.from_pretrained"):
        softtune.AutoPeftModel()


def test_an_adapter_without_a_task_is_of_the_class_that_is_asked_for(tmp_path: Path) -> None:
    base_model("llama", CAUSAL_LM).save_pretrained(tmp_path / "base")
    base = AUTO[CAUSAL_LM].from_pretrained(tmp_path / "base")
    get_peft_model(base, PromptTuningConfig()).save_pretrained(tmp_path / "adapter")
    again = softtune.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", import_allowlist=["transformers"])
    assert type(again.get_base_model()) is type(base)


def test_options_of_the_hub_are_the_base_models_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "llama", CAUSAL_LM)
    asked = {}
    load = AUTO[CAUSAL_LM].from_pretrained

    def note(name: str, **options: Any) -> Any:
        asked.update(options)
        return load(name)

    monkeypatch.setattr(AUTO[CAUSAL_LM], "from_pretrained", note)
    hub = {"token": "secret", "cache_dir": str(tmp_path), "local_files_only": True}
    softtune.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32, **hub)
    assert asked == {**hub, "dtype": torch.float32, "revision": None}


def test_a_config_that_names_no_base_model_is_refused(tmp_path: Path) -> None:
    PromptTuningConfig(task_type=CAUSAL_LM).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no base_model_name_or_path"):
        softtune.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.task_type = None
    config.auto_mapping = {"base_model_class": "System", "parent_library": "os"}
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no auto_mapping of transformers"):
        softtune.AutoPeftModel.from_pretrained(tmp_path)


def test_words_that_were_added_beside_the_adapter_get_rows(tmp_path: Path) -> None:
    base_model("llama", CAUSAL_LM).save_pretrained(tmp_path / "base")
    base = AUTO[CAUSAL_LM].from_pretrained(tmp_path / "base")
    words = tokenizer(ends=False)
    words.add_tokens([f"<{i}>" for i in range(base.config.vocab_size)])
    base.resize_token_embeddings(len(words))
    model = get_peft_model(base, PromptTuningConfig(task_type=CAUSAL_LM))
    model.save_pretrained(tmp_path / "adapter")
    words.save_pretrained(tmp_path / "adapter")
    again = softtune.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert again.get_base_model().config.vocab_size == len(words)
