"""What benchmarks of few examples and few steps say of their runs."""

from __future__ import annotations

from argparse import Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from softtune.training.recipe import Recipe
from tests.tiny import recipe_fields, save_models

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STAMP = {"hardware": {}, "commit": "abc"}


@pytest.fixture
def few_shot(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module("few_shot")


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = import_module("few_steps")
    monkeypatch.setattr(module.timing, "stamp", lambda: STAMP)
    monkeypatch.setattr(module.steps, "STEPS", 2)
    monkeypatch.setattr(module, "VIRTUAL_TOKENS", 3)
    return module


def lines(measures: list[dict[str, Any]]) -> dict[str, tuple[float, bool | None]]:
    return {line["measure"]: (line["value"], line["holds"]) for line in measures}


def test_few_shot_runs_each_task_start_and_seed_once(
    few_shot: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def measured(fields: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
        asked.append(fields)
        after = {"examples": 0.9, "words": 0.8, "random": 0.87}[about["start"]]
        return {**about, "before": 0.84 if about["start"] == "examples" else 0.5, "after": after}

    def fields_of(task: str, *_: Any) -> dict[str, Any]:
        return {"labels": ["a", "b"] if task != "clinc" else [*"abcdefgh"]}

    monkeypatch.setattr(few_shot, "measured", measured)
    monkeypatch.setattr(few_shot, "fields_of", fields_of)
    given = Namespace(data=tmp_path, examples=32, steps=60, rows=200, seeds=2)
    kept = few_shot.Kept(tmp_path / "kept")
    for _ in range(2):
        found = few_shot.run(kept, few_shot.TASKS, given)
    assert len(asked) == len(found) == 3 * 3 * 2
    assert {fields["shots"] for fields in asked} == {16, 4}  # 32 examples of two labels, and of eight
    measures = lines(few_shot.measures_of([*found.values()], few_shot.TASKS))
    ahead = "accuracy of a prefix from the examples - "
    assert measures[f"{ahead}in-context learning, mean of sst2, rte, clinc"] == (0.06, True)
    assert measures[f"{ahead}a prefix from random, mean of sst2, rte, clinc"] == (0.03, False)
    one = few_shot.measures_of([run for run in found.values() if run["task"] == "rte"], ["rte"])
    assert lines(one)[f"{ahead}in-context learning, mean of rte"] == (0.06, None)  # the bound is for all three
    with pytest.raises(SystemExit, match="has other settings"):
        few_shot.run(kept, few_shot.TASKS, Namespace(**{**vars(given), "steps": 30}))


def test_recipes_of_few_shot_are_valid(few_shot: Any, tmp_path: Path) -> None:
    for task in few_shot.FILES:
        fields = few_shot.fields_of(task, tmp_path, tmp_path)
        for start in few_shot.STARTS.values():
            assert Recipe.from_fields({**fields, "shots": 16, **start, "output": "unused"}).learning_rate is None


def test_seconds_are_those_of_the_fewest_steps_that_reach_peft(few_steps: Any) -> None:
    def run(accuracy: float, balanced: float, seconds: float, done: int) -> dict[str, Any]:
        return {"accuracy": accuracy, "balanced_accuracy": balanced, "seconds": seconds, "steps": done}

    found = {
        "sst2.peft.0": run(0.8, 0.7, 100, 96),
        "sst2.steps-1.0": run(0.9, 0.6, 2, 1),
        "sst2.steps-4.0": run(0.8, 0.7, 4, 4),
        "sst2.peft.1": run(0.8, 0.7, 100, 96),
        "sst2.steps-1.1": run(0.9, 0.9, 2, 1),
        "defaults.PROMPT_TUNING.0": run(0.88, 0.88, 1, 96),
        "defaults.P_TUNING.0": run(0.84, 0.84, 1, 96),
    }
    measures = lines(few_steps.measures_of(found, "sst2", 2))
    seeds = "sst2: seeds whose prefix was as good as PEFT's in a sixth of its seconds, of 2"
    assert measures[seeds] == (2, True)
    assert measures["sst2: seconds / PEFT's, mean of these"] == (0.03, None)
    assert measures["sst2: steps, mean of these"] == (2.5, None)
    found["sst2.steps-4.0"]["seconds"] = 20
    measures = lines(few_steps.measures_of(found, "sst2", 2))
    assert (measures[seeds], measures["sst2: steps, mean of these"]) == ((1, False), (1, None))
    del found["sst2.steps-4.0"], found["sst2.steps-1.1"]
    measures = lines(few_steps.measures_of(found, "sst2", 2))
    assert measures[seeds] == (0, False)
    assert "sst2: steps, mean of these" not in measures
    assert [line["holds"] for line in few_steps.measures_of(found, "defaults", 1)] == [True, False]


@pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in version:FutureWarning"
)  # of PEFT's own call
def test_peft_and_softtune_train_and_are_judged_alike(
    few_steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"num_virtual_tokens": 3, "init_weights": "random"}
    base = save_models(tmp_path)["llama"]
    recipe = Recipe.from_fields(
        recipe_fields(base, tmp_path, options=options, max_steps=2, learning_rate=few_steps.RATE, warmup_steps=0)
    )
    judged = []

    def metrics_of(model: Any, *rest: Any) -> dict[str, float]:
        judged.append(model.prompt_encoder["default"].embedding.weight.detach().clone())
        return dict.fromkeys(few_steps.METRICS, 0.5)

    monkeypatch.setattr(few_steps, "metrics_of", metrics_of)
    theirs = few_steps.by_peft(recipe)
    assert theirs["steps"] == 2
    assert theirs["seconds"] > 0
    start = few_steps.Setup.prepare(
        few_steps.RunFolder(recipe), few_steps.Rows.load(recipe), few_steps.BaseModels(), lambda *_: None
    )
    assert not judged[0].equal(start.model.prompt_encoder["default"].embedding.weight)  # it was trained
    own = few_steps.by_softtune(recipe)
    assert own["steps"] == 2
    assert own.keys() == theirs.keys()
