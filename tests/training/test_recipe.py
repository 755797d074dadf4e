"""Recipes: their defaults, and one line for everything that is wrong with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from softtune import CheckpointError, ConfigError, PrefixTuningConfig
from softtune.methods.base import config_class_of
from softtune.tasks import TextTask
from softtune.training.recipe import Recipe

FIELDS: dict[str, Any] = {
    "model": "smollm2-135m",
    "train": "rows.csv",
    "template": "{text} : ",
    "label_column": "label",
    "output": "out",
}


def test_defaults() -> None:
    recipe = Recipe.from_fields(FIELDS)
    assert recipe.peak_learning_rate == config_class_of(recipe.method).learning_rate
    assert recipe.config() == PrefixTuningConfig(task_type="CAUSAL_LM")
    assert isinstance(recipe.definition, TextTask)
    assert recipe.num_labels is None


def test_biases_learn_faster_beside_a_head() -> None:
    beside = {"task": "SEQ_CLS", "labels": ["a", "b"]}
    rates = [Recipe.from_fields({**FIELDS, "method": "BITFIT", **own}).peak_learning_rate for own in ({}, beside)]
    assert rates == [3e-4, 1e-3]


def test_a_saved_recipe_is_the_same_when_it_is_read(tmp_path: Path) -> None:
    recipe = Recipe.from_fields({**FIELDS, "labels": {"0": "no", "1": "yes"}, "options": {"num_virtual_tokens": 7}})
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.from_adapter(tmp_path) == recipe


@pytest.mark.parametrize("task", [{}, {"labels": ["a"]}, {"task": "QUESTION_ANS", "template": "{q} {c}", "stride": 9}])
def test_a_saved_recipe_with_fields_that_do_nothing_can_be_read(tmp_path: Path, task: dict[str, Any]) -> None:
    """It has all fields, and nobody asked for what they are by default. To hold out nothing, or to switch patience off,
    contradicts nothing either."""
    for fields in ({}, {"test_size": 0}, {"patience": None, "validation_size": 4}):
        recipe = Recipe.from_fields({**FIELDS, "evaluation": "more.csv", **task, **fields})
        recipe.save(tmp_path / "recipe.yaml")
        assert Recipe.from_adapter(tmp_path) == recipe


def test_every_field_says_what_it_is_for() -> None:
    assert all(field.description for field in Recipe.model_fields.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lerning_rate": 1}, "lerning_rate: no such field: use learning_rate$"),
        ({"num_virtual_tokens": 3}, "num_virtual_tokens: no such field: put it into options$"),
        ({"peft_type": "P_TUNING"}, "peft_type: no such field: set method instead$"),
        ({"xyz": 1}, "xyz: no such field: use one of model, task"),
        ({"learning_rate": -1}, "learning_rate is -1: it should be greater than 0"),
        ({"batch_size": "many"}, "batch_size is 'many': it should be a valid integer"),
        ({"train": None}, "train is None: name a file or a hub data set"),
        ({"method": "LORA"}, "method is 'LORA': it should be .*PREFIX_TUNING"),
        ({"options": {"num_virtual_tokens": 0}}, "num_virtual_tokens = 0.*greater than or equal to 1"),
        ({"options": {"num_virtual_token": 3}}, "did you mean num_virtual_tokens"),
        ({"task": "SEQ_CLS"}, "SEQ_CLS needs labels"),
        ({"task": "NER"}, "task is 'NER': use one of CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, QUESTION_ANS$"),
        ({"task": "FEATURE_EXTRACTION"}, "task is 'FEATURE_EXTRACTION': use one of CAUSAL_LM, .*QUESTION_ANS$"),
        ({"shares": {"a": 1.0}}, "shares needs examples"),
        (
            {"template": "{prompt:3} {text}", "method": "P_TUNING", "options": {"num_virtual_tokens": 4}},
            "places for 3 virtual tokens",
        ),
        ({"shares": {}, "examples": 8}, r"shares is {}: name each label's share"),
        ({"labels": ["no", "yes", "no"]}, "labels has 'no' more than once"),
        ({"options": {"task_type": "SEQ_CLS"}}, "options has task_type: set task"),
        ({"options": {"revision": "v2"}}, "options has revision: drop it"),
        ({"options": {"base_model_name_or_path": "gpt2"}}, "options has base_model_name_or_path: set model"),
        (
            {"template": "{prompt:3} {text}", "method": "PROMPT_TUNING", "options": {"placement": "suffix"}},
            "the template says where virtual tokens stand",
        ),
        ({"evaluation": "more.csv", "test_size": 0.3}, "test_size holds rows out where there is no evaluation"),
        ({"evaluation": "rows.csv"}, "evaluation names rows that are trained on"),
        ({"evaluation_split": "dev"}, "evaluation_split needs evaluation: name the data set there too"),
        ({"evaluation_examples": 8, "test_size": 0}, "evaluation_examples needs rows to evaluate on: set evaluation"),
        ({"validation_size": 0.2}, "validation_size holds rows out for patience: set patience, or drop it"),
        ({"stride": 8}, "stride is for QUESTION_ANS: drop it"),
        ({"unanswerable": True}, "unanswerable is for QUESTION_ANS: drop it"),
        ({"max_new_tokens": 8, "labels": ["a"]}, "max_new_tokens is for texts that a language model writes: drop it"),
        ({"max_new_tokens": 8, "choices": "c"}, "max_new_tokens is for texts that a language model writes: drop it"),
        ({"template": "{text"}, "stray"),
        ({"template": "text : "}, "the template names no column, so that all records read alike: write one, such as"),
        ({"template": "{prompt:3} : ", "method": "P_TUNING"}, "the template names no column"),
        ({"compile": True, "trunk_cache": 10}, "compile does not go with the trunk cache"),
        ({"ensemble": 0}, "ensemble"),
        ({"patience": 0}, "patience"),
        ({"template": "{prompt:3} {text}"}, "only PROMPT_TUNING and P_TUNING"),
        ({"labels": [True, False]}, r"labels is \[True, False\]: list texts, .* with quotes around numbers, yes, no"),
        ({"labels": {0: "no", 1: "yes"}}, "labels is {0: 'no', 1: 'yes'}: .*with quotes around numbers"),
        ({"report_to": "wandb"}, r"report_to is 'wandb': list .* such as \[tensorboard\]"),
        ({"validation_size": 1.0}, "validation_size is 1.0: name a number of rows of 1 or more, or a share of them"),
        ({"test_size": 1.5}, "test_size is 1.5: name a number of rows, or a share of them below 1"),
        ({"test_size": -1}, "test_size is -1: name a number of rows"),
        ({"seed": -1}, "seed is -1: it should be greater than or equal to 0"),
        ({"seed": 2**32}, "seed is 4294967296: it should be less than 4294967296"),
        ({"seed": 2**32 - 2, "ensemble": 3}, r"seed is 4294967294: leave 3 seeds below 2\*\*32 for the ensemble"),
        ({"epochs": float("inf")}, "epochs is inf: it should be a finite number"),
        ({"epochs": 1e308}, "epochs is 1e.308: it should be less than or equal to"),
        ({"batch_size": 10**20}, "batch_size is 10*: it should be less than or equal to"),
        ({"warmup_steps": float("inf")}, "warmup_steps is inf: it should be a finite number"),
        ({"learning_rate": float("inf")}, "learning_rate is inf: it should be a finite number"),
        ({"weight_decay": float("nan")}, "weight_decay is nan: it should be"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe.from_fields({**FIELDS, **change})
    assert "\n" not in str(caught.value)


def test_a_field_that_is_missing() -> None:
    with pytest.raises(ConfigError, match="recipe: output is missing: add it"):
        Recipe.from_fields({name: value for name, value in FIELDS.items() if name != "output"})


def test_a_members_recipe_has_its_own_seed_and_the_rows_of_the_ensemble() -> None:
    for changes, rows_seed in (({}, 3), ({"data_seed": 9}, 9)):
        ensemble = Recipe.from_fields({**FIELDS, "seed": 3, "ensemble": 4, **changes})
        member = ensemble.member(2, Path("out/3"))
        assert (member.seed, member.ensemble, member.output) == (5, 1, "out/3")
        assert member.rows_seed == ensemble.rows_seed == rows_seed


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "no YAML"), ("- a", "holds no fields"), ("", "holds no fields")]
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe.load(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe at"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(CheckpointError, match=r"has no recipe.yaml"):
        Recipe.from_adapter(tmp_path)


def test_choices_may_differ_where_the_template_does_not() -> None:
    assert Recipe.from_fields({**FIELDS, "template": "Which is right? ", "choices": "c"}).definition.columns == ("c",)


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_the_project_has_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_recipes_of_the_project_are_valid(path: Path) -> None:
    assert Recipe.load(path).model_dump().keys() >= yaml.safe_load(path.read_text()).keys()
