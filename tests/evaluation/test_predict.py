"""Scores and texts: the labels' words are scored as a forward of each row alone scores them."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from tests.tiny import LABELS, TEMPLATE, save_models, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from softtune import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from softtune.data import Template, Verbalizer
from softtune.errors import AdapterError, ConfigError
from softtune.evaluation.answers import answer, fitted
from softtune.methods import PeftConfig, TaskType
from softtune.methods.p_tuning import PromptEncoder
from softtune.tasks import LabelTask, TextTask

ADAPTERS: dict[str, PeftConfig] = {
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "infix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", placement="infix"),
    "suffix": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", placement="suffix"),
    "template": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
WORDS = {
    "one token each": {label: label for label in LABELS},
    "several tokens": {"warm": "good warm", "cold": "bad"},
    "one goes on where the other ends": {"warm": "good", "cold": "good bad"},
}
RECORDS = Dataset.from_dict({"words": ["red the sky", "blue", "green is bad red"]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_models(tmp_path_factory.mktemp("models"))["llama"]


def task(words: dict[str, str], template: str = TEMPLATE, **changes: int) -> LabelTask:
    return LabelTask(
        kind=TaskType.CAUSAL_LM,
        template=Template(template),
        label_column="label",
        verbalizer=Verbalizer(words),
        **{"max_length": 24, **changes},
    )


def writing(**changes: int) -> TextTask:
    fields = {"max_length": 500, "max_new_tokens": 3, **changes}
    return TextTask(kind=TaskType.CAUSAL_LM, template=Template(TEMPLATE), label_column="label", **fields)


def alone(model: PeftModel, asked: LabelTask, record: dict[str, str], label: str) -> Tensor:
    """The log-probability of a label's tokens, one row, by the public forward."""
    example = asked.encode(record, tokenizer(ends=False), label=label)
    ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
    positions = None if example.prompt_positions is None else torch.tensor([example.prompt_positions])
    with torch.no_grad():
        scores = model(input_ids=ids, labels=labels, prompt_positions=positions).logits[0, :-1].log_softmax(-1)
    wanted = labels[0, 1:]
    return sum(scores[i, w] for i, w in enumerate(wanted.tolist()) if w != -100)


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_labels_are_scored_as_alone(folder: str, kind: str, words: str) -> None:
    model = PeftModel(AutoModelForCausalLM.from_pretrained(folder), ADAPTERS[kind])
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    asked = task(WORDS[words], "{words} {prompt:3}" if kind == "template" else TEMPLATE)
    scores = answer(model, tokenizer(ends=False), asked, RECORDS).scores
    assert scores is not None
    expected = [[float(alone(model, asked, r, label)) for label in asked.verbalizer.labels] for r in RECORDS]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(answer(model, tokenizer(ends=False), asked, RECORDS).scores, scores, atol=1e-3)


def test_a_label_that_another_one_continues_can_win(folder: str) -> None:
    asked = task(WORDS["one goes on where the other ends"])
    example = asked.encode(RECORDS[0], tokenizer(ends=False), label="warm")
    assert example.input_ids[-1] == tokenizer(ends=False).eos_token_id


def test_records_are_cut_to_what_the_model_can_take(folder: str) -> None:
    model = PeftModel(AutoModelForCausalLM.from_pretrained(folder), ADAPTERS["prefix"])  # 64 positions
    assert fitted(task({"a": "good", "b": "bad"}, max_length=500), model).max_length == 61
    assert fitted(writing(), model).max_length == 58
    assert fitted(writing(max_length=20), model).max_length == 20
    assert fitted(task({"a": "good", "b": "bad"}, max_length=500), model, written=11).max_length == 50
    with pytest.raises(ConfigError, match="64 positions, 3 virtual and 61 new tokens leave none"):
        fitted(writing(max_new_tokens=61), model)
    long = Dataset.from_dict({"words": ["red " * 300]})
    answers = answer(model, tokenizer(ends=False), fitted(writing(), model), long)
    assert answers.truncated == 1


def test_scores_that_are_no_numbers_are_no_answers(folder: str) -> None:
    model = PeftModel(AutoModelForCausalLM.from_pretrained(folder), ADAPTERS["prefix"])
    torch.nn.init.constant_(model.prompt_encoder["default"].embedding.weight, float("inf"))
    with pytest.raises(AdapterError, match="the scores are no numbers"):
        answer(model, tokenizer(ends=False), task(WORDS["one token each"]), RECORDS)


def test_the_prompt_of_all_batches_is_computed_once(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model, asked = PeftModel(AutoModelForCausalLM.from_pretrained(folder), config), task(WORDS["one token each"])
    many = Dataset.from_dict({"words": [*RECORDS["words"]] * 15})
    calls = []
    prompt = PromptEncoder.prompt
    monkeypatch.setattr(PromptEncoder, "prompt", lambda module: (calls.append(module), prompt(module))[1])
    before = answer(model, tokenizer(ends=False), asked, many).scores
    assert len(calls) == 1
    for parameter in model.prompt_encoder.parameters():
        parameter.data.mul_(3)  # which autograd does not see
    after = answer(model, tokenizer(ends=False), asked, many).scores
    assert len(calls) == 2
    assert not torch.allclose(after, before)
    assert torch.equal(after, answer(model, tokenizer(ends=False), asked, many).scores)
