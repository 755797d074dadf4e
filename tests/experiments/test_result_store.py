"""The files of an experiment: their names, what they hold, and which of them spare a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from softtune import ConfigError
from softtune.experiments.outcomes import Entry, Outcome
from softtune.experiments.result_store import ResultStore

NUMBERS: dict[str, Any] = {"trained": 1, "total": 2, "stored": 4, "seconds": 1.5, "memory": 1, "steps": 3}
OUTCOME = Outcome(metrics={"f1": 0.5}, training_rows=8, evaluation_rows=4, **NUMBERS)
CONFIGURATION = {"entry": "lora", "seeds": 1, "recipe": {"epochs": 1.0}, "rows": {"training": "a"}}


def test_a_file_has_the_number_the_configuration_and_the_entries_of_a_case(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.save("lora", 3, CONFIGURATION, [Entry(name="lora", at={"b": 1, "a": "x"}, outcomes=[OUTCOME])])
    outcome = {"metrics": {"f1": 0.5}, **NUMBERS, "training_rows": 8, "evaluation_rows": 4}
    entry = {"name": "lora", "at": {"b": 1, "a": "x"}, "outcomes": [outcome], "failure": "", "failed_by": ""}
    content = {"number": 3, "asked": CONFIGURATION, "entries": [entry]}
    [file] = (tmp_path / "entries").iterdir()
    assert (file.name, file.read_text(encoding="utf-8")) == ("lora.json", json.dumps(content, indent=2) + "\n")
    assert store.configurations() == [CONFIGURATION]


def test_entries_are_in_the_order_of_the_cases(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "new")
    assert store.entries() == []
    for number, name in ((2, "a"), (0, "c"), (1, "b")):
        store.save(name, number, {}, [Entry(name=name, outcomes=[OUTCOME])])
    assert [entry.name for entry in store.entries()] == ["c", "b", "a"]


def test_a_failure_that_can_be_fixed_is_no_final_result(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    failures = {"old": "", "fixable": "ConfigError", "diverged": "TrainingError"}
    for number, (name, failed_by) in enumerate(failures.items()):
        store.save(name, number, {}, [Entry(name=name, outcomes=[], failure="it has failed", failed_by=failed_by)])
    assert [store.final_results(name, {}) is not None for name in (*failures, "never ran")] == [
        False,
        False,
        True,
        False,
    ]
    assert [entry.failure for entry in store.results("old")] == ["it has failed"]
    store.drop_failures()
    assert [entry.name for entry in store.entries()] == ["diverged"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 2}, "differs in its seeds, 1 then and 2 now: name another output, or delete it"),
        ({"recipe": {"epochs": 2.0}}, r"differs in its epochs, 1\.0 then and 2\.0 now"),
        ({"rows": {"training": "b"}}, "the data is not what .* came of: restore it, or name another output"),
    ],
)
def test_results_of_another_configuration_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    store = ResultStore(tmp_path)
    store.save("lora", 0, CONFIGURATION, [Entry(name="lora", outcomes=[OUTCOME])])
    assert store.final_results("lora", CONFIGURATION) == store.entries()
    with pytest.raises(ConfigError, match=message):
        store.final_results("lora", {**CONFIGURATION, **change})


def test_results_of_recipes_that_lacked_a_field_have_its_default(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.save("lora", 0, CONFIGURATION, [Entry(name="lora", outcomes=[OUTCOME])])
    now = {"epochs": 1.0, "gradient_accumulation_steps": 1, "optim": None, "dtype": "auto"}
    assert store.final_results("lora", {**CONFIGURATION, "recipe": now}) == store.entries()
    with pytest.raises(ConfigError, match="differs in its gradient_accumulation_steps, 1 then and 2 now"):
        store.final_results("lora", {**CONFIGURATION, "recipe": {**now, "gradient_accumulation_steps": 2}})


def test_any_name_is_a_file_of_its_own(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    names = ["a, b", "a_b", "a/b", "x" * 61, "x" * 62, "../up"]
    for number, name in enumerate(names):
        store.save(name, number, {}, [Entry(name=name, outcomes=[OUTCOME])])
    assert [entry.name for entry in store.entries()] == names
    assert len({store.run_folder(name, 0) for name in names}) == len(names)
    assert store.run_folder("a_b", 0) == tmp_path / "a_b-1"
    assert store.run_folder("a, b", 1) == tmp_path / "a_b-4a479db6-2"


def test_results_from_before_a_field_was_there_have_its_default(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.save(
        "lora",
        0,
        {"recipe": {"epochs": 1.0}},
        [Entry(name="lora", at={}, outcomes=[], failure="x", failed_by="TrainingError")],
    )
    defaults = {"dtype": "auto", "quantization": None}
    assert store.final_results("lora", {"recipe": {"epochs": 1.0, **defaults}})
    with pytest.raises(ConfigError, match="differs in its dtype, 'auto' then and 'bfloat16' now"):
        store.final_results("lora", {"recipe": {"epochs": 1.0, **defaults, "dtype": "bfloat16"}})
