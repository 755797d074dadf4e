"""What a run resulted in is in its folder and on its model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tests.tiny import write_rows
from tests.training.test_run import interrupt_at
from transformers import AutoModelForCausalLM

from softtune import PeftModel
from softtune.data.sources import is_hub_data_set
from softtune.training.recipe import Recipe
from softtune.training.run import train


def metrics(folder: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "metrics.json").read_text())
    return found


def test_metrics_are_kept(fields: dict[str, Any]) -> None:
    own = {"eval_steps": 3, "metric_for_best_model": "accuracy", "validation_size": 4, "max_steps": 6}
    report = train(Recipe.from_fields({**fields, **own}))
    found = metrics(report.folder)
    assert (found["before"], found["after"]) == (report.before, report.after)
    assert found["classes"].keys() == {"warm", "cold"}
    assert found["rows"] == {"training": 14, "validation": 4, "evaluation": 6}
    assert (found["steps"], found["best_by"], found["best_steps"]) == (6, "accuracy", report.best_steps)
    assert found["seconds"] == report.seconds
    validation = found["validation"]["default"]
    assert [entry["step"] for entry in validation] == [3, 6]
    assert all(entry.keys() >= {"validation_loss", "validation_accuracy"} for entry in validation)


def test_an_unfinished_run_has_none(fields: dict[str, Any]) -> None:
    recipe = Recipe.from_fields(fields)
    train(recipe, progress=interrupt_at(3))
    assert not Path(recipe.output, "metrics.json").exists()


def test_the_card_has_what_the_hub_shows(fields: dict[str, Any], tmp_path: Path) -> None:
    own = {"evaluation": write_rows(tmp_path / "more.csv", 6), "test_size": 0}
    report = train(Recipe.from_fields({**fields, **own}))
    card = ModelCard.load(report.folder / "README.md")
    assert card.data.model_name == "adapter"
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {
        name.replace("_", " "): round(value, 4) for name, value in report.after.items()
    }
    first = card.data.eval_results[0]
    assert (first.task_type, first.dataset_name, first.metric_type) == ("text-classification", "more.csv", "accuracy")
    assert f"| accuracy | {report.before['accuracy']:.1%} | {report.after['accuracy']:.1%} |" in card.text
    assert str(tmp_path) not in card.content.partition("Base model:")[0]
    base = AutoModelForCausalLM.from_pretrained(fields["model"])
    PeftModel.from_pretrained(base, report.folder).save_pretrained(report.folder)
    again = ModelCard.load(report.folder / "README.md")
    assert again.text == card.text
    assert again.data.eval_results == card.data.eval_results


def test_without_evaluation_there_are_no_results_to_show(fields: dict[str, Any]) -> None:
    report = train(Recipe.from_fields({**fields, "evaluation": None, "test_size": 0, "epochs": 1}))
    assert metrics(report.folder)["after"] == {}
    assert "model-index" not in (report.folder / "README.md").read_text()


def test_members_have_a_card_each(fields: dict[str, Any]) -> None:
    report = train(Recipe.from_fields({**fields, "ensemble": 2, "epochs": 1}))
    found = metrics(report.folder)
    assert (found["members"], found["vote"]) == (report.evaluation.members, report.evaluation.vote)
    for name, member in zip("12", report.evaluation.members, strict=True):
        card = ModelCard.load(report.folder / name / "README.md")
        assert card.data.eval_results[0].metric_value == round(member["accuracy"], 4)


@pytest.mark.parametrize(
    ("source", "expected"),
    [("glue", True), ("stanfordnlp/sst2", True), ("rows.csv", False), ("zip://a.csv::b.zip", False), ("a/b/c", False)],
)
def test_data_sets_of_the_hub(source: str, expected: bool) -> None:
    assert is_hub_data_set(source) is expected
