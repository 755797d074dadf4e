"""The study of soft adapters beside LoRA: what runs, once each, also after an interrupt and by several processes; its
page."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from softtune import TrainingError
from softtune.experiments.cases import Case
from softtune.experiments.outcomes import Outcome
from softtune.training.setup import Rows
from tests.cli.test_cli import write_recipe
from tests.tiny import save_models, write_rows

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RATES, SEEDS = (1, 3), 2
WAYS = ("prefix", "lora-matched", "lora-r8")
STAMP = {"hardware": {"cpu": "a processor", "threads": 1}, "commit": "abc"}


@pytest.fixture
def lora(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = import_module("lora")
    monkeypatch.setattr(module, "POLL", 0.01)
    monkeypatch.setattr(module, "LONG_SET", "words")
    monkeypatch.setattr(module, "LONG_HELD_OUT", 5)
    monkeypatch.setattr(module.timing, "stamp", lambda: STAMP)

    def ways(recipe: Any) -> dict[str, Any]:
        return {
            "prefix": module.Way(
                title="a prefix", entry="prefix-tuning", changes={"options": {"num_virtual_tokens": 2}}
            ),
            "lora-matched": module.Way(title="LoRA r1", entry="lora", changes={"options.rank": 1}),
            "lora-r8": module.Way(title="LoRA r8", entry="lora"),
        }

    monkeypatch.setattr(module, "ways", ways)
    return module


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_models(tmp_path_factory.mktemp("models"))["llama"]


@pytest.fixture
def study(lora: Any, base: str, tmp_path: Path) -> Any:
    recipe = write_recipe(tmp_path / "recipe.yaml", base, tmp_path / "unused")
    (tmp_path / "others").mkdir()
    fields = {"test_size": 0, "evaluation": write_rows(tmp_path / "others" / "rows.csv", 6), "evaluation_examples": 4}
    data_set = lora.DataSet(title="words", recipe=Path(recipe), fields=fields, steps=4, seconds=1, held_out=3)
    return lora.Study(
        kept=lora.Kept(tmp_path / "kept"),
        sets={"words": data_set},
        rates=RATES,
        seeds=SEEDS,
        long_seconds=2,
        long_trial=3,
        long_fields={"examples": 8, "evaluation_examples": None, "dtype": "bfloat16"},
    )


class Trainings:
    """Stands in for training: the better, the closer the rate is to ``best``; a step takes a second of the clock."""

    def __init__(self, best: float = 0.01, fails: str = "") -> None:
        self.best = best
        self.fails = fails
        self.cases: list[tuple[str, Any]] = []
        self.interrupts_at: int | None = None

    def __call__(self, case: Case, recipe: Any, clock: Any) -> Outcome:
        if len(self.cases) == self.interrupts_at:
            self.interrupts_at = None
            raise KeyboardInterrupt
        self.cases.append((case.name, recipe))
        time.sleep(0.005)
        clock._times = [0.0, float(recipe.max_steps)]
        if self.fails and self.fails == case.name:
            raise TrainingError("the loss is nan", "lower the rate")
        value = 1 / (1 + abs(recipe.learning_rate - self.best))
        return Outcome(
            metrics={"accuracy": value, "macro_f1": 0.5},
            trained=10,
            total=100,
            stored=40,
            seconds=1.0,
            memory=1,
            steps=recipe.max_steps,
            training_rows=13,
            evaluation_rows=4,
        )


@pytest.fixture
def trainings(lora: Any, monkeypatch: pytest.MonkeyPatch) -> Trainings:
    stub = Trainings()
    monkeypatch.setattr(lora, "run_isolated", stub)
    return stub


EACH = len(RATES) + 2 * SEEDS
"""Runs of a method on a set."""
LONG_RUNS = len(RATES) + 1
"""The trials of the long run, of the one telling method, and the long run."""


def test_everything_runs_once_and_never_again(lora: Any, study: Any, trainings: Trainings) -> None:
    lora.run(study)
    assert len(trainings.cases) == len(WAYS) * EACH + LONG_RUNS
    assert {record["way"] for record in study.kept.all().values() if record["kind"] == "long"} == {"prefix"}
    assert all(record["commit"] == "abc" for record in study.kept.all().values())
    lora.run(study)
    assert len(trainings.cases) == len(WAYS) * EACH + LONG_RUNS


def test_an_interrupted_study_goes_on_with_what_is_left(lora: Any, study: Any, trainings: Trainings) -> None:
    trainings.interrupts_at = 7
    with pytest.raises(KeyboardInterrupt):
        lora.run(study)
    assert len(study.kept.all()) == 7
    lora.run(study)
    assert len(trainings.cases) == len(study.kept.all()) == len(WAYS) * EACH + LONG_RUNS


def test_the_best_rate_of_the_trials_is_taken_and_seconds_become_steps(
    lora: Any, study: Any, trainings: Trainings
) -> None:
    lora.run(study)
    for way, default in {"prefix": 0.01, "lora-matched": 1e-3}.items():
        best = min((rate * default for rate in RATES), key=lambda rate: abs(rate - trainings.best))
        records = [record for record in study.kept.all().values() if record["way"] == way]
        assert {r["learning_rate"] for r in records if r["kind"] not in ("rate", "long-rate")} == {best}
        assert {r["steps"] for r in records if r["kind"] == "rate"} == {2}  # half of the four steps
        assert {r["steps"] for r in records if r["kind"] == "steps"} == {4}
        assert {r["steps"] for r in records if r["kind"] == "seconds"} == {1}  # a second of a second each
        assert sorted(r["number"] for r in records if r["kind"] == "steps") == [0, 1]
    [long] = [record for record in study.kept.all().values() if record["kind"] == "long"]
    assert long["steps"] == 2
    assert {r["steps"] for r in study.kept.all().values() if r["kind"] == "long-rate"} == {3}


def test_the_long_run_and_its_trials_have_fields_of_their_own(lora: Any, study: Any, trainings: Trainings) -> None:
    lora.run(study)
    trials, [final] = (
        [recipe for _, recipe in trainings.cases if recipe.dtype == "bfloat16" and (recipe.evaluation is None) is held]
        for held in (True, False)
    )
    assert [recipe.learning_rate for recipe in trials] == [0.01, 0.03]
    assert {len(Rows.load(recipe).evaluation or ()) for recipe in trials} == {5}
    assert (final.learning_rate, final.examples, final.max_steps) == (0.01, 8, 2)
    assert len(Rows.load(final).evaluation or ()) == 6


def test_rates_are_chosen_by_rows_that_are_held_out_of_the_training_rows(
    lora: Any, study: Any, trainings: Trainings
) -> None:
    lora.run(study)
    recipes = {recipe.evaluation is None: recipe for _, recipe in trainings.cases if recipe.dtype == "auto"}
    trial, final = (Rows.load(recipes[is_trial]) for is_trial in (True, False))
    assert len(trial.evaluation or ()) == 3
    assert len(trial.training) == 13
    assert len(final.training) == 16
    seeds = {(recipe.seed, recipe.data_seed) for _, recipe in trainings.cases}
    assert seeds == {(0, 0), (1, 0)}  # all seeds train on the same rows


def test_two_at_once_share_the_runs(lora: Any, study: Any, trainings: Trainings) -> None:
    threads = [threading.Thread(target=lora.run, args=(study,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = Counter((name, recipe.model_dump_json(exclude={"output"})) for name, recipe in trainings.cases)
    assert len(trainings.cases) == len(WAYS) * EACH + LONG_RUNS
    assert len(study.kept.all()) == len(trainings.cases)
    assert {*counts.values()} == {1}


def test_a_dead_process_leaves_no_claim(lora: Any, tmp_path: Path) -> None:
    kept = lora.Kept(tmp_path)
    code = (
        f"from kept import Kept\nfrom pathlib import Path\nwith Kept(Path({str(tmp_path)!r})).claimed('a') as mine:\n"
    )
    code += "    print(mine, flush=True)\n    input()\n"
    other = subprocess.Popen(
        [sys.executable, "-c", code], cwd=BENCHMARKS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None
    assert other.stdout is not None
    with other, other.stdin, other.stdout:
        assert other.stdout.readline() == "True\n"
        assert not kept.once("a", dict)
        assert kept.once("b", dict)
        other.kill()
        other.wait()
        assert kept.once("a", dict)
        assert not kept.once("a", dict)


def test_other_settings_are_told(lora: Any, study: Any, trainings: Trainings) -> None:
    lora.run(study)
    file = study.kept.folder / "words.prefix.rate.0.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "asked": "others"}))
    with pytest.raises(SystemExit, match=r"words\.prefix\.rate\.0\.json has other settings: delete it to run it again"):
        lora.run(study)


def test_a_training_that_diverges_is_a_result(lora: Any, study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "run_isolated", Trainings(fails="words, lora-r8"))
    lora.run(study)
    records = [record for record in study.kept.all().values() if record["way"] == "lora-r8"]
    assert {record["kind"] for record in records} == {"rate"}  # there is no rate to go on with
    assert "the loss is nan" in records[0]["failure"]


def test_the_page_says_what_was_measured_and_what_was_not(
    lora: Any, study: Any, trainings: Trainings, tmp_path: Path
) -> None:
    page = import_module("lora_page")
    lora.run(study)
    (study.kept.folder / "words.lora-r8.steps.0.json").unlink()
    (study.kept.folder / "words.lora-r8.steps.1.json").unlink()
    file = study.kept.folder / "words.prefix.seconds.1.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "value": 0.5}))
    results = tmp_path / "results"
    results.mkdir()
    few = [{"measure": "some accuracy", "value": 0.25, "must": ">= 0.5", "holds": False}]
    (results / "few_shot.json").write_text(json.dumps({"commit": "def", "measures": few}))
    page.write(study, tmp_path / "docs", results)
    text = (tmp_path / "docs" / "lora" / "README.md").read_text(encoding="utf-8")
    assert f"{len(WAYS) * EACH - 2} of {len(WAYS) * EACH} runs are done" in text
    assert "| a prefix | 0.750 (0.500 to 1.000; 2) | 0.750 |" in text  # at equal seconds
    assert "| LoRA r8 | not run |  |" in text  # at equal steps
    assert "**0.01: 1.000**, 0.03: 0.980 (edge)" in text
    own = 0.75 - 1 / (1 + 0.01 - 0.003)
    assert f"| {own:+.3f} | >= 0 | no | median {own:+.3f}: words {own:+.3f} |" in text
    assert "| some accuracy | 0.250 | >= 0.5 | no | python benchmarks/few_shot.py, commit def |" in text
    assert "| python benchmarks/few_steps.py | not run |" in text
    assert "on a processor, 1 thread, , commit abc." in text
    (study.kept.folder / "words.prefix.seconds.0.json").unlink()
    page.write(study, tmp_path / "docs", results)  # what a page was written from stays, and need not run again
    assert (tmp_path / "docs" / "lora" / "README.md").read_text(encoding="utf-8") == text
    lora.restore(study, tmp_path / "docs" / "lora.json")
    assert len(study.kept.all()) == len(trainings.cases) - 2


def test_a_page_of_no_runs(lora: Any, study: Any, tmp_path: Path) -> None:
    import_module("lora_page").write(study, tmp_path / "docs", tmp_path)
    text = (tmp_path / "docs" / "lora" / "README.md").read_text(encoding="utf-8")
    assert "0 of 18 runs are done" in text
    assert "| not run | >= 0 |  | 0 of 1 sets |" in text


def test_auto_takes_what_is_best_by_the_seeds_that_all_have_run(lora: Any, study: Any) -> None:
    prefix = study.ways["words"]["prefix"]
    study.__dict__["ways"] = {"words": {"prefix": prefix, "other": replace(prefix, title="another prefix")}}
    found = {"prefix": (0.5, 0.9), "other": (0.6,)}
    records = [
        {"set": "words", "way": way, "kind": "seconds", "number": seed, "value": value}
        | {"metric": "accuracy", "training_rows": 16, "learning_rate": 0.1 if way == "prefix" else 0.2}
        for way, values in found.items()
        for seed, value in enumerate(values)
    ]
    auto = import_module("lora_auto")
    best = auto.best_on(study, records, "words")
    assert (best["value"], best["seeds"], best["fields"]["learning_rate"]) == (0.6, 1, 0.2)
    assert auto.best_on(study, records[:2], "words")["value"] == 0.7
    assert auto.best_on(study, records[1:], "words") is None


def test_it_trains_in_earnest(lora: Any, study: Any) -> None:
    for run in (run for run in study.runs() if (run.kind, run.number) == ("rate", 0)):
        study.kept.save(run.name, lora.result(run, study.case(run), STAMP))
    records = study.kept.all()
    by_way = {way: records[f"words.{way}.rate.0"]["trained"] for way in WAYS}
    assert by_way["lora-r8"] == 8 * by_way["lora-matched"]
    assert all(record["seconds"] > 0 and record["evaluation_rows"] == 3 for record in records.values())


def test_the_runs_of_the_project_are_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = import_module("lora")
    study = module.full_study(tmp_path)
    runs = [*study.runs()]
    assert len(runs) == len({run.name for run in runs}) == 7 * 7 * 10
    assert all(study.case(run) for run in runs if run.kind == "rate" and run.number in (0, 3))
    for name in study.sets:
        rates = [*study.trials(name, "prefix")]
        assert rates == sorted({*rates})
