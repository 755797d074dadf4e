"""The studies say which hardware and commit each of their entries comes from."""

from __future__ import annotations

import json
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from softtune.experiments.cases import Case
from softtune.experiments.outcomes import Entry, Outcome
from softtune.experiments.page import Page
from softtune.experiments.result_store import ResultStore
from softtune.experiments.sweep import Sweep, _case
from softtune.training.recipe import Recipe
from tests.cli.test_cli import write_recipe
from tests.tiny import save_models

NUMBERS: dict[str, Any] = {"trained": 10, "total": 1000, "stored": 40, "seconds": 2.0, "memory": 10**9, "steps": 3}


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return import_module("studies")


def keep(folder: Path, name: str, accuracy: float) -> None:
    own = Outcome(metrics={"accuracy": accuracy}, training_rows=8, evaluation_rows=4, **NUMBERS)
    ResultStore(folder).save(name, 0, {}, [Entry(name=name, outcomes=[own])])


def test_only_what_ran_now_has_the_present_commit(
    studies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(commit: str, **entries: float) -> None:
        monkeypatch.setattr(studies.timing, "_commit", lambda: commit)
        with studies.stamping(tmp_path):
            for name, accuracy in entries.items():
                keep(tmp_path, name, accuracy)

    def found() -> list[tuple[str, list[str]]]:
        return [(run["commit"], sorted(run["entries"])) for run in studies.stamps(tmp_path)]

    runs("one", a=0.5, b=0.5)
    monkeypatch.setattr(studies.timing, "_commit", lambda: "two")
    with suppress(KeyboardInterrupt), studies.stamping(tmp_path):
        keep(tmp_path, "c", 0.5)
        raise KeyboardInterrupt
    runs("three")
    assert found() == [("one", ["a", "b"]), ("two", ["c"])]
    runs("four", b=0.6)
    assert found() == [("one", ["a"]), ("two", ["c"]), ("four", ["b"])]
    notes = studies.signed(Page(title=""), "name", {"runs": studies.stamps(tmp_path), "entries": []}).notes
    assert ["(a)" in notes[0], "commit four" in notes[2]] == [True, True]


def test_results_of_before_are_read(studies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    for file in (studies.ROOT / "docs" / "results").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
        studies.write(file.stem)
        assert "commit " in (tmp_path / file.stem / "README.md").read_text(encoding="utf-8")


def test_the_studies_of_the_project_are_valid(studies: Any) -> None:
    for file in studies.STUDIES.glob("*.yaml"):
        asked = Sweep.load(file)
        assert [_case(asked, Recipe.load(asked.recipe), 0, point) for point in asked.points]
    for name, (_, entries, fields) in studies.HEADLINES.items():
        recipe = Recipe.load(studies.ROOT / "recipes" / f"{name}.yaml", fields).model_dump(exclude_unset=True)
        assert [Case.from_fields(recipe, entry, {}, name=entry, number=0, seeds=1) for entry in entries]
        assert studies.RATES.get(name, {}).keys() <= {*entries}


def test_runs_are_in_the_repository_wherever_one_stands(studies: Any) -> None:
    assert studies.RUNS.is_absolute()


def test_the_study_of_biases_shows_how_they_have_changed(
    studies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_models(tmp_path)["llama"]
    recipe = write_recipe(tmp_path / "recipe.yaml", base, tmp_path / "unused", method="BITFIT")
    over = {"trained": {"query": {"options.roles": ["query"]}, "all": {}}}
    (tmp_path / "biases.yaml").write_text(yaml.safe_dump({"recipe": recipe, "over": over}))
    for name in ("STUDIES", "RESULTS", "RUNS"):
        monkeypatch.setattr(studies, name, tmp_path / ("" if name == "STUDIES" else name))
    studies.run("biases")
    studies.write("biases")
    page = (tmp_path / "RESULTS" / "biases" / "README.md").read_text(encoding="utf-8")
    assert "(mean_absolute_change_of_the_biases.svg)" in page
    kept = json.loads((tmp_path / "RESULTS" / "biases.json").read_text(encoding="utf-8"))
    assert list(kept["bias_changes"]["query"]) == ["0", "1"]
    assert len(kept["bias_changes"]) > 1
