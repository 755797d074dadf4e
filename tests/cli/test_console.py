"""What the commands show and write: texts as they are, and one line where a file cannot be written."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from rich.progress import Progress
from tests.cli.test_cli import run, write_recipe
from tests.tiny import save_models

from softtune import ConfigError
from softtune.cli.console import console, progress_bars, show_pairs
from softtune.training.progress import TRAINING, Phase


def test_brackets_and_colons_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    show_pairs("[red]title", [("init_text", "[INST] is it :heart: or :x:? [/INST]")])
    shown = capsys.readouterr().out
    assert "[red]title" in shown
    assert "[INST] is it :heart: or :x:? [/INST]" in shown
    console.print("[/b] https://a.b/c?d=1")
    assert capsys.readouterr().out == "[/b] https://a.b/c?d=1\n"


def test_bars_without_a_task_leave_no_empty_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError), progress_bars():
        raise ConfigError("the recipe is wrong: mend it")
    assert capsys.readouterr().err == ""
    with progress_bars() as progress:
        progress(TRAINING, 3, 3, "")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("training")


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ({}, "training"),
        ({"member": "2"}, "training 2"),
        ({"run": "a: b"}, "a: b: training"),
        ({"run": "out", "member": "2"}, "out: training 2"),
    ],
)
def test_a_bar_has_the_names_of_its_run_and_member(
    capsys: pytest.CaptureFixture[str], names: dict[str, str], shown: str
) -> None:
    with progress_bars() as progress:
        progress(Phase("training", **names), 3, 3, "")
    assert capsys.readouterr().err.startswith(f"{shown:<26} ")


def test_the_clock_of_a_bar_starts_anew_with_its_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = list[float]()
    monkeypatch.setattr(Progress, "stop", lambda bars: clocks.append(bars.tasks[0].elapsed))
    with progress_bars() as progress:
        progress(TRAINING, 3, 3, "first")
        time.sleep(0.5)
        progress(TRAINING, 1, 3, "second")
    assert clocks[0] < 0.5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    base = save_models(folder)["llama"]
    options = {"num_virtual_tokens": 3, "init_text": "text : the sky"}
    assert run("train", write_recipe(folder / "recipe.yaml", base, folder / "out[/b]", options=options)) == 0
    return folder / "out[/b]"


def test_a_folder_may_have_brackets(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", str(trained)) == 0
    assert run("generate", str(trained), "--text", "the sky", "--max-new-tokens", "40") == 0
    assert capsys.readouterr().err.count("\n") < 10


def test_texts_to_write_have_room_in_the_models_positions(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", str(trained), "--text", "red " * 50, "--max-new-tokens", "40") == 0
    assert "1 of 1 records were cut to fit" in capsys.readouterr().err
    assert run("generate", str(trained), "--text", "red", "--max-new-tokens", "64") == 2
    message = "the model has 64 positions, 3 virtual and 64 new tokens leave none for a text"
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc refuses new folders to everyone")
def test_answers_that_cannot_be_written_are_refused_before_any_work(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("predict", str(trained), "--text", "the sky", "--output", "/proc/nowhere/answers.csv") == 2
    error = capsys.readouterr().err
    assert error.startswith("softtune: ")
    assert error.count("\n") == 1
    assert "/proc/" in error
