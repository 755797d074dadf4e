"""A comparison from a recipe to its page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from softtune import CheckpointError, ConfigError
from softtune.experiments import experiment as room
from softtune.experiments import report
from softtune.experiments.cases import DEFAULT_ENTRIES, PROMPTS
from softtune.experiments.compare import compare
from softtune.experiments.outcomes import Entry, Outcome
from softtune.experiments.page import Page, as_html
from softtune.experiments.result_store import ResultStore
from softtune.training.recipe import Recipe
from tests.cli.test_cli import run, write_recipe
from tests.tiny import save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With room for rows in front of a record."""
    return save_models(tmp_path_factory.mktemp("models"), max_position_embeddings=128)


@pytest.fixture(scope="module")
def compared(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    recipe = write_recipe(folder / "recipe.yaml", models["llama"], folder / "unused")
    assert run("compare", recipe, "--output", str(folder / "out"), "--seeds", "2") == 0
    return folder


def test_every_entry_has_an_outcome_for_each_seed(compared: Path) -> None:
    found = {entry.name: entry for entry in ResultStore(compared / "out").entries()}
    assert [name for name, entry in found.items() if entry.failure] == ["head"]  # a decoder has none
    assert list(found) == list(DEFAULT_ENTRIES)
    assert {name: len(entry.outcomes) for name, entry in found.items() if len(entry.outcomes) != 2} == {
        "head": 0,
        "zero-shot": 1,
    }
    assert {o.steps for e in found.values() for o in e.outcomes if e.name not in PROMPTS} == {3}
    assert found["full"].outcomes[0].trained == found["full"].outcomes[0].total
    assert found["prompt-tuning"].outcomes[0].trained == 100 * 24  # virtual tokens that start from rows
    assert found["prefix-tuning"].outcomes[0].trained == 3 * 2 * 2 * 12  # the recipe's own method has its own options


def test_what_is_kept_is_not_run_again(compared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    recipe = Recipe.load(compared / "recipe.yaml", {"output": str(compared / "out")})
    monkeypatch.setattr(room, "run_bundle", fail)
    assert compare(recipe, ["lora", "few-shot"], seeds=2) == [
        entry for entry in ResultStore(compared / "out").entries() if entry.name in ("lora", "few-shot")
    ]
    with pytest.raises(ConfigError, match="differs in its seeds, 2 then and 3 now: name another output"):
        compare(recipe, ["lora"], seeds=3)
    with pytest.raises(ConfigError, match=r"differs in its epochs, 1\.0 then and 2\.0 now: name another output"):
        compare(recipe.model_copy(update={"epochs": 2.0}), ["last-layers"], seeds=2)


def test_each_entry_can_have_a_rate_of_its_own(models: dict[str, str], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", models["bert"], tmp_path / "unused", task="SEQ_CLS")
    output = tmp_path / "out"
    rates = "{head: 0.5, p-tuning-v2: 2e-2}"
    entries = ("--entries", "head,p-tuning-v2,full", "--learning-rates", rates, "--seeds", "1")
    assert run("compare", recipe, "--output", str(output), *entries) == 0
    kept = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in (output / "entries").glob("*.json")}
    used = {name: entry["asked"]["recipe"]["learning_rate"] for name, entry in kept.items()}
    assert used == {"head": 0.5, "p-tuning-v2": 0.02, "full": 5e-5}


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ("{lora: 0.1}", "a learning rate for 'lora', which is not trained: compare it, or drop its rate"),
        ("{zero-shot: 0.1}", "a learning rate for 'zero-shot', which is not trained"),
        ("{full: much}", "full: recipe: learning_rate is 'much'"),
        ("0.1", "--learning-rates '0.1' names no values: write it as in '{name: value}'"),
    ],
)
def test_rates_that_do_nothing_are_refused(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], rates: str, message: str
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", models["llama"], tmp_path / "unused")
    entries = ("--entries", "full,zero-shot", "--learning-rates", rates)
    assert run("compare", recipe, "--output", str(tmp_path / "out"), *entries) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_adapter_is_trained_into_the_folder(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", str(compared / "recipe.yaml"), "--output", str(compared / "out")) == 2
    assert "out has an experiment: choose another output" in capsys.readouterr().err
    assert not (compared / "out" / "full-1").exists()  # nothing is kept of a changed base model


def test_the_page_stands_alone(compared: Path) -> None:
    text = (compared / "out" / report.PAGE_NAME).read_text(encoding="utf-8")
    tags: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)

    Parser().feed(text)
    assert tags.count("svg") == 4
    assert tags.count("tr") == 2 * len(DEFAULT_ENTRIES)  # of two tables: the head, and all but one entry
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    markdown = (compared / "out" / report.MARKDOWN_NAME).read_text(encoding="utf-8")
    assert markdown.count("\n| ") == 2 + 2 * len(
        DEFAULT_ENTRIES
    )  # the head and the rule below it, and all but one entry
    assert "few-shot" in markdown


