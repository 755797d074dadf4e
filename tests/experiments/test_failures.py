"""What fails in an experiment: what is kept, what runs again, and what the commands say of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from softtune import DataError
from softtune.data import Template
from softtune.evaluation.answers import Answers
from softtune.experiments import answering, report
from softtune.experiments import experiment as room
from softtune.experiments.compare import compare
from softtune.experiments.outcomes import Entry, Outcome
from softtune.experiments.prompting import END
from softtune.experiments.result_store import ResultStore
from softtune.methods import TaskType
from softtune.tasks import TextTask
from softtune.training.recipe import Recipe
from softtune.training.setup import Rows
from tests.cli.test_cli import run, write_recipe
from tests.experiments.test_sweep import asked, sweep
from tests.tiny import save_models

BLOWN_UP = {"learning_rate": 1e38, "max_grad_norm": 1e9}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"), max_position_embeddings=128)


def test_what_may_be_mended_runs_again(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path / "recipe.yaml", models["llama"], tmp_path / "unused"), str(tmp_path / "out")
    command = ("compare", recipe, "--output", out, "--entries", "lora,zero-shot,head", "--seeds", "1")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        assert run(*command) == 1
    shown = capsys.readouterr()
    assert "lora: the baseline lora comes with the package peft" in shown.out
    assert shown.err.splitlines()[-1].startswith("softtune: 1 of 3 failed: ")
    assert run(*command) == 0
    shown = capsys.readouterr().out
    assert "head: LlamaForCausalLM has no head to train" in shown
    assert [(entry.name, bool(entry.outcomes)) for entry in ResultStore(tmp_path / "out").entries()] == [
        ("head", False),
        ("lora", True),
        ("zero-shot", True),
    ]


def test_a_training_that_blew_up_is_a_result(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = asked(tmp_path / "sweep.yaml", models["llama"], BLOWN_UP, over={"seed": [0]})
    found = sweep(*own)
    assert found[0].failed_by == "TrainingError"
    monkeypatch.setattr("softtune.experiments.experiment.run_bundle", None)
    assert sweep(*own) == found


@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_where_all_failed_there_is_no_table(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", models["llama"], tmp_path / "unused", **BLOWN_UP)
    options = {"compare": ["--entries", "prefix-tuning", "--seeds", "1"], "sweep": ["--over", "seed: [0]"]}
    assert run(command, recipe, "--output", str(tmp_path / "out"), *options[command]) == 1
    shown = capsys.readouterr()
    assert "┃" not in shown.out
    assert "the loss is " in shown.out
    assert shown.err.splitlines()[-1].startswith("softtune: 1 of 1 failed: ")
    page = (tmp_path / "out" / report.PAGE_NAME).read_text(encoding="utf-8")
    assert "<table>" not in page


@pytest.mark.parametrize("changes", [{"train": "nowhere.csv"}, {"label_column": "tag"}])
def test_data_that_does_not_fit_ends_all_and_says_where(
    models: dict[str, str], tmp_path: Path, changes: dict[str, Any]
) -> None:
    own = asked(tmp_path / "sweep.yaml", models["llama"], over={"data": {"good": {}, "bad": changes}}, at_once=1)
    with pytest.raises(DataError, match="bad: "):
        sweep(*own)


def test_one_entry_that_is_too_large_fails_alone(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(write_recipe(tmp_path / "r.yaml", models["llama"], tmp_path / "out"))
    run_at_once = room.run_at_once

    def short_of_memory(cases: Any, progress: Any) -> Any:
        if cases[0].name == "full":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much.")
        return run_at_once(cases, progress)

    monkeypatch.setattr(room, "run_at_once", short_of_memory)
    full, other = compare(recipe, ["full", "zero-shot"], seeds=1)
    assert (full.failure, full.is_final) == ("CUDA out of memory.", False)
    assert other.outcomes


def test_rows_in_front_that_leave_no_room_are_left_out(models: dict[str, str], tmp_path: Path) -> None:
    rows = "".join(f"{'red ' * 40},{label}\n" for label in ("warm", "cold") * 5)
    (tmp_path / "rows.csv").write_text(f"words,label\n{rows}")
    fields = {"train": str(tmp_path / "rows.csv"), "max_length": 30}
    recipe = Recipe.load(write_recipe(tmp_path / "r.yaml", models["llama"], tmp_path / "out", **fields))
    few, other = compare(recipe, ["few-shot", "zero-shot"], seeds=1)
    assert few.is_left_out
    assert few.failure.startswith("4 rows in front of a record leave it no room (row 1: template and answer alone take")
    assert other.outcomes


def test_texts_end_before_the_next_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those in front of a record do."""
    kind = TaskType.CAUSAL_LM
    task = TextTask(kind=kind, template=Template("{x}"), label_column="y", max_length=9, max_new_tokens=9)
    held_out = Dataset.from_list([{"x": "red", "y": "warm"}])
    rows = Rows(training=held_out, validation=held_out, evaluation=held_out, fingerprints={})
    monkeypatch.setattr(answering, "answer", lambda *_, **__: Answers(["warm\n\nText: red"], None, 0))
    nobody: Any = None
    told = [answering.metrics_of(nobody, nobody, task, rows, lambda *_: None, end=end) for end in (None, END)]
    assert [metrics["exact_match"] for metrics in told] == [0, 1]


def test_choices_take_rows_in_front(models: dict[str, str], tmp_path: Path) -> None:
    rows = "".join(f'{{"text": "red sky", "of": ["warm", "cold"], "right": {i % 2}}}\n' for i in range(10))
    (tmp_path / "rows.jsonl").write_text(rows)
    fields = {"train": str(tmp_path / "rows.jsonl"), "labels": None, "choices": "of", "label_column": "right"}
    fields |= {"template": "text : {text} label : "}
    recipe = Recipe.load(write_recipe(tmp_path / "r.yaml", models["llama"], tmp_path / "out", **fields))
    [found] = compare(recipe, ["few-shot"], seeds=1)
    assert found.outcomes[0].training_rows == 4


def test_what_is_kept_has_its_metrics_and_axes_in_order(tmp_path: Path) -> None:
    numbers: dict[str, Any] = {"trained": 1, "total": 2, "stored": 4, "seconds": 1.0, "memory": 1, "steps": 3}
    outcome = Outcome(metrics={"f1": 0.5, "accuracy": 0.9}, training_rows=8, evaluation_rows=4, **numbers)
    store = ResultStore(tmp_path)
    store.save("one", 0, {}, [Entry(name="one", at={"start": "text", "epochs": 1}, outcomes=[outcome])])
    [found] = store.entries()
    assert found.metrics == ["f1", "accuracy"]
    assert [*found.at] == ["start", "epochs"]


def test_entries_of_before_have_no_class_of_error() -> None:
    assert not Entry(name="old", outcomes=[], failure="it has failed").is_final
