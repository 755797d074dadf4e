"""A sweep: its points, what trains at once, what is kept, a search, and Ray."""

from __future__ import annotations

import json
import pickle
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from softtune import ConfigError, DataError
from softtune.experiments import experiment as room
from softtune.experiments import report
from softtune.experiments.cases import Case
from softtune.experiments.compare import compare
from softtune.experiments.experiment import bundles
from softtune.experiments.on_ray import DONE, _found, _telling
from softtune.experiments.outcomes import Entry
from softtune.experiments.result_store import ResultStore
from softtune.experiments.sweep import Range, Sweep, _case, sweep
from softtune.training.progress import EVALUATING, TRAINING, Phase
from softtune.training.recipe import Recipe
from softtune.training.run import train
from softtune.training.setup import Rows
from tests.cli.test_cli import run, write_recipe
from tests.tiny import save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Without dropout, which draws other numbers for runs that train at once."""
    return save_models(tmp_path_factory.mktemp("models"), attention_dropout=0.0)


def asked(file: Path, base: str, fields: dict[str, Any] | None = None, **own: Any) -> tuple[Sweep, Recipe]:
    """A sweep over a tiny recipe beside it, and the recipe."""
    write_recipe(file.parent / "recipe.yaml", base, file.parent / "unused", **(fields or {}))
    file.write_text(yaml.safe_dump({"recipe": "recipe.yaml", **own}, sort_keys=False))
    found = Sweep.load(file)
    return found, Recipe.load(found.recipe, {"output": str(file.parent / "out")})


def by_name(entries: list[Entry]) -> dict[str, dict[str, float]]:
    return {entry.name: entry.outcomes[0].metrics for entry in entries}


def test_every_point_is_what_its_recipe_gives_alone(models: dict[str, str], tmp_path: Path) -> None:
    own = asked(
        tmp_path / "sweep.yaml",
        models["llama"],
        {"epochs": 4},
        over={"learning_rate": [0.01, 0.3], "options.num_virtual_tokens": [2, 5]},
    )
    found = by_name(sweep(*own))
    assert len(found) == 4
    for rate in (0.01, 0.3):
        for tokens in (2, 5):
            changes = {"learning_rate": rate, "options": {"num_virtual_tokens": tokens}}
            recipe = Recipe.load(own[0].recipe, {**changes, "output": str(tmp_path / f"{rate}-{tokens}")})
            assert found[f"learning_rate {rate}, num_virtual_tokens {tokens}"] == train(recipe).after


def test_points_at_once_have_their_own_steps_and_losses(models: dict[str, str], tmp_path: Path) -> None:
    ways = {
        "plain": {"batch_size": 4},
        "small": {"batch_size": 2, "gradient_accumulation_steps": 2},
        "smooth": {"label_smoothing_factor": 0.4, "max_steps": 5},
        "chosen": {"eval_steps": 1, "metric_for_best_model": "accuracy", "optim": "sgd"},
    }
    own = asked(tmp_path / "sweep.yaml", models["llama"], {"learning_rate": 0.1, "epochs": 3}, over={"way": ways})
    found = {entry.name: entry.outcomes[0] for entry in sweep(*own)}
    assert [found[name].steps for name in ways] == [9, 9, 5, 9]
    for name, changes in ways.items():
        recipe = Recipe.load(own[0].recipe, {**changes, "learning_rate": 0.1, "epochs": 3})
        report = train(recipe.model_copy(update={"output": str(tmp_path / name)}))
        assert found[name].metrics == report.after


def test_named_points_fields_and_entries(models: dict[str, str], tmp_path: Path) -> None:
    own = asked(
        tmp_path / "sweep.yaml",
        models["llama"],
        fields={"max_length": 20},
        over={"entry": ["prefix-tuning", "full"], "rows": {"few": {"examples": 4}, "all": {}}},
    )
    entries = sweep(own[0].model_copy(update={"fields": {"epochs": 2}}), own[1])
    assert [entry.at for entry in entries] == [
        {"entry": name, "rows": rows} for name in ("prefix-tuning", "full") for rows in ("few", "all")
    ]
    assert [entry.outcomes[0].training_rows for entry in entries] == [4, 12, 4, 12]
    assert [entry.outcomes[0].steps for entry in entries] == [2, 6, 2, 6]
    assert entries[2].outcomes[0].trained == entries[2].outcomes[0].total


def test_an_ensemble_has_a_line_for_each_way_to_answer(models: dict[str, str], tmp_path: Path) -> None:
    entries = sweep(*asked(tmp_path / "sweep.yaml", models["llama"], over={"ensemble": [1, 3]}, seeds=2))
    ways = ["mean probability", "majority vote", "mean of members", "best member"]
    assert [entry.name for entry in entries] == ["ensemble 1", *(f"ensemble 3, {way}" for way in ways)]
    assert all(len(entry.outcomes) == 2 for entry in entries)
    assert all(entries[4].mean("accuracy") >= entry.mean("accuracy") for entry in entries[3:])


@pytest.mark.parametrize("sizes", [[3, 1], [1, 2, 3]])
def test_a_page_shows_ensembles_beside_adapters_alone(models: dict[str, str], tmp_path: Path, sizes: list[int]) -> None:
    """Of which only the ensembles have a way to answer."""
    own = asked(tmp_path / "sweep.yaml", models["llama"], over={"ensemble": sizes})
    entries = sweep(*own)
    page = report.page_of(tmp_path / "out", "ensembles")
    assert [len(table.lines) for table in page.tables] == [len(entries)]
    assert len(page.pictures) == 1


def test_another_experiment_in_the_folder_is_refused_before_any_work(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = {"learning_rate": [0.01, 0.1], "options.num_virtual_tokens": [2]}
    own = asked(tmp_path / "sweep.yaml", models["llama"], over=over)
    before = sweep(*own)
    larger = {**over, "learning_rate": [0.01, 0.05, 0.1]}
    with monkeypatch.context() as patch:
        patch.setattr(room, "run_bundle", None)
        for other in (
            {"over": {"epochs": [1]}},
            {"over": {**over, "learning_rate": [0.01, 0.05]}},
            {"over": larger, "seeds": 2},
            {"over": {"learning_rate": {"low": 0.01, "high": 1.0}}, "trials": 2},
        ):
            with pytest.raises(ConfigError, match="out has another experiment: name another output, or delete it"):
                sweep(*asked(tmp_path / "sweep.yaml", models["llama"], **other))
        with pytest.raises(ConfigError, match="out has another experiment"):
            sweep(own[0].model_copy(update={"fields": {"epochs": 2}}), own[1])
        with pytest.raises(ConfigError, match="out has another experiment"):
            compare(own[1], ["lora"])
        assert sweep(*own) == before
    found = sweep(*asked(tmp_path / "sweep.yaml", models["llama"], over=larger))
    assert [found[0], found[2]] == before


def test_points_that_failed_can_be_replaced(models: dict[str, str], tmp_path: Path) -> None:
    file, axis = tmp_path / "sweep.yaml", "options.layers"
    first = sweep(*asked(file, models["llama"], over={axis: ["last:1", "last:9"]}))
    assert [bool(entry.failure) for entry in first] == [False, True]
    found = sweep(*asked(file, models["llama"], over={axis: ["last:1", "last:2"]}))
    assert found[0] == first[0]
    assert not found[1].failure
    assert ResultStore(tmp_path / "out").entries() == found


def test_the_folder_of_an_adapter_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    own = asked(tmp_path / "sweep.yaml", models["llama"], over={"epochs": [1]})
    train(own[1])
    for experiment in (lambda: sweep(*own), lambda: compare(own[1], ["lora"])):
        with pytest.raises(ConfigError, match="out has an adapter: name another output"):
            experiment()


def test_runs_of_another_recipe_are_refused_before_any_work(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = asked(tmp_path / "sweep.yaml", models["llama"], over={"epochs": [1, 2]})
    case = Case.from_fields(own[1].model_dump(exclude_unset=True), "", {}, name="epochs 2", number=1, seeds=1)
    train(case.runs[0].model_copy(update={"epochs": 3.0}))
    monkeypatch.setattr(room, "run_bundle", None)
    with pytest.raises(ConfigError, match="in the run in"):
        sweep(*own)
    assert Recipe.from_adapter(case.runs[0].output).epochs == 3


def test_what_is_finished_is_kept(models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = asked(tmp_path / "sweep.yaml", models["llama"], over={"learning_rate": [0.01, 0.1, 0.2]}, at_once=1)
    bundle, ran = room.run_bundle, list[str]()

    def stop_at_second(cases: Any, progress: Any) -> Any:
        if len(ran) == 1:
            raise KeyboardInterrupt
        ran.append(cases[0].name)
        return bundle(cases, progress)

    monkeypatch.setattr(room, "run_bundle", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        sweep(*own)
    assert len(ResultStore(tmp_path / "out").entries()) == 1
    assert "1 of 3 points are done." in report.page_of(tmp_path / "out", "").texts[0]
    ran.append("interrupted")
    entries = sweep(*own)
    assert "points are done" not in report.page_of(tmp_path / "out", "").texts[0]
    assert ran == ["learning_rate 0.01", "interrupted", "learning_rate 0.1", "learning_rate 0.2"]
    assert entries == ResultStore(tmp_path / "out").entries()


def test_a_run_that_was_stopped_before_its_evaluation_runs_again(models: dict[str, str], tmp_path: Path) -> None:
    own = asked(tmp_path / "sweep.yaml", models["llama"], over={"learning_rate": [0.01]})
    before = sweep(*own)
    [file] = (tmp_path / "out" / "entries").iterdir()
    file.unlink()
    assert by_name(sweep(*own)) == by_name(before)


def test_a_point_that_does_not_fit_is_told_and_the_others_go_on(models: dict[str, str], tmp_path: Path) -> None:
    own = asked(tmp_path / "sweep.yaml", models["llama"], over={"options.num_virtual_tokens": [2, 1000]})
    entries = sweep(*own)
    assert [bool(entry.failure) for entry in entries] == [False, True]
    assert "positions" in entries[1].failure


def test_a_search_goes_on_where_it_was(models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = {
        "learning_rate": {"low": 0.001, "high": 1.0, "log": True},
        "options.num_virtual_tokens": {"low": 1, "high": 6},
    }
    own = asked(tmp_path / "sweep.yaml", models["llama"], over=over, trials=6, at_once=2)
    whole = sweep(*own)
    assert len({entry.name for entry in whole}) == 6
    assert all(0.001 <= entry.at["learning_rate"] <= 1 for entry in whole)
    assert all(entry.at["options.num_virtual_tokens"] in range(1, 7) for entry in whole)
    for file in sorted((tmp_path / "out" / "entries").iterdir())[3:]:
        file.unlink()
    assert by_name(sweep(*own)) == by_name(whole)
    for change in ({"trials": 5}, {"at_once": 1}):
        with pytest.raises(ConfigError, match="has another experiment"):
            sweep(own[0].model_copy(update=change), own[1])


def test_the_sweep_in_the_output_runs_from_there(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    write_recipe(tmp_path / "own" / "recipe.yaml", models["llama"], tmp_path / "unused")
    monkeypatch.chdir(tmp_path)
    over = "{learning_rate: {low: 1e-3, high: 1e-1, log: true}}"
    flags = ["--over", over, "--trials", "2", "--output", "runs/out"]
    assert run("sweep", "own/recipe.yaml", *flags) == 0
    before = ResultStore(Path("runs/out")).entries()
    assert run("sweep", "runs/out/sweep.yaml", "--output", "runs/again") == 0
    assert by_name(ResultStore(Path("runs/again")).entries()) == by_name(before)


@pytest.mark.parametrize("over", [{"learning_rate": [0.01, 0.1]}, {"entry": ["full", "lora"]}])
def test_the_command_writes_a_page(models: dict[str, str], tmp_path: Path, over: dict[str, Any]) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", models["llama"], tmp_path / "unused")
    out = tmp_path / "out"
    assert run("sweep", recipe, "--over", yaml.safe_dump(over), "--output", str(out), "--epochs", "2") == 0
    markdown = (out / report.MARKDOWN_NAME).read_text(encoding="utf-8")
    assert "Trained on 12 rows, 6 steps; evaluated on 4." in markdown
    picture = markdown.split("](")[1].split(")")[0]
    assert (out / picture).read_text(encoding="utf-8").startswith("<svg")
    assert run("report", str(out)) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"over": {}}, "over is {}"),
        ({"over": {"learning_rate": []}}, "over has no values for learning_rate"),
        ({"over": {"learning_rate": 0.1}}, "over is .*list values"),
        ({"over": {"learning_rate": {"low": 0.1, "high": 1}}}, "say how many trials"),
        ({"over": {"learning_rate": {"low": 1, "high": 0.1}}, "trials": 2}, "a range goes from low up to high"),
        ({"over": {"epochs": [1]}, "seed": 3}, "seed: no such field: use seeds"),
        ({}, "over is missing: for each field list values"),
        ({"over": {"epochs": [1]}, "fields": {"epochs": 2}}, "epochs is both a field and an axis"),
        ({"over": {"point": {"a": {"output": "b"}}}}, "a sweep has one folder for all points"),
        ({"over": {"output": ["a", "b"]}}, "a sweep has one folder for all points: name it with --output alone"),
        ({"over": {"epochs": [1, 2, 1]}}, "over has a value of epochs twice: list each once"),
    ],
)
def test_a_sweep_that_is_wrong_is_told(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", **fields}))
    with pytest.raises(ConfigError, match=message):
        Sweep.load(tmp_path / "sweep.yaml")


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"entry": ["lora", "prefix"]}, "no entry 'prefix'"),
        (
            {"entry": ["prefix-tuning"], "method": ["P_TUNING_V2"]},
            "the entry is prefix-tuning and the field method P_TUNING_V2: leave one of the two out",
        ),
        ({"learning_rates": [1]}, "learning_rates: no such field: use learning_rate"),
        ({"options.tokens": [1]}, "tokens"),
    ],
)
def test_a_wrong_point_is_told_before_anything_runs(
    models: dict[str, str], tmp_path: Path, over: dict[str, Any], message: str
) -> None:
    own = asked(tmp_path / "sweep.yaml", models["llama"], over=over)
    with pytest.raises(ConfigError, match=message):
        sweep(*own)
    assert not (tmp_path / "out").exists()


def test_a_metric_of_another_task_is_told(models: dict[str, str], tmp_path: Path) -> None:
    own = asked(tmp_path / "sweep.yaml", models["llama"], over={"epochs": [1]}, metric="bleu")
    with pytest.raises(ConfigError, match="'bleu' does not fit the task: use one of accuracy, balanced_accuracy"):
        sweep(*own)


def test_fields_apply_before_the_seed_and_the_metric_are_read(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna

    seeds, sampler = list[Any](), optuna.samplers.TPESampler
    monkeypatch.setattr(optuna.samplers, "TPESampler", lambda seed: (seeds.append(seed), sampler(seed=seed))[1])
    over: dict[str, Any] = {"learning_rate": {"low": 0.001, "high": 1.0}}
    own = asked(tmp_path / "sweep.yaml", models["llama"], {"test_size": 1}, over=over, trials=1, metric="chrf")
    fields = {"seed": 5, "labels": None, "max_new_tokens": 3}
    [found] = sweep(own[0].model_copy(update={"fields": fields}), own[1])
    assert seeds == [5]
    assert "chrf" in found.metrics
    over = {"epochs": [2], "task": {"labels": {}, "words": {"labels": None}}}
    with pytest.raises(ConfigError, match="epochs 2, words is not measured as epochs 2, labels is"):
        sweep(*asked(tmp_path / "sweep.yaml", models["llama"], {"test_size": 1}, over=over))


def test_data_that_has_changed_is_noticed(models: dict[str, str], tmp_path: Path) -> None:
    own = asked(tmp_path / "sweep.yaml", models["llama"], over={"learning_rate": [0.01]})
    before = sweep(*own)
    file = tmp_path / "recipe.csv"
    rows = file.read_text()
    file.write_text(rows.replace("red sky", "red green").replace("red red", "red blue"))
    with pytest.raises(ConfigError, match=r"the data is not what .* came of: restore it, or name another output"):
        sweep(*own)
    file.write_text(rows)
    assert sweep(*own) == before


def test_rows_of_all_points_are_read_once(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = asked(tmp_path / "sweep.yaml", models["llama"], over={"epochs": [1]})
    read, of = list[Any](), Rows.load
    monkeypatch.setattr(Rows, "load", lambda recipe: (read.append(recipe), of(recipe))[1])
    fields = own[1].model_dump(exclude_unset=True)
    points: list[dict[str, Any]] = [{"learning_rate": 0.1}, {"epochs": 2}, {"seed": 3}, {"data_seed": 3}]
    cases = room.with_rows([Case.from_fields(fields, "", c, name=str(c), number=0, seeds=1) for c in points])
    assert len(read) == 2
    assert cases[0].rows == cases[1].rows != cases[2].rows == cases[3].rows


def test_the_least_perplexity_is_best(models: dict[str, str], tmp_path: Path) -> None:
    over = {"learning_rate": {"low": 1e-5, "high": 1.0, "log": True}}
    fields = {"labels": None, "max_new_tokens": 3, "epochs": 4, "test_size": 1}
    own = asked(tmp_path / "sweep.yaml", models["llama"], fields, over=over, trials=8, at_once=2, metric="perplexity")
    found = sweep(*own)
    values = [entry.mean("perplexity") for entry in found]
    [table] = report.tables_of(found, "perplexity")
    assert [float(line[table.head.index("perplexity")].split()[0]) for line in table.lines] == sorted(
        round(value, 3) for value in values
    )
    assert statistics.mean(values[4:]) < statistics.mean(values[:4])
    picture = report.page_of(tmp_path / "out", "").pictures[0]
    assert "perplexity, less is better" in picture.svg


def test_names_repeat_no_axis_whose_values_speak_for_themselves(models: dict[str, str], tmp_path: Path) -> None:
    over = {"variant": {"prefix": {}, "infix": {}}, "rows": {"50": {}, "2.5": {}}, "epochs": [1]}
    own = asked(tmp_path / "sweep.yaml", models["llama"], over=over)
    names = [_case(*own, 0, point).name for point in own[0].points]
    assert names == [f"{variant}, rows {rows}, epochs 1" for variant in ("prefix", "infix") for rows in ("50", "2.5")]


@pytest.mark.parametrize("fields", [{}, {"ensemble": 2}])
def test_progress_has_a_line_for_each_phase_however_many_points(
    models: dict[str, str], tmp_path: Path, fields: dict[str, Any]
) -> None:
    told = dict[Phase, list[tuple[int, int, str]]]()
    own = asked(tmp_path / "sweep.yaml", models["llama"], fields, over={"learning_rate": [0.1, 0.2]}, at_once=1)
    sweep(*own, progress=lambda phase, *step: told.setdefault(phase, []).append(step))
    assert list(told) == [room.ALL_CASES, TRAINING, EVALUATING]
    assert told[room.ALL_CASES] == [(0, 2, ""), (1, 2, ""), (2, 2, "")]
    assert {notes.partition(",")[0] for _, _, notes in told[TRAINING]} == {"learning_rate 0.1", "learning_rate 0.2"}


def test_what_ray_was_stopped_at_is_no_result(models: dict[str, str], tmp_path: Path) -> None:
    own = asked(tmp_path / "sweep.yaml", models["llama"], over={"epochs": [1, 2]})
    cases = [_case(*own, number, point) for number, point in enumerate(own[0].points)]
    failed = cases[0].failed(ConfigError("this may be mended"))
    cases[0].store.save(cases[0].name, cases[0].number, cases[0].configuration, failed)
    ran = SimpleNamespace(error=None, metrics={DONE: 1, "config": {"bundle": 0}})
    stopped = SimpleNamespace(error=None, metrics=None)
    found = _found([cases[:1], cases[1:]], [ran, stopped])
    assert next(found) == (cases[0], failed)
    with pytest.raises(KeyboardInterrupt, match="go on with the same command"):
        next(found)


def test_what_fails_on_a_worker_is_raised_as_it_was_there() -> None:
    from ray.exceptions import RayTaskError

    cause = DataError("row 3 has no label")
    error = RayTaskError("_trial", "Traceback ...", cause, proctitle="ray", pid=1, ip="127.0.0.1")
    with pytest.raises(DataError) as raised:
        next(_found([], [SimpleNamespace(error=error, metrics=None)]))
    assert raised.value is cause


def test_ray_tells_how_many_cases_are_done() -> None:
    told = list[tuple[Any, ...]]()
    telling = _telling(lambda *step: told.append(step), 5)
    for trial, done in (("a", 1), ("b", 2), ("a", 2)):
        telling.on_trial_result(0, [], SimpleNamespace(trial_id=trial), {DONE: done})
    assert [done for _, done, _, _ in told] == [0, 1, 3, 4]
    pickle.dumps(telling)


def test_bundles_share_a_base_model_and_are_no_larger_than_asked(models: dict[str, str], tmp_path: Path) -> None:
    recipe = Recipe.load(write_recipe(tmp_path / "recipe.yaml", models["llama"], tmp_path / "out"))
    fields = recipe.model_dump(exclude_unset=True)
    changes: list[tuple[str, dict[str, Any]]] = [
        ("", {}),
        ("", {}),
        ("", {"bf16": True}),
        ("full", {}),
        ("", {}),
        ("", {}),
    ]
    own = [Case.from_fields(fields, *c, name=str(i), number=i, seeds=2) for i, c in enumerate(changes)]
    assert [[case.number for case in bundle] for bundle in bundles(own, at_once=4)] == [[0, 1], [2], [3], [4, 5]]
    assert [len(bundle) for bundle in bundles(own, at_once=1)] == [1] * 6


def test_a_range_knows_whole_numbers() -> None:
    assert isinstance(Range(low=1, high=3).low, int)


@pytest.mark.slow
def test_ray_gives_the_same(models: dict[str, str], tmp_path: Path) -> None:
    own = asked(tmp_path / "sweep.yaml", models["llama"], over={"learning_rate": [0.01, 0.3]}, at_once=1)
    here = by_name(sweep(*own))
    command = [str(Path(sys.executable).with_name("softtune")), "sweep", "sweep.yaml", "--ray", "local"]
    subprocess.run([*command, "--output", "ray"], check=True, cwd=tmp_path)
    assert by_name(ResultStore(tmp_path / "ray").entries()) == here
    assert json.loads(next((tmp_path / "ray" / "entries").glob("*.json")).read_text())["number"] in (0, 1)
