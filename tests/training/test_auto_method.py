"""``method: auto``: what it chooses, what it says, and what stays as the recipe has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tiny import write_rows

from softtune.errors import ConfigError
from softtune.methods import PeftType, TaskType
from softtune.training import auto_method
from softtune.training.auto_method import MeasuredTask, measured_tasks, nearest
from softtune.training.recipe import Recipe
from softtune.training.run import train

PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}
BOTH: dict[str, Any] = {
    "method": "COMBINED",
    "options": {"parts": [PREFIX, {"peft_type": "IA3"}]},
    "learning_rate": 0.03,
}
FEW: dict[str, Any] = {"method": "PREFIX_TUNING", "options": {}, "start": "examples", "learning_rate": 1e-3}


def measured(title: str, task: TaskType, rows: int, fields: dict[str, Any], *, writes: bool = False) -> MeasuredTask:
    return MeasuredTask(
        title=title,
        task=task,
        writes=writes,
        rows=rows,
        model="m",
        fields=fields,
        from_text=False,
        metric="accuracy",
        value=0.9,
        seeds=3,
    )


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = (
        measured("few reviews", TaskType.CAUSAL_LM, 4, FEW),
        measured("reviews", TaskType.CAUSAL_LM, 1000, BOTH),
        measured("tables", TaskType.CAUSAL_LM, 20, {**BOTH, "method": "BITFIT", "options": {}}, writes=True),
        measured("tags", TaskType.TOKEN_CLS, 20, {**BOTH, "method": "IA3", "options": {}}),
    )
    monkeypatch.setattr(auto_method, "measured_tasks", lambda: entries)


def of(fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**fields, "method": "auto", "options": {}, "learning_rate": None, **changes}


@pytest.mark.parametrize(
    ("task", "rows", "writes", "title"),
    [
        (TaskType.CAUSAL_LM, 20, False, "few reviews"),
        (TaskType.CAUSAL_LM, 100, False, "reviews"),
        (TaskType.CAUSAL_LM, 10**6, True, "tables"),
        (TaskType.TOKEN_CLS, 10**6, False, "tags"),
        (TaskType.SEQ_CLS, 500, False, "tags"),
        (TaskType.SEQ_2_SEQ_LM, 500, True, "tables"),
    ],
)
def test_nearest_is_a_task_of_the_kind_with_as_many_rows(
    table: None, task: TaskType, rows: int, writes: bool, title: str
) -> None:
    assert nearest(task, rows, writes=writes).title == title


@pytest.mark.filterwarnings("ignore:the 18 examples have")
def test_all_is_chosen_and_said_in_one_line(table: None, fields: dict[str, Any]) -> None:
    """Of a recipe of 18 rows."""
    line = (
        r"^method auto: PREFIX_TUNING from examples at learning rate 0.001, which did best on few reviews \(accuracy "
        r"0.900, 4 rows, m, seeds: 3\), the measured task nearest to this one of 18 rows$"
    )
    with pytest.warns(UserWarning, match=line):
        recipe = Recipe.from_fields(of(fields))
    assert (recipe.method, recipe.options, recipe.start) == (PeftType.PREFIX_TUNING, {}, "examples")
    assert recipe.learning_rate == 1e-3
    report = train(recipe)
    assert report.after.keys() >= {"accuracy"}
    assert Recipe.from_adapter(recipe.output).method is PeftType.PREFIX_TUNING


def test_a_task_of_another_kind_is_said(table: None, fields: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="method auto: IA3 .* of 18 rows, though of another kind$"):
        recipe = Recipe.from_fields(of(fields, task="SEQ_CLS"))
    assert recipe.method is PeftType.IA3


@pytest.mark.filterwarnings("ignore:method auto")
def test_a_text_to_start_from_goes_to_prefixes_alone(
    table: None, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {"init_text": "cold or warm"}
    recipe = Recipe.from_fields(of(fields, options=text))
    assert (recipe.options, recipe.start, recipe.learning_rate) == (text, None, None)
    monkeypatch.setattr(auto_method, "nearest", lambda *_, **__: measured("all", TaskType.CAUSAL_LM, 1, BOTH))
    recipe = Recipe.from_fields(of(fields, options=text))
    assert recipe.options == {"parts": [{**PREFIX, **text}, {"peft_type": "IA3"}]}
    assert BOTH["options"]["parts"][0] == PREFIX
    others = {**BOTH, "method": "BITFIT", "options": {}}
    monkeypatch.setattr(auto_method, "nearest", lambda *_, **__: measured("all", TaskType.CAUSAL_LM, 1, others))
    with pytest.warns(UserWarning, match="; it has no use for init_text$"):
        assert Recipe.from_fields(of(fields, options=text)).options == {}


def test_a_text_that_is_missing_is_asked_for(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    entry = measured("reviews", TaskType.CAUSAL_LM, 9, BOTH)._replace(from_text=True)
    monkeypatch.setattr(auto_method, "measured_tasks", lambda: (entry,))
    with pytest.warns(UserWarning, match="there it started from a text, give yours by options: {init_text: ...}$"):
        Recipe.from_fields(of(fields))
    with pytest.warns(UserWarning, match="this one of 18 rows$"):
        Recipe.from_fields(of(fields, options={"init_text": "cold or warm"}))


@pytest.mark.filterwarnings("ignore:method auto")
def test_a_learning_rate_of_the_recipe_stays(table: None, fields: dict[str, Any]) -> None:
    assert Recipe.from_fields(of(fields, learning_rate=0.5)).learning_rate == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"num_virtual_tokens": 3}}, "method: auto chooses num_virtual_tokens: drop it, or name a method"),
        ({"start": "method"}, "method: auto chooses start: drop it, or name a method; init_text may stay"),
        ({"leave_one_out": False}, "method: auto chooses leave_one_out: drop it"),
        ({"options": 3}, "recipe: options is 3"),
        ({"labels": None, "template": "x"}, "the template names no column"),
    ],
)
def test_what_auto_chooses_is_not_given(
    table: None, fields: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.from_fields(of(fields, **changes))


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, 18),
        ({"test_size": 0.25}, 18),
        ({"test_size": 0}, 24),
        ({"examples": 10}, 10),
        ({"examples": 100}, 18),
        ({"shots": 3}, 6),
        ({"shots": 3, "labels": {"warm": "hot", "cold": "cool"}}, 6),
        ({"train": ["rows.csv", "rows.csv"]}, 42),
        ({"evaluation": "others.csv"}, 24),
    ],
)
def test_rows_are_those_that_are_trained_on(
    table: None, fields: dict[str, Any], tmp_path: Path, changes: dict[str, Any], rows: int
) -> None:
    write_rows(tmp_path / "others.csv", 6)
    if "train" in changes:
        changes = {"train": [str(tmp_path / name) for name in changes["train"]]}
    if "evaluation" in changes:
        del fields["test_size"]
        changes = {"evaluation": str(tmp_path / "others.csv")}
    with pytest.warns(UserWarning, match=f"this one of {rows} rows"):
        Recipe.from_fields(of(fields, **changes))


def test_any_case_names_it(table: None, fields: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="method auto"):
        assert Recipe.from_fields(of(fields, method="AUTO")).method is PeftType.PREFIX_TUNING


@pytest.mark.parametrize("entry", measured_tasks(), ids=lambda entry: entry.title)
def test_the_table_has_recipes(entry: MeasuredTask, fields: dict[str, Any]) -> None:
    labels = ["O", "B-A"] if entry.task is TaskType.TOKEN_CLS else fields["labels"]
    asked = {"options": {}, "task": entry.task, "labels": None if entry.writes else labels, "template": "{words}"}
    recipe = Recipe.from_fields({**fields, **asked, **entry.fields})
    assert recipe.peak_learning_rate == entry.fields["learning_rate"]
