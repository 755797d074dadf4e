"""``softtune tune``: from a file of a few examples to an adapter, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from safetensors.torch import load_file
from tests.cli.test_cli import run
from tests.tiny import LABELS, save_chat_model, save_models, write_rows

from softtune import DataError
from softtune.cli.tune import found_in
from softtune.methods import PeftType
from softtune.training.recipe import Recipe
from softtune.training.trainer import AdapterTrainer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    return save_models(folder, max_position_embeddings=768, attention_dropout=0.0)["llama"]


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return write_rows(tmp_path / "few.csv", 12)


SHORT = ("--max-steps", "3")


def test_a_file_is_all_that_it_takes(few: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tune", "--examples", few, "--model", model, *SHORT) == 0
    recipe = Recipe.from_adapter("few-adapter")
    assert recipe.template == "words: {words}\nlabel: "
    assert (recipe.label_column, recipe.labels, recipe.train) == ("label", sorted(LABELS), few)
    assert (recipe.start, recipe.leave_one_out, recipe.test_size) == ("examples", True, 0)
    assert recipe.config().token_dropout == 0.05
    shown = capsys.readouterr().out
    assert "start: examples" in shown
    assert "template:" in shown
    assert "leave-one-out accuracy" in shown
    assert "in context" in shown
    assert "after training" in shown


def test_other_rows_compare_it_with_the_examples_in_the_prompt(
    few: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = write_rows(tmp_path / "others.csv", 10)
    flags = (
        "--evaluation",
        others,
        "--template",
        "text : {words} label : ",
        "--output",
        "mine",
        "--learning-rate",
        "1e-3",
    )
    assert run("tune", "--examples", few, "--model", model, *flags, *SHORT) == 0
    metrics = json.loads(Path("mine/metrics.json").read_text())
    assert metrics["before"].keys() == metrics["after"].keys() != set()
    assert Recipe.from_adapter("mine").learning_rate == 1e-3
    assert "| metric | examples in context | with the adapter |" in Path("mine/README.md").read_text()
    shown = capsys.readouterr().out
    assert "leave-one-out" not in shown
    assert "before" in shown


def test_it_is_the_run_of_its_recipe(few: str, model: str, tmp_path: Path) -> None:
    assert run("tune", "--examples", few, "--model", model, *SHORT) == 0
    assert run("train", "few-adapter/recipe.yaml", "--output", "again") == 0
    one, two = (load_file(Path(folder, "adapter_model.safetensors")) for folder in ("few-adapter", "again"))
    assert all((one[name] == two[name]).all() for name in one)


def test_the_examples_are_the_demonstrations_of_cpt(few: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tune", "--examples", few, "--model", model, "--method", "CPT", *SHORT) == 0
    assert Recipe.from_adapter("few-adapter").method is PeftType.CPT
    config = json.loads(Path("few-adapter/adapter_config.json").read_text())
    assert len(config["cpt_token_ids"]) == len(config["cpt_tokens_type_mask"]) > 12
    assert max(config["cpt_tokens_type_mask"]) == 4 * 12
    shown = capsys.readouterr().out
    assert "method: CPT" in shown
    assert "without itself" not in shown
    assert "Traceback" not in shown


def test_an_interrupted_run_goes_on_by_the_command_that_is_shown(
    few: str, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, steps = AdapterTrainer.training_step, []

    def interrupted(self: AdapterTrainer, *args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", interrupted)
        assert run("tune", "--examples", few, "--model", model, *SHORT) == 130
    shown = capsys.readouterr().out
    assert f"softtune tune --examples {few} --model {model} --max-steps 3 --resume" in shown
    assert run("tune", "--examples", few, "--model", model, *SHORT, "--resume") == 0
    assert Path("few-adapter/adapter_model.safetensors").is_file()


def test_conversations(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": f"{word} sky"}, {"role": "assistant", "content": answer}]}
        for word, answer in (("red", "warm"), ("blue", "cold"), ("green", "good"))
    ]
    Path("talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chat = save_chat_model(tmp_path / "chat", max_position_embeddings=768)
    assert run("tune", "--examples", "talks.jsonl", "--model", chat, *SHORT) == 0
    assert Recipe.from_adapter("talks-adapter").messages == "messages"


@pytest.mark.parametrize(
    ("rows", "given", "found"),
    [
        (
            {"text": ["a", "b", "c", "d"], "label": ["x", "y", "x", "y"]},
            {},
            {"label_column": "label", "template": "text: {text}\nlabel: ", "labels": ["x", "y"]},
        ),
        (
            {"title": ["a", "b"], "body": ["c", "d"], "kind": [1, 1]},
            {},
            {"label_column": "kind", "template": "title: {title}\nbody: {body}\nkind: ", "labels": ["1"]},
        ),
        (
            {"question": ["a", "b", "c"], "answer": ["x", "y", "z"]},
            {},
            {"label_column": "answer", "template": "question: {question}\nanswer: "},
        ),
        (
            {"a": ["1", "2"], "b": ["x", "x"], "label": ["u", "v"]},
            {"label_column": "b"},
            {"label_column": "b", "template": "a: {a}\nlabel: {label}\nb: ", "labels": ["x"]},
        ),
        (
            {"text": ["a", "b"], "options": [["x", "y"]] * 2, "label": ["x", "x"]},
            {"choices": "options"},
            {"label_column": "label", "template": "text: {text}\nlabel: "},
        ),
        ({"text": ["a"], "output": [["x", "y"]]}, {}, {"label_column": "output", "template": "text: {text}\noutput: "}),
        ({"messages": [[]], "id": [1]}, {}, {"messages": "messages"}),
    ],
)
@pytest.mark.filterwarnings("ignore:the answers in 'answer' are generated as free texts")
def test_what_the_rows_suggest(rows: dict[str, Any], given: dict[str, Any], found: dict[str, Any]) -> None:
    assert found_in(Dataset.from_dict(rows), given) == found


def test_labels_that_are_rare_are_free_texts_with_a_word() -> None:
    long = ["it is as cold as ice", "it is as warm as bread", "it is good"]
    for answers in (["x", "y", "z"], ["x", "x", "y", "z", "v"], [*long, long[0]]):
        rows = Dataset.from_dict({"text": ["a"] * len(answers), "kind": answers})
        with pytest.warns(UserWarning, match=r"in 'kind' are generated as free texts, since .*: name them by --labels"):
            assert "labels" not in found_in(rows, {})
        assert "labels" not in found_in(rows, {"labels": ["x"]})  # without a word
    found_in(Dataset.from_dict({"text": ["a"] * 3, "kind": long}), {})


def test_rows_without_texts() -> None:
    with pytest.raises(DataError, match="no column beside 'label': add one with the texts"):
        found_in(Dataset.from_dict({"label": ["x"]}), {})


def test_auto_chooses_the_start_too(
    few: str, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"method": "BITFIT", "options": {"add_missing": True}, "learning_rate": 0.1}
    monkeypatch.setattr("softtune.training.recipe.chosen_fields", lambda *_: fields)
    assert run("tune", "--examples", few, "--model", model, "--method", "auto", "--max-steps", "1") == 0
    assert Recipe.from_adapter("few-adapter").start is None
    assert "add_missing: true" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "model is missing"),
        (("--model", "MODEL", "--num-virtual-tokens", "3"), "No such option"),
        (
            ("--model", "MODEL", "--options", "{num_virtual_tokens: 5000}"),
            "num_virtual_tokens is 5000, and the 12 examples",
        ),
        (("--model", "MODEL", "--method", "bitfit"), "start: examples is for virtual tokens"),
        (
            ("--model", "MODEL", "--method", "CPT", "--start", "method"),
            "CPT has no demonstrations: set start: examples",
        ),
        (("--model", "MODEL", "--label-column", "lable"), "did you mean 'label'?"),
        (("--model", "MODEL", "--labels", "[warm, cold, good]"), "labelled 'good'"),
        (("--model", "MODEL", "--max-length", "768"), "of which a text may take all: lower max_length"),
    ],
)
def test_what_does_not_fit_is_one_line(
    few: str, model: str, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [model if argument == "MODEL" else argument for argument in arguments]
    assert run("tune", "--examples", few, *given) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_not_there(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tune", "--examples", "none.jsonl", "--model", model) == 2
    assert "none.jsonl" in capsys.readouterr().err
