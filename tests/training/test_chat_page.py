"""What docs/chat.md shows, run on a tiny model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tests.cli.test_cli import run
from tests.tiny import save_chat_model

PAGE = (Path(__file__).parents[2] / "docs" / "chat.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return save_chat_model(tmp_path / "model", max_position_embeddings=512)


WORDS = {"complaint": "bad", "praise": "good"}
"""Words of the tiny model for those of the page, which it does not tell apart."""


def test_recipes(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for texts in zip(blocks("yaml"), blocks("json"), strict=True):
        recipe, rows = (re.sub("|".join(WORDS), lambda found: WORDS[found[0]], text) for text in texts)
        [data] = re.findall(r"^train: (.*)$", recipe, re.MULTILINE)
        Path(data).write_text(rows, encoding="utf-8")
        file = Path(data).with_suffix(".yaml")
        file.write_text(recipe.replace("smollm2-135m", model), encoding="utf-8")
        assert run("train", str(file)) == 0, capsys.readouterr()
    [console] = blocks("console")
    commands = [shlex.split(line.removeprefix("$ softtune "), comments=True) for line in console.splitlines()]
    assert commands[0] == ["train", "talks.yaml"]
    for command in commands[1:]:
        assert run(*command) == 0, capsys.readouterr()


@pytest.mark.filterwarnings("ignore")  # of TRL
@pytest.mark.parametrize("number", range(3))
def test_scripts(number: int, model: str) -> None:
    script = blocks("python")[number].replace("smollm2-135m", model)
    names: dict[str, object] = {}
    exec(compile(script, f"docs/chat.md, script {number + 1}", "exec"), names)
    assert names["trainer"].state.global_step > 1  # type: ignore[attr-defined]


def test_every_script_is_run() -> None:
    assert len(blocks("python")) == 3
