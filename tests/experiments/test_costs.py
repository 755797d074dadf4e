"""What a comparison says of time and memory: of one run's training, for adapters and baselines alike."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from softtune import ConfigError
from softtune.experiments import answering, isolated_run, memory, report, runs
from softtune.experiments.cases import Case
from softtune.experiments.compare import compare
from softtune.experiments.isolated_run import run_isolated
from softtune.experiments.outcomes import Entry, Outcome
from softtune.training.recipe import Recipe
from softtune.training.trainer import AdapterTrainer
from tests.cli.test_cli import write_recipe
from tests.tiny import save_models

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"), max_position_embeddings=128)


@pytest.mark.parametrize("measured", [memory.measured, memory.sampled])
def test_the_most_in_use_meanwhile_counts(measured: Callable[[], Callable[[], int]]) -> None:
    end = measured()
    before = end()
    end = measured()
    block = torch.ones(100 * MEGABYTE)
    time.sleep(0.1)
    del block
    assert 380 * MEGABYTE < end() - before < 500 * MEGABYTE
    gc.collect()
    assert memory.measured()() - before < 100 * MEGABYTE


def test_runs_of_a_comparison_train_one_after_the_other_and_only_that_is_measured(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(write_recipe(tmp_path / "recipe.yaml", models["llama"], tmp_path / "out"))
    events = list[str]()

    def noted(name: str, does: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *own, **options: (events.append(name), does(*own, **options))[1]

    monkeypatch.setattr(isolated_run, "measured", noted("begin", lambda: noted("end", lambda: 7)))
    for room, name in ((AdapterTrainer, "train"), (answering, "judge"), (isolated_run, "load_base_model")):
        monkeypatch.setattr(room, name, noted(name, getattr(room, name)))
    found = compare(recipe, ["prefix-tuning", "last-layers"], seeds=2)
    measured = ["begin", "train", "end", "judge"]
    assert events == [*measured, *measured, "load_base_model", *measured, "load_base_model", *measured]
    assert all(outcome.seconds > 0 and outcome.memory == 7 for entry in found for outcome in entry.outcomes)


def test_what_is_stored_is_tensors(models: dict[str, str], tmp_path: Path) -> None:
    recipe = Recipe.load(write_recipe(tmp_path / "recipe.yaml", models["llama"], tmp_path / "out"))
    found = compare(recipe, ["prefix-tuning", "bitfit", "lora"], seeds=1)
    assert [entry.cost("stored") for entry in found] == [4 * entry.cost("trained") for entry in found]
    assert (tmp_path / "out" / "prefix-tuning-1" / "adapter_model.safetensors").is_file()


def test_patience_does_not_go_with_baselines(models: dict[str, str], tmp_path: Path) -> None:
    fields = {"patience": 1, "save_steps": 1, "validation_size": 2}
    recipe = Recipe.load(write_recipe(tmp_path / "recipe.yaml", models["llama"], tmp_path / "out", **fields))
    with pytest.raises(ConfigError, match="patience stops adapters, and not full: leave one of the two out"):
        compare(recipe, ["prefix-tuning", "full"])
    [found] = compare(recipe, ["prefix-tuning"], seeds=1)
    assert found.outcomes[0].training_rows == 10


def test_a_run_that_blew_up_keeps_its_adapter(models: dict[str, str], tmp_path: Path) -> None:
    fields = {"learning_rate": 1e38, "max_grad_norm": 1e9}
    recipe = Recipe.load(write_recipe(tmp_path / "recipe.yaml", models["llama"], tmp_path / "out", **fields))
    [found] = compare(recipe, ["prefix-tuning"], seeds=1)
    assert "the adapter is kept" in found.failure
    assert Recipe.from_adapter(tmp_path / "out" / "prefix-tuning-1").learning_rate == 1e38


def test_a_folder_of_another_recipe_is_left_alone(models: dict[str, str], tmp_path: Path) -> None:
    recipe = Recipe.load(write_recipe(tmp_path / "recipe.yaml", models["llama"], tmp_path / "out"))
    case = Case(name="own", number=0, recipe=recipe, seeds=1)
    run_isolated(case, case.runs[0], lambda *_: None)
    other = dataclasses.replace(case, recipe=recipe.model_copy(update={"learning_rate": 0.5}))
    with pytest.raises(ConfigError, match=r"learning_rate is 0\.5, and None in the run in "):
        run_isolated(other, other.runs[0], lambda *_: None)
    with pytest.raises(ConfigError, match=r"learning_rate is 0\.5, and None in the run in "):
        runs.run_at_once([other], lambda *_: None)
    assert Recipe.from_adapter(case.runs[0].output).learning_rate is None
    run_isolated(case, case.runs[0], lambda *_: None)


def test_costs_in_the_table_are_means_over_seeds() -> None:
    outcomes = [
        Outcome(
            metrics={"accuracy": 0.5},
            trained=10,
            total=1000,
            stored=40,
            seconds=seconds,
            memory=memory,
            steps=3,
            training_rows=8,
            evaluation_rows=4,
        )
        for seconds, memory in ((2.0, 10**9), (4.0, 2 * 10**9))
    ]
    _, costs = report.tables_of([Entry(name="one", outcomes=outcomes)])
    assert costs.lines[0][-3:] == ["3", "40 B", "1.5 GB"]
