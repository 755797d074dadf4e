"""``softtune distill`` from the command line, and what docs/distill.md shows, run on a tiny model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tests.cli.test_cli import interrupt_in_step, run
from tests.tiny import save_chat_model, save_models

from softtune.distillation import self_study
from softtune.serving.prompt_export import PROMPT_NAME

TEXT = " ".join(["red sky is cold", "blue sky is warm", "the text is good", "green is bad"] * 5)
PAGE = (Path(__file__).parents[2] / "docs" / "distill.md").read_text(encoding="utf-8")
QUICK = ["--num-questions", "8", "--steps", "4", "--batch-size", "2", "--save-steps", "2", "--max-answer-tokens", "6"]


@pytest.fixture
def chat(tmp_path: Path) -> str:
    return save_chat_model(tmp_path / "chat", max_position_embeddings=1024)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "manual.md").write_text(TEXT)
    return str(tmp_path / "corpus")


def test_a_corpus_is_distilled_and_goes_on_after_an_interrupt(
    chat: str, corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["distill", corpus, "--model", chat, "--tokens", "12", "--output", str(tmp_path / "out"), *QUICK]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_in_step(patch, 3)
        assert run(*command) == 130
    assert f"softtune: stopped; what is done is kept in {tmp_path / 'out'}: the same" in capsys.readouterr().err
    assert run(*command) == 0
    shown = capsys.readouterr()
    assert "1 questions with answers of the model with the text in its context" in shown.out
    assert all(re.search(rf"^│ {name} +│", shown.out, re.MULTILINE) for name in ("cartridge", "full text", "BM25"))
    assert f"The cartridge is {tmp_path / 'out'}." in shown.out
    assert "training" in shown.err
    assert run(*command) == 2
    assert "has a finished adapter: choose another output or delete it" in capsys.readouterr().err
    assert run("bake", str(tmp_path / "out"), "--model", chat, "--to", str(tmp_path / "baked")) == 0
    assert (tmp_path / "baked" / "out" / PROMPT_NAME).is_file()


def test_a_method_that_does_not_fit_is_named_below_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_chat_model(tmp_path / "chat", max_position_embeddings=512)
    command = ["distill", "--text", " ".join([TEXT] * 5), "--model", model, "--tokens", "12"]
    assert run(*command, "--output", str(tmp_path / "out"), *QUICK) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^full text: needs \d+ positions, the model has 512$", shown, re.MULTILINE)
    assert not re.search(r"^│ full text", shown, re.MULTILINE)
    assert "contains" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a distillation takes a corpus or a text: give one of the two"),
        (["nowhere"], "there is no file or folder nowhere: check the path"),
        (["--text", " "], "the text has no text: give a file with the text to distil"),
        (["--text", "red sky", "--tokens", "900"], "tokens is 900, and the text has "),
        (["--text", "red sky", "--tokens", "4096"], "positions, the model has 2048: lower tokens or max_answer_tokens"),
        (["--text", "red sky", "--learning-rate", "0"], "learning_rate: Input should be greater than 0: correct this"),
        (["--text", "red sky", "--role", "boss"], "role: Input should be 'user' or 'system': correct this field"),
        (["--text", "red sky", "--dtype", "int3"], "dtype is 'int3'"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_chat_model(tmp_path / "chat", max_position_embeddings=2048)
    assert run("distill", *arguments, "--model", model, "--output", str(tmp_path / "out")) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("softtune: ")
    assert message in last


def test_a_model_that_writes_nothing_says_so(chat: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_study, "write_texts", lambda model, tokenizer, prompts, **options: [""] * len(prompts))
        command = ["distill", "--text", TEXT, "--model", chat, "--tokens", "12", "--output", str(tmp_path / "out")]
        assert run(*command, *QUICK) == 2
    assert "written no question with an answer: use an instruction-tuned model" in capsys.readouterr().err


def test_an_encoder_is_refused(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = save_models(tmp_path)
    assert run("distill", corpus, "--model", models["bert"], "--output", str(tmp_path / "out")) == 2
    assert "is no decoder" in capsys.readouterr().err.splitlines()[-1]


def test_the_page(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_chat_model(tmp_path / "smollm2-135m", max_position_embeddings=1024)
    [questions] = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    Path("questions.jsonl").write_text(questions)
    [script] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL):
        for line in block.splitlines():
            command = shlex.split(line.removeprefix("$ softtune "), comments=True)
            assert command[0] in ("distill", "serve")
            if command[0] == "distill":
                small = [*QUICK, "--tokens", "12", "--model", str(tmp_path / "smollm2-135m")]
                assert run(*command, *small) == 0, capsys.readouterr()
    names: dict[str, object] = {}
    fewer = "tokens=12, num_questions=8, steps=4, max_answer_tokens=6"
    code = script.replace("tokens=512", fewer).replace("smollm2-135m", str(tmp_path / "smollm2-135m"))
    exec(compile(code, "docs/distill.md", "exec"), names)
    assert "report" in names
