"""The commands that have to do with vLLM, where it is missing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.cli.test_cli import run
from tests.families import CAUSAL_LM, METHODS, P, scramble
from tests.tiny import save_models
from tests.training.test_recipe_task import recipe as writing
from transformers import AutoModelForCausalLM

from softtune import PeftModel
from softtune.serving.prompt_export import PROMPT_NAME
from softtune.training.run import train


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_models(tmp_path_factory.mktemp("models"))["llama"]


def test_adapters_are_baked(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("mine", "not mine"):
        adapted = PeftModel(AutoModelForCausalLM.from_pretrained(llama), METHODS["prefix"](task_type=CAUSAL_LM))
        scramble(adapted).save_pretrained(tmp_path / name)
    assert run("bake", str(tmp_path / "mine"), "--model", llama, "--to", str(tmp_path / "baked")) == 0
    assert f"mine: texts begin with {P} placeholders" in capsys.readouterr().out
    assert (tmp_path / "baked" / "mine" / PROMPT_NAME).is_file()
    assert run("bake", str(tmp_path / "mine"), "--model", llama, "--to", str(tmp_path / "baked")) == 2
    assert "is there already: give the adapter's folder another name" in capsys.readouterr().err
    assert run("bake", str(tmp_path / "not mine"), "--model", llama, "--to", str(tmp_path / "baked")) == 2
    assert "'not mine' cannot name it there: use letters, digits" in capsys.readouterr().err


def test_places_within_a_text_are_refused(llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    within = {"template": "{x} {prompt:2}text : ", "method": "PROMPT_TUNING", "options": {}, "max_new_tokens": 8}
    train(writing(tmp_path, llama, [{"x": "red", "y": "warm"}] * 4, label_column="y", test_size=0, **within))
    assert run("bake", str(tmp_path / "out"), "--model", llama, "--to", str(tmp_path / "baked")) == 2
    assert "out has virtual tokens within its text: serve it by softtune serve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "vllm"], "pip install 'softtune[vllm]'"),
        (["--gpus", "2"], "the engine transformers takes one GPU: add --engine vllm"),
    ],
)
def test_what_is_missing_is_said_in_a_line(
    llama: str, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("softtune.extras.find_spec", lambda name: None if name == "vllm" else find_spec(name))
    assert run("serve", "--model", llama, *arguments) == 2
    assert message in capsys.readouterr().err
