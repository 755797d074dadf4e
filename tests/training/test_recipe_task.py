"""Recipes for every kind of task, from a file to answers that are measured, on tiny models."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests.cli.test_cli import run
from tests.tasks.test_spans import pair_tokenizer
from tests.tiny import save_models, tokenizer
from transformers import BertConfig, BertForQuestionAnswering

from softtune import ConfigError, DataError, PeftModel, TrainingError
from softtune.cli.loading import load_trained
from softtune.data import load_records
from softtune.evaluation.answers import Answers, answer, judge
from softtune.methods import TaskType
from softtune.pretrained import load_base_model
from softtune.tasks import ChoiceTask, LabelTask, SpanTask, TagTask, TextTask
from softtune.training.recipe import Recipe
from softtune.training.run import train
from softtune.training.setup import Rows

SENTENCES = [(["the", "sky", "is", "red"], ["O", "B-X", "O", "B-Y"]), (["good", "sky"], ["O", "B-X"])] * 8
QUESTIONS = [
    {"q": "w1", "c": " ".join(f"w{i}" for i in range(5, 29)), "answers": [{"text": "w20", "answer_start": 55}]},
    {"q": "w2", "c": "w30 w31 w32", "answers": [{"text": "w31", "answer_start": 4}]},
    {"q": "w3", "c": "w33 w34", "answers": []},
] * 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    models = save_models(folder)
    words = pair_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(**sizes, vocab_size=len(words), initializer_range=0.3)
    BertForQuestionAnswering(config).save_pretrained(folder / "reader")
    words.save_pretrained(folder / "reader")
    return {**models, "reader": str(folder / "reader")}


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(file)


def recipe(folder: Path, model: str, rows: list[dict[str, Any]], **fields: Any) -> Recipe:
    shared = {"model": model, "train": write(folder / "rows.jsonl", rows), "output": str(folder / "out")}
    options = {"options": {"num_virtual_tokens": 3}, "test_size": 4, "max_length": 24, "batch_size": 4}
    return Recipe.from_fields({**shared, **options, **fields})


def tagging(folder: Path, models: dict[str, str], **fields: Any) -> Recipe:
    rows = [{"tokens": words, "tags": tags} for words, tags in SENTENCES]
    described = {"task": "TOKEN_CLS", "template": "{tokens}", "label_column": "tags", "labels": ["O", "B-X", "B-Y"]}
    return recipe(folder, models["bert"], rows, **{**described, **fields})


def reading(folder: Path, models: dict[str, str], **fields: Any) -> Recipe:
    described = {"task": "QUESTION_ANS", "template": "{q} {c}", "label_column": "answers", "unanswerable": True}
    return recipe(folder, models["reader"], QUESTIONS, **{**described, "max_length": 16, "stride": 4, **fields})


def test_tags_are_learnt(tmp_path: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"method": "P_TUNING_V2", "epochs": 24, "learning_rate": 0.05}
    report = train(tagging(tmp_path, models, **fields))
    assert report.before["f1"] < 0.5
    assert report.after["f1"] == 1.0
    for output in (tmp_path / "a.jsonl", tmp_path / "a.csv"):
        assert run("predict", str(tmp_path / "out"), str(tmp_path / "rows.jsonl"), "--output", str(output)) == 0
        shown = capsys.readouterr().out
        assert "f1" in shown
        assert "O B-X O B-Y" in shown
        answered = load_records(str(output))
        assert answered["answer"] == answered["tags"]


def test_parts_of_a_text_are_learnt(tmp_path: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"method": "P_TUNING_V2", "epochs": 40, "learning_rate": 0.05, "patience": 40, "validation_size": 3}
    report = train(reading(tmp_path, models, **fields, test_size=0))
    assert report.training_rows == 9  # however many parts their contexts have
    assert run("predict", str(tmp_path / "out"), str(tmp_path / "rows.jsonl")) == 0
    shown = capsys.readouterr().out
    assert "exact match │ 100.0%" in shown


def test_texts_are_compared_with_all_references(tmp_path: Path, models: dict[str, str]) -> None:
    rows = [{"x": "red", "y": "the sky"}, {"x": "red", "y": "is good"}, {"x": "blue", "y": "bad"}] * 2
    file = write(tmp_path / "more.jsonl", rows)
    fields = {"template": "{x} label : ", "label_column": "y", "evaluation": file, "max_new_tokens": 4}
    report = train(recipe(tmp_path, models["llama"], rows, **fields, test_size=0))
    assert (report.training_rows, report.evaluation_rows) == (6, 2)
    assert {"bleu", "rouge_l", "chrf", "exact_match", "perplexity"} == report.after.keys()


@pytest.mark.parametrize("fields", [{}, {"patience": 1, "validation_size": 2}])
def test_rows_that_read_alike_stay_together(tmp_path: Path, fields: dict[str, Any]) -> None:
    texts = [" ".join(words) for words in itertools.permutations(["red", "blue", "cold"])]
    file = write(tmp_path / "rows.jsonl", [{"x": x, "y": y} for y in ("bad", "good") for x in texts])
    described = {"model": "", "train": file, "template": "{x} :", "label_column": "y", "output": str(tmp_path / "out")}
    rows = Rows.load(Recipe.from_fields({**described, "test_size": 2, **fields}))
    assert rows.evaluation is not None
    held_out = {*rows.evaluation["x"], *rows.validation["x"]}
    assert len(held_out) == len(rows.evaluation) + len(rows.validation) // 2
    assert sorted([*rows.training["x"]]) == sorted(x for x in texts * 2 if x not in held_out)


@pytest.mark.parametrize(("family", "task"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_perplexity_is_that_of_the_models_own_loss(
    tmp_path: Path, models: dict[str, str], family: str, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the first reference, token by token."""
    rows: list[dict[str, Any]] = [{"x": "red", "y": ["the sky is good", "bad"]}, {"x": "blue blue", "y": ["bad"]}]
    fields = {"template": "{x} label : ", "label_column": "y", "max_new_tokens": 16, "task": task, "test_size": 0}
    asked = recipe(tmp_path, models[family], rows, **fields, epochs=2)
    train(asked)
    trained = load_trained(tmp_path / "out", None)
    records = Dataset.from_list(rows)
    quality = judge(trained.task, records, answer(trained.model, trained.tokenizer, trained.task, records))
    losses, counts = [], []
    for row in rows:
        example = trained.task.encode(row, trained.tokenizer, text=row["y"][0])  # type: ignore[call-arg]
        batch = {"input_ids": torch.tensor([example.input_ids]), "labels": torch.tensor([example.labels])}
        with torch.no_grad():
            losses.append(float(trained.model(**batch).loss))
        counts.append(sum(x != -100 for x in example.labels))
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert quality.metrics["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert list(quality.metrics) == list(trained.task.metrics)
    file = write(tmp_path / "again.jsonl", rows)
    capsys.readouterr()
    assert run("predict", str(tmp_path / "out"), file) == 0
    assert re.search(rf"perplexity +│ {quality.metrics['perplexity']:.2f} \(", capsys.readouterr().out)


def test_perplexity_reads_no_more_of_a_reference_than_may_be_written(tmp_path: Path, models: dict[str, str]) -> None:
    rows = [{"x": "red", "y": "the sky"}, {"x": "blue", "y": "bad"}]
    fields = {"template": "{x} label : ", "label_column": "y", "max_new_tokens": 4, "test_size": 0, "max_length": 12}
    train(recipe(tmp_path, models["llama"], rows, **fields))
    own = load_trained(tmp_path / "out", None)
    long = Dataset.from_list([{"x": "red", "y": "the sky is good " * 20}])
    found = answer(own.model, own.tokenizer, own.task, long)
    assert found.likelihoods is not None
    assert int(found.likelihoods[0, 1]) == 4  # a space, three words and spaces, and no end
    whole = Dataset.from_list([{"x": "red", "y": "the sky"}])
    likelihoods = answer(own.model, own.tokenizer, own.task, whole).likelihoods
    assert likelihoods is not None
    assert int(likelihoods[0, 1]) == 5  # with the end
    for labels in ({}, {"y": None}):
        records = Dataset.from_list([{"x": "red", **labels}])
        assert answer(own.model, own.tokenizer, own.task, records).likelihoods is None


def test_choices_are_made(tmp_path: Path, models: dict[str, str]) -> None:
    rows = [
        {"x": "red", "options": ["warm", "cold"], "y": "warm"},
        {"x": "blue", "options": ["the sky", "bad"], "y": "bad"},
    ]
    fields = {"template": "{x} : ", "label_column": "y", "choices": "options", "epochs": 12, "learning_rate": 0.1}
    report = train(recipe(tmp_path, models["llama"], rows * 8, **fields))
    assert report.after["accuracy"] == 1.0


@pytest.mark.parametrize("kind", ["choices", "tags", "spans"])
def test_answers_that_are_no_numbers_are_refused(tmp_path: Path, models: dict[str, str], kind: str) -> None:
    rows = [{"x": "red", "options": ["warm", "cold"], "y": y} for y in ("warm", "cold")] * 4
    choosing = {"template": "{x} : ", "label_column": "y", "choices": "options"}
    wild = {"method": "BITFIT", "learning_rate": 1e30, "max_grad_norm": 1e9, "warmup_steps": 0, "epochs": 0.1}
    wild["options"] = {"add_missing": True}
    own = {
        "choices": lambda: recipe(tmp_path, models["llama"], rows, **choosing, **wild),
        "tags": lambda: tagging(tmp_path, models, **wild),
        "spans": lambda: reading(tmp_path, models, **wild),
    }
    with pytest.raises(TrainingError, match=r"no numbers|made of numbers"):
        train(own[kind]())


def test_a_content_free_record_calibrates(tmp_path: Path, models: dict[str, str]) -> None:
    fields = {"template": "{x} label : ", "label_column": "y", "labels": ["warm", "cold"]}
    rows = [{"x": "red", "y": "warm"}, {"x": "N/A", "y": "cold"}]
    plain, calibrated = (recipe(tmp_path, models["llama"], rows, **fields, calibrate=on) for on in (False, True))
    base, _ = load_base_model(models["llama"])
    model = PeftModel(base, plain.config())
    scores, own = (
        answer(model, tokenizer(ends=False), r.definition, Dataset.from_list(rows)).scores for r in (plain, calibrated)
    )
    torch.testing.assert_close(own, scores - scores[1])
    torch.testing.assert_close(own[1], torch.zeros(2))


def test_few_shots_are_as_many_of_each_label(tmp_path: Path, models: dict[str, str]) -> None:
    rows = [{"x": "red", "y": "warm"}] * 9 + [{"x": "blue", "y": "cold"}] * 4
    fields = {"template": "{x}", "label_column": "y", "labels": ["warm", "cold"], "test_size": 0}
    assert train(recipe(tmp_path, models["llama"], rows, **fields, shots=3)).training_rows == 6
    with pytest.raises(DataError, match="too few rows to sample by 'y'"):
        train(recipe(tmp_path, models["llama"], rows, **fields, shots=5, output=str(tmp_path / "other")))


def test_a_sample_is_evaluated(tmp_path: Path, models: dict[str, str]) -> None:
    report = train(tagging(tmp_path, models, evaluation_examples=3))
    assert report.evaluation_rows == 3
    with pytest.raises(DataError, match="evaluation_examples is 5 and there are 4 rows"):
        train(tagging(tmp_path, models, evaluation_examples=5, output=str(tmp_path / "other")))


def test_kinds_are_told_apart(tmp_path: Path, models: dict[str, str]) -> None:
    shared = {"model": "m", "train": "t.csv", "template": "{x}", "label_column": "y", "output": "o"}
    kinds: dict[type, dict[str, Any]] = {
        TextTask: {},
        LabelTask: {"labels": ["a", "b"]},
        ChoiceTask: {"choices": "c"},
        TagTask: {"task": "TOKEN_CLS", "labels": ["O"]},
        SpanTask: {"task": "QUESTION_ANS", "template": "{q} {c}"},
    }
    for kind, fields in kinds.items():
        assert type(Recipe.from_fields({**shared, **fields}).definition) is kind


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "TOKEN_CLS"}, "TOKEN_CLS needs labels"),
        ({"task": "TOKEN_CLS", "labels": {"O": "none"}}, "TOKEN_CLS has no words for its labels"),
        ({"task": "TOKEN_CLS", "labels": ["O"], "template": "words: {x}"}, r"write a template such as '{tokens}'"),
        ({"task": "QUESTION_ANS"}, r"write a template such as '{question} {context}'"),
        ({"task": "QUESTION_ANS", "template": "{q} {c}", "labels": ["a"]}, "drop labels"),
        ({"choices": "c", "labels": ["a"]}, "choices are for a decoder that writes one"),
        ({"choices": "c", "task": "SEQ_2_SEQ_LM"}, "choices are for a decoder that writes one"),
        ({"calibrate": True}, "calibrate is for labels that a language model writes"),
        ({"calibrate": True, "labels": ["a"], "task": "SEQ_CLS"}, "calibrate is for labels"),
        ({"shots": 3}, "shots samples rows of each label"),
        ({"shots": 3, "examples": 6, "labels": ["a"]}, "shots samples rows of each label: drop examples"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    shared = {"model": "m", "train": "t.csv", "template": "{x}", "label_column": "y", "output": "o"}
    with pytest.raises(ConfigError, match=message):
        Recipe.from_fields({**shared, **fields})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["sky"], "tags": ["B-Z"]}, r"rows\.jsonl: row 17: tag 'B-Z' is not one of O, B-X, B-Y"),
        ({"tokens": ["sky"], "tags": None}, r"row 17: column 'tags' holds no list"),
    ],
)
def test_a_row_that_does_not_fit_is_named(
    tmp_path: Path, models: dict[str, str], row: dict[str, Any], message: str
) -> None:
    asked = tagging(tmp_path, models)
    with Path(asked.train).open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(row))
    with pytest.raises(DataError, match=message):
        train(asked)


def test_right_answers_are_perfect(tmp_path: Path, models: dict[str, str]) -> None:
    for asked, rows in ((tagging(tmp_path, models), SENTENCES), (reading(tmp_path, models), QUESTIONS)):
        records = Dataset.from_list([r if isinstance(r, dict) else {"tokens": r[0], "tags": r[1]} for r in rows])
        right = [asked.definition.reference(record) for record in records]
        texts = [tuple(r) if asked.task is TaskType.TOKEN_CLS else next((a.text for a in r), "") for r in right]
        quality = judge(asked.definition, records, Answers(texts, None, 0))
        assert set(quality.metrics.values()) == {1.0}
        assert tuple(quality.metrics) == asked.definition.metrics
        assert quality.mistakes == []
