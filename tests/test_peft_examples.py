"""The calls of PEFT's own examples for prompts, made of either library: the import alone differs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
    get_linear_schedule_with_warmup,
)

import softtune
from softtune.compat import INSTALLED
from tests.tiny import WORDS, save_models, tokenizer

EXAMPLES = ["causal_lm", "seq2seq", "sequence_classification", "token_classification", "feature_extraction"]
TEXTS = ["red is warm", "blue is cold", "the sky is blue", "red sky is good"]
STEPS = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    paths = save_models(folder)
    # PEFT needs keys as wide as the model.
    sizes = {"d_model": 16, "d_kv": 8, "num_heads": 2, "num_layers": 2, "d_ff": 32, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=len(WORDS) + 3, **sizes)).save_pretrained(folder / "even")
    tokenizer(ends=True).save_pretrained(folder / "even")
    return paths | {"t5": str(folder / "even")}


def tokens(path: str, texts: list[str]) -> dict[str, Tensor]:
    words = AutoTokenizer.from_pretrained(path)
    return dict(words(texts, padding=True, return_tensors="pt"))


def trained(model: Any, batch: dict[str, Tensor]) -> tuple[float, float]:
    """The losses before and after a few steps, as the examples' loops take them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(len(batch["input_ids"]))]
    before = evaluated(model, batch)
    model.train()
    for _ in range(STEPS):
        outputs = model(**default_data_collator(rows))
        outputs.loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return before, evaluated(model, batch)


def evaluated(model: Any, batch: dict[str, Tensor]) -> float:
    model.eval()
    with torch.no_grad():
        return float(model(**batch).loss)


def causal_lm(library: ModuleType, path: str, folder: Path) -> None:
    config = library.PromptTuningConfig(
        task_type=library.TaskType.CAUSAL_LM,
        prompt_tuning_init=library.PromptTuningInit.TEXT,
        num_virtual_tokens=8,
        prompt_tuning_init_text="text is warm : label :",
        tokenizer_name_or_path=path,
    )
    model = library.get_peft_model(AutoModelForCausalLM.from_pretrained(path), config)
    model.print_trainable_parameters()
    batch = tokens(path, TEXTS)
    first, last = trained(model, batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)})
    assert last < first
    model.save_pretrained(folder)
    config = library.PeftConfig.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path)
    again = library.PeftModel.from_pretrained(base, folder)
    asked = tokens(path, ["the sky is"])
    with torch.no_grad():
        written = again.generate(**asked, max_new_tokens=5, min_new_tokens=5, eos_token_id=3)
    assert written.shape == (1, asked["input_ids"].shape[1] + 5)
    loaded = library.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.generate(**asked, max_new_tokens=5, min_new_tokens=5, eos_token_id=3), written)


def seq2seq(library: ModuleType, path: str, folder: Path) -> None:
    task = library.TaskType.SEQ_2_SEQ_LM
    config = library.PrefixTuningConfig(task_type=task, inference_mode=False, num_virtual_tokens=8)
    model = library.get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(path), config)
    batch = tokens(path, TEXTS)
    labels = tokens(path, ["warm", "cold", "cold", "good"])["input_ids"]
    first, last = trained(model, batch | {"labels": labels})
    assert last < first
    model.save_pretrained(folder)
    config = library.PeftConfig.from_pretrained(folder)
    base = AutoModelForSeq2SeqLM.from_pretrained(config.base_model_name_or_path)
    again = library.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        assert len(again.generate(input_ids=batch["input_ids"], max_new_tokens=4)) == len(TEXTS)


def sequence_classification(library: ModuleType, path: str, folder: Path) -> None:
    config = library.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=8, encoder_hidden_size=16)
    model = library.get_peft_model(AutoModelForSequenceClassification.from_pretrained(path), config)
    batch = tokens(path, TEXTS) | {"labels": torch.tensor([1, 0, 0, 1])}
    first, last = trained(model, batch)
    assert last < first
    with torch.no_grad():
        predictions = model(**batch).logits.argmax(dim=-1)
    model.save_pretrained(folder)
    config = library.PeftConfig.from_pretrained(folder)
    inner = AutoModelForSequenceClassification.from_pretrained(config.base_model_name_or_path)
    again = library.PeftModel.from_pretrained(inner, folder).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits.argmax(dim=-1), predictions)


def token_classification(library: ModuleType, path: str, folder: Path) -> None:
    config = library.PrefixTuningConfig(task_type=library.TaskType.TOKEN_CLS, num_virtual_tokens=6)
    model = library.get_peft_model(AutoModelForTokenClassification.from_pretrained(path), config)
    batch = tokens(path, TEXTS)
    labels = (batch["input_ids"] % 2).masked_fill(batch["attention_mask"] == 0, -100)
    first, last = trained(model, batch | {"labels": labels})
    assert last < first
    assert model(**batch).logits.shape == (*labels.shape, 2)


def feature_extraction(library: ModuleType, path: str, folder: Path) -> None:
    config = library.PromptTuningConfig(task_type=library.TaskType.FEATURE_EXTRACTION, num_virtual_tokens=4)
    model = library.get_peft_model(AutoModel.from_pretrained(path), config).eval()
    batch = tokens(path, TEXTS)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    model.save_pretrained(folder)
    again = library.AutoPeftModelForFeatureExtraction.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).last_hidden_state, states)


PREFIX_ON_NEW = "PEFT's prefixes do not act, or are refused, since transformers renamed the cache"


@pytest.mark.filterwarnings("ignore")  # of PEFT and of transformers about PEFT
@pytest.mark.parametrize("library", [peft, softtune], ids=lambda library: library.__name__)
@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example(example: str, library: ModuleType, models: dict[str, str], tmp_path: Path) -> None:
    uses_prefix = example in ("seq2seq", "token_classification")
    if library is peft and uses_prefix and Version("5.24") <= INSTALLED:
        pytest.skip(PREFIX_ON_NEW)
    family = {"causal_lm": "llama", "seq2seq": "t5"}.get(example, "bert")
    torch.manual_seed(0)
    globals()[example](library, models[family], tmp_path)
