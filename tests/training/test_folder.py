"""Runs that ended anywhere can go on: with --resume, or without where nothing is there."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.test_run import interrupt_at, no_dropout, no_work, tensors

from softtune import ConfigError, TrainingError
from softtune.training.progress import EVALUATING, TRAINING, Phase, Progress
from softtune.training.recipe import Recipe
from softtune.training.run import Report, train, train_all


@pytest.fixture
def pair(fields: dict[str, Any], tmp_path: Path) -> Callable[..., list[Recipe]]:
    """Two recipes in a folder, which differ in their seeds."""
    fields["model"] = no_dropout(fields["model"], tmp_path)

    def make(folder: str, **second: Any) -> list[Recipe]:
        changes: list[dict[str, Any]] = [{}, {"seed": 1, **second}]
        outputs = [str(tmp_path / folder / name) for name in "ab"]
        pairs = zip(outputs, changes, strict=True)
        return [Recipe.from_fields({**fields, "output": out, **more}) for out, more in pairs]

    return make


def of_first(progress: Progress) -> Progress:
    """A progress function that hears of the first of two recipes alone."""
    return lambda phase, *step: progress(replace(phase, run=None), *step) if phase.run == "a" else None


def assert_same(found: list[Recipe], expected: list[Recipe]) -> None:
    for own, other in zip(found, expected, strict=True):
        ours, theirs = tensors(own.output), tensors(other.output)
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=2e-3)


def test_a_run_without_a_checkpoint_begins_beside_one_that_goes_on(pair: Callable[..., list[Recipe]]) -> None:
    whole, broken = pair("whole"), pair("broken")
    train_all(whole)
    train_all(broken, progress=of_first(interrupt_at(3)))
    [checkpoint] = Path(broken[1].output, "checkpoints").glob("checkpoint-*")
    shutil.rmtree(checkpoint)  # as if killed before it was written
    with pytest.raises(ConfigError, match="a has an unfinished run: add --resume"):
        train_all(broken, progress=no_work)
    assert all(isinstance(result, Report) and result.finished for result in train_all(broken, resume=True))
    assert_same(broken, whole)


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_finished_run_is_left_alone_beside_one_that_goes_on_or_begins(
    pair: Callable[..., list[Recipe]], has_begun: bool
) -> None:
    whole, broken = pair("whole"), pair("broken")
    train_all(whole)
    train(broken[0])
    if has_begun:
        train(broken[1], progress=interrupt_at(5))
    with pytest.raises(ConfigError, match="a has a finished adapter: choose another output"):
        train_all(broken, progress=no_work)
    finished, gone_on = train_all(broken, resume=True)
    assert finished is None
    assert isinstance(gone_on, Report)
    assert_same(broken, whole)
    with pytest.raises(ConfigError, match="a has a finished adapter: choose another output"):
        train_all(broken, resume=True, progress=no_work)


def test_a_finished_run_of_another_recipe_is_not_passed_over(pair: Callable[..., list[Recipe]]) -> None:
    recipes = pair("out")
    train(recipes[0].model_copy(update={"batch_size": 6}))
    with pytest.raises(ConfigError, match=r"batch_size is 4, and 6 in the run in .*a: resume it with the recipe"):
        train_all(recipes, resume=True, progress=no_work)


def test_a_run_that_failed_before_an_interrupt_is_told_and_passed_over(pair: Callable[..., list[Recipe]]) -> None:
    recipes = pair("out", learning_rate=1e38, max_grad_norm=1e9)
    first, failed = train_all(recipes, progress=of_first(interrupt_at(8)))
    assert isinstance(first, Report)
    assert not first.finished
    assert isinstance(failed, TrainingError)
    first, failed = train_all(recipes, resume=True)
    assert isinstance(first, Report)
    assert first.finished
    assert failed is None


def test_all_are_saved_before_one_is_evaluated(pair: Callable[..., list[Recipe]]) -> None:
    def stop(phase: Phase, *step: Any) -> None:
        if phase == EVALUATING:
            os.kill(os.getpid(), signal.SIGINT)

    recipes = pair("out")
    with pytest.raises(KeyboardInterrupt, match=r"before the evaluation; .* saved in .*a; .* saved in .*b$"):
        train_all(recipes, progress=of_first(stop))
    assert [Recipe.from_adapter(recipe.output) for recipe in recipes] == recipes


def test_runs_that_are_stopped_at_once_say_what_is_kept_of_each(pair: Callable[..., list[Recipe]]) -> None:
    def stop(phase: Phase, done: int, *step: Any) -> None:
        if (phase, done) == (TRAINING, 6):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    recipes = pair("out", save_steps=50)
    kept = "stopped at once; .*a/.*/checkpoint-4 is kept; no checkpoint is kept in .*b: go on with --resume"
    with pytest.raises(KeyboardInterrupt, match=kept):
        train_all(recipes, progress=of_first(stop))
    train_all(recipes, resume=True)


def test_what_is_left_of_checkpoints_does_not_make_a_finished_run_unfinished(fields: dict[str, Any]) -> None:
    """As when it is killed while they are removed."""
    recipe = Recipe.from_fields(fields)
    train(recipe)
    left = Path(recipe.output, "checkpoints", "checkpoint-10")
    left.mkdir(parents=True)
    (left / "trainer_state.json").write_text("{}")
    with pytest.raises(ConfigError, match="has a finished adapter"):
        train(recipe, resume=True, progress=no_work)
    assert Recipe.from_adapter(recipe.output) == recipe


def names_of_checkpoints(recipe: Recipe) -> set[str]:
    return {path.name for path in Path(recipe.output, "checkpoints").glob("checkpoint-*")}


def test_a_run_goes_on_from_a_named_checkpoint(fields: dict[str, Any], tmp_path: Path) -> None:
    fields |= {"save_steps": 2, "save_total_limit": 3}
    whole, broken = (Recipe.from_fields({**fields, "output": str(tmp_path / name)}) for name in ("whole", "broken"))
    train(whole)
    train(broken, progress=interrupt_at(7))
    assert names_of_checkpoints(broken) == {"checkpoint-4", "checkpoint-6", "checkpoint-7"}
    for name in ("checkpoint-2", "checkpoint-6x", "checkpoints"):
        with pytest.raises(ConfigError, match=f"has no {name}: it has checkpoint-4, checkpoint-6, .*: name one"):
            train(broken, resume=name, progress=no_work)
    begun: list[int] = []

    def stop(phase: Phase, done: int, *step: Any) -> None:
        if phase == TRAINING:
            begun.append(done)
            interrupt_at(6)(phase, done, *step)

    assert not train(broken, resume="checkpoint-4", progress=stop).finished
    assert begun[0] == 4
    assert names_of_checkpoints(broken) == {"checkpoint-4", "checkpoint-6"}
    assert train(broken, resume=True).finished
    assert all(torch.equal(tensor, tensors(whole.output)[name]) for name, tensor in tensors(broken.output).items())


def test_a_checkpoint_whose_best_is_gone_is_not_gone_on_from(fields: dict[str, Any]) -> None:
    recipe = Recipe.from_fields({**fields, "eval_steps": 2, "save_steps": 2, "save_total_limit": 9})
    train(recipe, progress=interrupt_at(7))
    state = Path(recipe.output, "checkpoints", "checkpoint-6", "trainer_state.json")
    best = Path(json.loads(state.read_text())["best_model_checkpoint"])
    shutil.rmtree(best)
    with pytest.raises(
        ConfigError, match=f"{best.name} was the best until checkpoint-7, and is gone: resume from a la"
    ):
        train(recipe, resume="checkpoint-7", progress=no_work)


def test_nothing_to_go_on_from_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="has no unfinished run: leave out --resume"):
        train(Recipe.from_fields(fields), resume="checkpoint-4", progress=no_work)


def test_members_go_on_from_a_named_checkpoint_each(fields: dict[str, Any]) -> None:
    recipe = Recipe.from_fields({**fields, "ensemble": 2, "save_steps": 2, "save_total_limit": 5})

    def stop(phase: Phase, *step: Any) -> None:
        interrupt_at(5)(TRAINING if phase == replace(TRAINING, member="1") else phase, *step)

    assert not train(recipe, progress=stop).finished
    shutil.rmtree(Path(recipe.output, "checkpoints", "2", "checkpoint-2"))
    with pytest.raises(ConfigError, match=r"checkpoints/2 has no checkpoint-2: it has checkpoint-4, checkpoint-5: na"):
        train(recipe, resume="checkpoint-2", progress=no_work)
    assert train(recipe, resume="checkpoint-4").finished