def test_an_entry_that_does_not_fit_is_told_and_the_others_go_on(models: dict[str, str], tmp_path: Path) -> None:
    changes = {"task": "SEQ_CLS", "template": "{words}", "options": {"num_virtual_tokens": 2}}
    file = write_recipe(tmp_path / "recipe.yaml", models["bert"], tmp_path / "out", **changes)
    found = compare(Recipe.load(file), ["p-tuning-v2", "zero-shot", "last-layers"], seeds=1)
    assert [bool(entry.failure) for entry in found] == [False, True, False]
    assert report.failures(found) == ["zero-shot: a head that is not trained answers nothing: leave this entry out"]
    json.loads((tmp_path / "out" / "entries" / "zero-shot.json").read_text(encoding="utf-8"))


def test_bad_input_is_one_line(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_recipe(tmp_path / "recipe.yaml", models["llama"], tmp_path / "out", test_size=0)
    assert run("compare", file, "--output", str(tmp_path / "out"), "--entries", "prefix") == 2
    assert "no entry 'prefix': use some of prefix-tuning" in capsys.readouterr().err
    for entries in ("", "lora, lora"):
        assert run("compare", file, "--output", str(tmp_path / "out"), "--entries", entries) == 2
        assert "name each once" in capsys.readouterr().err
    assert run("compare", file, "--output", str(tmp_path / "out")) == 2
    assert "an experiment needs rows to evaluate on" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="has no experiment and no adapter"):
        report.write(tmp_path / "nothing")


def test_what_does_not_go_with_an_entry_is_told_with_its_name(models: dict[str, str], tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "recipe.yaml", models["llama"], tmp_path / "out")
    recipe = Recipe.load(file)
    with pytest.raises(ConfigError, match="a comparison is of single adapters: set ensemble to 1, or sweep over it"):
        compare(recipe.model_copy(update={"ensemble": 2}))
    placed = Recipe.load(file, {"method": "PROMPT_TUNING", "template": "{prompt:3} {words} label : "})
    with pytest.raises(ConfigError, match="prefix-tuning: recipe: only PROMPT_TUNING and P_TUNING have"):
        compare(placed, ["prompt-tuning", "prefix-tuning"])
    [found] = compare(Recipe.load(file, {"examples": 3}), ["few-shot"], seeds=1)
    assert found.failure == "4 rows stand in front of a record, there are 3: leave this entry out"


def test_the_trainers_other_fields_go_with_any_entry_but_those_of_the_best_checkpoint(
    models: dict[str, str], tmp_path: Path
) -> None:
    own = {"gradient_accumulation_steps": 2, "batch_size": 2, "max_steps": 2, "optim": "adafactor"}
    own |= {"label_smoothing_factor": 0.1, "group_by_length": True, "dataloader_num_workers": 1}
    file = write_recipe(tmp_path / "recipe.yaml", models["llama"], tmp_path / "out", **own)
    found = compare(Recipe.load(file), ["prefix-tuning", "full"], seeds=1)
    assert [entry.outcomes[0].steps for entry in found] == [2, 2]
    recipe = Recipe.load(file, {"eval_steps": 1, "metric_for_best_model": "accuracy", "output": str(tmp_path / "more")})
    with pytest.raises(ConfigError, match="full: eval_steps keeps the best of adapters, and not full: leave one of"):
        compare(recipe, ["prefix-tuning", "full"])
    [validated] = compare(recipe, ["prefix-tuning"], seeds=1)
    assert validated.outcomes[0].steps == 2


def test_the_best_is_on_top_and_text_is_no_markup() -> None:
    def entry(name: str, *accuracies: float) -> Entry:
        numbers = {"trained": 10, "total": 1000, "stored": 40, "seconds": 2.0, "memory": 10**9, "steps": 3}
        numbers |= {"training_rows": 8, "evaluation_rows": 4}
        return Entry(name=name, outcomes=[Outcome(metrics={"accuracy": a}, **numbers) for a in accuracies])

    entries = [entry("worse", 0.5, 0.7), entry("better", 0.8, 0.9), Entry(name="none", outcomes=[], failure="a<b")]
    worth, costs = report.tables_of(entries)
    assert worth.head == ["", "accuracy"]
    assert worth.lines == [["better", "0.850 ± 0.071"], ["worse", "0.600 ± 0.141"]]
    assert costs.head == ["", "trained", "share", "seconds", "stored", "peak memory"]
    assert costs.lines[0] == ["better", "10", "1.000%", "2", "40 B", "1 GB"]
    page = as_html(Page(title="a & b", tables=[worth], notes=report.failures(entries)))
    assert "none: a&lt;b" in page
    assert "<h1>a &amp; b</h1>" in page
