"""The library without its extras: it trains, and what needs an extra says so in one line."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from softtune.cli import NEEDS
from softtune.errors import MissingExtraError, SofttuneError
from softtune.extras import EXTRAS, require
from softtune_command import COMMANDS
from tests.cli.test_cli import run
from tests.tiny import LABELS, TEMPLATE, save_models, write_rows

UNDER_OTHERS = {"psutil", "tokenizers", "fsspec"}
"""Packages without which accelerate, transformers and datasets cannot be imported."""
HIDDEN = {package for extra in EXTRAS.values() for package in extra.packages} - UNDER_OTHERS
WITHOUT = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        return None if name.partition(".")[0] in {HIDDEN} else self.finder.find_spec(name, *args)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
LIBRARY = """
import torch
from softtune import *
from softtune.data import *
from softtune.errors import *
from softtune.evaluation import *
from softtune.pretrained import *
from softtune.tasks import *
from softtune.training import *

fields = {fields!r}
recipe = Recipe.from_fields({{**fields, "test_size": 0}})
report = train(recipe)
assert (report.finished, report.steps) == (True, 4)
base, tokenizer = load_base_model(recipe.model)
model = PeftModel.from_pretrained(base, recipe.output)
ids = torch.tensor([[5, 6, 7]])
with model.disable_adapter():
    plain = model(ids).logits
assert not torch.allclose(model(ids).logits, plain)


def told(what):
    try:
        what()
    except MissingExtraError as error:
        print(error)


def import_service():
    from softtune.serving import Service


def import_app():
    import softtune.serving.http.app


def import_sweep():
    from softtune.experiments import run_sweep


told(lambda: train(Recipe.from_fields({{**fields, "output": "evaluated"}})))
told(lambda: TextTask.measure(None, ["red"], ["red"]))
assert [kind.needs_metrics for kind in (TextTask, SpanTask)] == [True, False]
assert SpanTask.measure(None, [[]], [""]).metrics["f1"] == 1
told(import_service)
told(import_app)
told(import_sweep)
"""


def without_extras(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_the_library_trains_and_says_what_it_lacks(tmp_path: Path) -> None:
    fields = {
        "model": save_models(tmp_path / "models")["llama"],
        "train": write_rows(tmp_path / "rows.csv", 16),
        "template": TEMPLATE,
        "label_column": "label",
        "labels": list(LABELS),
        "batch_size": 4,
        "options": {"num_virtual_tokens": 3},
        "output": "trained",
    }
    done = without_extras(LIBRARY.format(fields=fields), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "measuring answers needs sklearn: pip install 'softtune[metrics]'",
        "measuring answers needs sklearn: pip install 'softtune[metrics]'",
        "the server needs fastapi: pip install 'softtune[serve]'",
        "the server needs fastapi: pip install 'softtune[serve]'",
        "an experiment or report needs matplotlib: pip install 'softtune[experiments]'",
    ]
    assert not (tmp_path / "evaluated").exists()


@pytest.mark.parametrize("arguments", [(), ("train", "recipe.yaml")])
def test_the_command_without_its_extra_is_one_line(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = without_extras("import softtune_command; softtune_command.main()", *arguments, cwd=tmp_path)
    line = "softtune: the command line needs typer: pip install 'softtune[cli]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_without_its_extra_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = NEEDS.get(name, "cli")
    package = EXTRAS[extra].packages[-1]
    monkeypatch.setattr("softtune.extras.find_spec", lambda other: None if other == package else find_spec(other))
    assert run(name, "--help") == 2
    line = f"softtune: {EXTRAS[extra].user} needs {package}: pip install 'softtune[{extra}]'\n"
    assert tuple(capsys.readouterr()) == ("", line)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("serve", "the server needs fastapi: pip install 'softtune[serve,cli]'"),
        ("sweep", "an experiment or report needs matplotlib: pip install 'softtune[experiments,cli]'"),
    ],
)
def test_a_command_names_all_extras_that_it_lacks(
    name: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("softtune.extras.find_spec", lambda package: None)
    assert run(name, "--help") == 2
    assert tuple(capsys.readouterr()) == ("", f"softtune: {line}\n")


@pytest.mark.parametrize(
    ("extra", "included"), [(name, one) for name, extra in EXTRAS.items() for one in extra.includes]
)
def test_what_an_extra_includes_is_named_by_it(extra: str, included: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = EXTRAS[included].packages[0]
    monkeypatch.setattr("softtune.extras.find_spec", lambda other: None if other == package else find_spec(other))
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'softtune\[{extra}\]'"):
        require(extra)


def test_the_error_is_softtunes_and_pythons() -> None:
    assert issubclass(MissingExtraError, SofttuneError)
    assert issubclass(MissingExtraError, ImportError)
    assert str(MissingExtraError("one line")) == "one line"
