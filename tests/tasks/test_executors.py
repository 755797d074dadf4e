"""Requests are executed alike whoever runs them, and records that cannot be are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from softtune import PeftModel
from softtune.data import Template, Verbalizer
from softtune.errors import DataError
from softtune.evaluation.answers import answer, execute
from softtune.evaluation.ensemble import by_mean
from softtune.methods import TaskType
from softtune.tasks import ChoiceTask, LabelTask, Task, TextTask
from softtune.tasks.requests import Generate
from tests.tiny import save_models

TEMPLATE = Template("{x}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"), attention_dropout=0.0)


def labels(**fields: Any) -> LabelTask:
    shared = {"template": TEMPLATE, "label_column": "y", "max_length": 24, "kind": TaskType.CAUSAL_LM}
    return LabelTask(verbalizer=Verbalizer.from_labels(["warm", "cold"]), **{**shared, **fields})


def writer(folder: str) -> tuple[PeftModel, Any]:
    return PeftModel(AutoModelForCausalLM.from_pretrained(folder)), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "task", [labels(), ChoiceTask(template=TEMPLATE, choices="options", label_column="y", max_length=24)]
)
def test_a_record_without_tokens_is_refused(task: Task, models: dict[str, str]) -> None:
    rows = [{"x": text, "options": ["warm", "cold"]} for text in ("red", "", "blue")]
    with pytest.raises(DataError, match="row 2: the text has no tokens; drop the row or add words"):
        answer(*writer(models["llama"]), task, Dataset.from_list(rows))


def test_no_records_have_no_answers(models: dict[str, str]) -> None:
    model = PeftModel(AutoModelForSequenceClassification.from_pretrained(models["bert"]))
    task = labels(kind=TaskType.SEQ_CLS)
    rows = Dataset.from_dict({"x": []})
    answers = answer(model, AutoTokenizer.from_pretrained(models["bert"]), task, rows)
    assert answers.scores is not None
    assert answers.scores.shape == (0, 2)
    assert by_mean(task, [answers, answers]).texts == []


def test_a_head_is_not_calibrated(models: dict[str, str]) -> None:
    model = PeftModel(AutoModelForSequenceClassification.from_pretrained(models["bert"]))
    tokenizer, rows = AutoTokenizer.from_pretrained(models["bert"]), Dataset.from_dict({"x": ["red", "blue sky"]})
    task = labels(kind=TaskType.SEQ_CLS)
    plain, calibrated = (answer(model, tokenizer, one, rows) for one in (task, replace(task, is_calibrated=True)))
    assert torch.equal(plain.scores, calibrated.scores)


def test_texts_of_several_lengths(models: dict[str, str]) -> None:
    model, tokenizer = writer(models["llama"])
    task = TextTask(kind=TaskType.CAUSAL_LM, template=TEMPLATE, label_column="y", max_length=24, max_new_tokens=1)
    prompts = [task.prompt({"x": text}, tokenizer) for text in ("red", "blue", "the sky")]
    requests = [Generate(prompt, length) for prompt, length in zip(prompts, (2, 5, 2), strict=True)]
    done = list[int]()
    together = execute(model.eval(), tokenizer, requests, advance=done.append)
    assert together == [execute(model, tokenizer, [request])[0] for request in requests]
    assert done == sorted(done)
    assert done[-1] == 3


def test_a_text_task_needs_a_length() -> None:
    with pytest.raises(TypeError, match="max_new_tokens"):
        TextTask(kind=TaskType.CAUSAL_LM, template=TEMPLATE, label_column="y", max_length=24)  # type: ignore[call-arg]


def test_no_records_of_a_calibrated_task(models: dict[str, str]) -> None:
    done = list[int]()
    task = labels(is_calibrated=True, template=Template("text : {x} label : "))
    answers = answer(*writer(models["llama"]), task, Dataset.from_dict({"x": []}), advance=done.append)
    assert answers.texts == []
    assert set(done) <= {0}
