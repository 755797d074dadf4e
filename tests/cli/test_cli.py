"""The command line from end to end, in this process, on a tiny model."""

from __future__ import annotations

import builtins
import csv
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.families import save_adapter
from tests.tiny import LABELS, TEMPLATE, save_models, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import softtune_command
from softtune import MultitaskPromptTuningConfig, PeftModel
from softtune.cli import module_of
from softtune.cli.console import quiet
from softtune.cli.flags import overrides
from softtune.cli.serve import _renamed as serve_sizes
from softtune.compat import INSTALLED
from softtune.promises import PROMISES
from softtune.training.recipe import Recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def trained(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of each kind that ``inspect`` shows in its own way."""
    folder = tmp_path_factory.mktemp("trained")
    kinds = {"prefix": "PREFIX_TUNING", "words": "PROMPT_TUNING", "biases": "BITFIT", "factors": "IA3"}
    for name, method in kinds.items():
        recipe = write_recipe(folder / f"{name}.yaml", models["llama"], folder / name, method=method)
        assert run("train", recipe) == 0
    return {name: folder / name for name in kinds}


def write_recipe(file: Path, base: str, output: Path, **changes: Any) -> str:
    own: dict[str, dict[str, Any]] = {"BITFIT": {"add_missing": True}, "BEFT": {}, "IA3": {}}
    options = own.get(changes.get("method", ""), {"num_virtual_tokens": 3})
    fields = {
        "model": base,
        "train": write_rows(file.with_suffix(".csv"), 16),
        "test_size": 4,
        "template": TEMPLATE,
        "label_column": "label",
        "labels": list(LABELS),
        "max_length": 24,
        "batch_size": 4,
        "options": options,
        "output": str(output),
        **changes,
    }
    file.write_text(yaml.safe_dump(fields))
    return str(file)


def run(*arguments: str) -> int:
    """Run ``softtune`` with these arguments; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["softtune", *arguments])
        patch.setenv("COLUMNS", "200")
        try:
            softtune_command.main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def interrupt_in_step(patch: pytest.MonkeyPatch, number: int) -> list[Any]:
    """Press Ctrl-C in an optimiser's step, counted over all runs; the steps, as they come."""
    step, calls = torch.optim.AdamW.step, list[Any]()

    def step_and_interrupt(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    patch.setattr(torch.optim.AdamW, "step", step_and_interrupt)
    return calls


def test_train_shows_what_the_run_came_to(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", models["llama"], tmp_path / "adapter")
    assert run("train", recipe, "--learning-rate", "0.03", "--epochs", "2") == 0
    shown = capsys.readouterr().out
    for part in (
        "balanced accuracy",
        "before",
        "after",
        "trained parameters",
        "12 rows",
        "6 steps",
        str(tmp_path)[:10],
    ):
        assert part in shown
    assert Recipe.from_adapter(tmp_path / "adapter").learning_rate == 0.03


def test_recipes_at_once_show_a_table_each(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["one", "other"]
    recipes = [write_recipe(tmp_path / f"{name}.yaml", models["llama"], tmp_path / name) for name in names]
    assert run("train", *recipes, "--epochs", "2") == 0
    shown = capsys.readouterr()
    assert shown.out.count("6 steps") == 2
    for name in names:
        assert str(tmp_path / name) in shown.out
        assert Recipe.from_adapter(tmp_path / name).epochs == 2


def test_profile_shows_where_a_step_goes(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", models["llama"], tmp_path / "adapter")
    assert run("train", recipe, "--profile") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("matrix products alone", "reading the weights", "tokens/s"))
    limit = "(its matrix products alone|reading the weights twice), the higher of these two limits"
    assert re.search(rf"A step takes [0-9.]+ times as long as {limit}\.", shown)
    assert not (tmp_path / "adapter").exists()
    assert run("train", recipe, recipe, "--profile") == 2
    assert "one recipe is measured at a time" in capsys.readouterr().err
    assert run("train", recipe, "--resume", "--profile") == 2
    assert "--resume goes on with a run, and to measure begins none" in capsys.readouterr().err


def test_profile_writes_no_messages_of_its_libraries(models: dict[str, str], tmp_path: Path) -> None:
    """In a process of its own: torch's profiler reads once how much it may say."""
    recipe = write_recipe(tmp_path / "r.yaml", models["llama"], tmp_path / "adapter")
    command = [sys.executable, "-c", "import softtune_command; softtune_command.main()", "train", recipe, "--profile"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tokens/s" in done.stdout
    assert not done.stderr


def test_the_learning_rate_finder_says_where_it_stopped_and_what_to_try(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softtune.training.learning_rate.HIGHEST", 1e38)  # a tiny model takes much
    recipe = write_recipe(tmp_path / "r.yaml", models["llama"], tmp_path / "adapter", method="BITFIT")
    assert run("train", recipe, "--find-learning-rate") == 0
    shown = capsys.readouterr().out
    assert re.search(r"Stopped after step [0-9]+ of 40: (the loss was more than 2 times|at the next rate the)", shown)
    assert re.search(r"Try --learning-rate [0-9]e[-+][0-9]+, a tenth of the rate at which the loss was lowest\.", shown)
    assert not (tmp_path / "adapter").exists()


def test_failures_are_told_before_an_interrupt_and_what_is_finished_after(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write_recipe(tmp_path / "good.yaml", models["llama"], tmp_path / "good", epochs=3)
    wild = {"learning_rate": 1e38, "max_grad_norm": 1e9}
    bad = write_recipe(tmp_path / "bad.yaml", models["llama"], tmp_path / "bad", **wild)
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 6)
        assert run("train", good, bad) == 130
    shown = capsys.readouterr()
    assert f"softtune: {tmp_path / 'bad'}: the loss is " in shown.err
    assert "Go on with: softtune train" in shown.out
    assert run("train", good, bad, "--resume") == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path / 'bad'} was finished before." in shown
    assert "9 steps" in shown


def test_of_several_runs_the_failed_ones_are_named(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_recipe(tmp_path / "good.yaml", models["llama"], tmp_path / "good")
    wild = {"learning_rate": 1e38, "max_grad_norm": 1e9}
    bad = write_recipe(tmp_path / "bad.yaml", models["llama"], tmp_path / "bad", **wild)
    assert run("train", good, bad) == 2
    shown = capsys.readouterr()
    assert "accuracy" in shown.out
    assert shown.err.splitlines()[-1].startswith(f"softtune: {tmp_path / 'bad'}: the loss is ")


def test_an_ensemble_answers_together(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, adapter = write_recipe(tmp_path / "r.yaml", models["llama"], tmp_path / "a", ensemble=3), tmp_path / "a"
    assert run("train", recipe) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("accuracy by vote", "accuracy of one", "% on average"))
    found = {}
    for options in ((), ("--vote",)):
        assert run("predict", str(adapter), str(tmp_path / "r.csv"), *options, "--output", str(tmp_path / "o.csv")) == 0
        rows = csv.DictReader((tmp_path / "o.csv").read_text().splitlines())
        found[options] = [float(row["probability"]) for row in rows]
    assert {round(3 * p, 4) for p in found[("--vote",)]} <= {2.0, 3.0}
    assert found[()] != found[("--vote",)]
    capsys.readouterr()
    for command in (("generate", str(adapter), "--text", "red"), ("inspect", str(adapter))):
        assert run(*command) == 2
        assert f"has 3 adapters: name the folder of one, such as {adapter / '1'}" in capsys.readouterr().err
    assert run("inspect", str(adapter / "1")) == 0
    assert run("predict", str(adapter / "1"), "--text", "red") == 0
    capsys.readouterr()
    assert run("predict", str(adapter / "1"), "--text", "red", "--vote") == 2
    assert "has one adapter, which has no one to vote with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("generate", "--seed", "3"), "--seed draws nothing without --temperature: give both, or neither"),
        (("predict", "--split", "test"), "--split names a part of a data set, --text has none: drop one of the two"),
    ],
)
def test_flags_without_effect_are_refused(
    trained: dict[str, Path], capsys: pytest.CaptureFixture[str], command: tuple[str, ...], message: str
) -> None:
    assert run(command[0], str(trained["words"]), "--text", "red", *command[1:]) == 2
    assert message in capsys.readouterr().err


def test_a_null_unsets_a_field() -> None:
    assert overrides({"evaluation": "null", "model": "null", "patience": "null"}) == {
        "evaluation": None,
        "model": "null",
        "patience": None,
    }


def test_every_field_of_the_recipe_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in Recipe.model_fields)


def test_the_overview_imports_no_command_and_says_what_they_do() -> None:
    code = "import sys, softtune_command\ntry: softtune_command.main()\nfinally: assert 'softtune' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in softtune_command.COMMANDS)
    for name, summary in softtune_command.COMMANDS.items():
        described = module_of(name).command.__doc__.partition("\n\n")[0]
        assert " ".join(described.split()) == summary


def test_help_shows_defaults_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "One of PROMPT_TUNING, P_TUNING, PREFIX_TUNING, P_TUNING_V2, BITFIT, CARTRIDGE, CPT, MULTITASK_PROMPT_TUNING, "
        "ADAPTION_PROMPT, PREFIX_MEMORY, BEFT, IA3, COMBINED. [default: PREFIX_TUNING]",
        "One of CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, QUESTION_ANS. [default: CAUSAL_LM]",
        "One of linear, constant, cosine. [default: linear]",
        "[default: 0.2]",
    ):
        assert part in shown


def test_predict_answers_a_file_and_measures_it(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "new.csv", 30)
    assert run("predict", str(trained["prefix"]), data, "--output", str(tmp_path / "answers.csv")) == 0
    shown = capsys.readouterr().out
    assert "20 of 30 records" in shown
    assert "balanced accuracy" in shown
    with (tmp_path / "answers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["words", "label", "answer", "probability"]
    assert len(rows) == 30
    assert {row["answer"] for row in rows} <= set(LABELS)
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)


def test_predict_counts_the_rows_of_the_file_where_records_are_made_one(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts: dict[str, Any] = {"labels": None, "max_new_tokens": 2, "test_size": 1}
    recipe = write_recipe(tmp_path / "r.yaml", models["llama"], tmp_path / "adapter", **texts)
    assert run("train", recipe, "--epochs", "0.5") == 0
    data = tmp_path / "new.csv"
    data.write_text("words,label\nred,zero\nred,one\nblue,two\n")
    capsys.readouterr()
    assert run("predict", str(tmp_path / "adapter"), str(data)) == 0
    shown = capsys.readouterr().out
    assert "3 records, of which 2 are different" in shown
    assert "2 of 2 records are not answered right to the letter" in " ".join(shown.split())
    mistakes = shown[shown.index("2 of 2 records are not answered") :]
    assert [cells[1].strip() for line in mistakes.splitlines() if len(cells := line.split("│")) > 2] == ["1", "3"]


def test_predict_takes_texts(trained: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("predict", str(trained["words"]), "--text", "red sky", "--text", "blue sky") == 0
    shown = capsys.readouterr().out
    assert "red sky" in shown
    assert "blue sky" in shown


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ([], {"do_sample": False}),
        (["--beams", "3"], {"do_sample": False, "num_beams": 3}),
        (["--temperature", "1.5", "--seed", "3"], {"do_sample": True, "temperature": 1.5}),
        (["--temperature", "1.5", "--seed", "4"], {"do_sample": True, "temperature": 1.5}),
    ],
)
def test_generate_writes_what_the_library_does(
    models: dict[str, str],
    trained: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    settings: dict[str, Any],
) -> None:
    words = AutoTokenizer.from_pretrained(models["llama"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models["llama"]), trained["words"])
    prompt = words("text : red sky label :", return_tensors="pt")
    torch.manual_seed(int(flags[-1]) if "--seed" in flags else 0)
    ids = model.generate(**prompt, max_new_tokens=12, pad_token_id=words.pad_token_id, **settings)
    expected = words.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    capsys.readouterr()
    assert run("generate", str(trained["words"]), "--text", "red sky", "--max-new-tokens", "12", *flags) == 0
    assert capsys.readouterr().out.strip() == " ".join(expected.split())


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("prefix", ["Mean norms of the prefix", "decoder", "prompt_embeddings", "3 x 48"]),
        ("words", ["nearest vocabulary entries", "3 x 24"]),
        ("biases", ["Mean absolute change", "query", "layer_norm"]),
        ("factors", ["Mean distance", "key", "output"]),
    ],
)
def test_inspect_shows_config_sizes_and_states(
    trained: dict[str, Path], kind: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run("inspect", str(trained[kind])) == 0
    shown = capsys.readouterr().out
    for part in ("peft_type", "adapter_model.safetensors", *parts):
        assert part in shown


def test_inspect_and_report_show_one_of_several_tasks(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recipes train one; the others may be of a training loop of one's own."""
    out = tmp_path / "out"
    options = {"num_virtual_tokens": 3}
    recipe = write_recipe(tmp_path / "r.yaml", models["llama"], out, method="MULTITASK_PROMPT_TUNING", options=options)
    assert run("train", recipe) == 0
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2)
    save_adapter(models["llama"], out, config, seed=1)
    capsys.readouterr()
    assert run("inspect", str(out)) == 0
    shown = capsys.readouterr().out
    assert "The prompt of task 0, of 2:" in shown
    assert "nearest vocabulary entries" in shown
    assert run("report", str(out)) == 0
    assert "They are those of task 0." in (out / "report.html").read_text(encoding="utf-8")


def test_ctrl_c_and_resume_lose_no_step(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", models["llama"], tmp_path / "adapter", epochs=3)
    calls = interrupt_in_step(monkeypatch, 5)
    assert run("train", recipe) == 130
    assert "Stopped after step 5" in capsys.readouterr().out
    assert run("train", recipe, "--resume") == 0
    assert len(calls) == 9


def test_resume_from_a_named_checkpoint(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"epochs": 2, "save_steps": 1, "save_total_limit": 9}
    recipe = write_recipe(tmp_path / "r.yaml", models["llama"], tmp_path / "adapter", **own)
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 3)
        assert run("train", recipe) == 130
    assert run("train", recipe, "--resume-from", "checkpoint-9") == 2
    assert "has no checkpoint-9: it has checkpoint-1, checkpoint-2, checkpoint-3: name one" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        steps = interrupt_in_step(patch, 99)
        assert run("train", recipe, "--resume-from", "checkpoint-1") == 0
    assert len(steps) == 5
    assert run("train", recipe, "--resume-from", "checkpoint-1", "--profile") == 2
    assert "--resume goes on with a run, and to measure begins none" in capsys.readouterr().err


def test_push_to_hub_is_a_flag(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    recipe = write_recipe(tmp_path / "r.yaml", models["llama"], tmp_path / "adapter")
    assert run("train", recipe, "--push-to-hub", "--hub-model-id", "me/adapter") == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert shown[-1].startswith("softtune: push_to_hub needs a login to the hub: run hf auth login")
    assert not (tmp_path / "adapter").exists()


def test_ctrl_c_twice_says_what_is_kept(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", models["llama"], tmp_path / "adapter")

    def interrupt_twice(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupt_twice)
        assert run("train", recipe) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("softtune: stopped at once; no checkpoint is kept")
    for command, *text in (["predict", "--text", "red"], ["generate", "--text", "red"], ["inspect"], ["report"]):
        assert run(command, str(tmp_path / "adapter"), *text) == 2
        assert "is unfinished: go on with softtune train --resume, or train anew" in capsys.readouterr().err
    assert run("train", recipe) == 0


def test_ctrl_c_ends_any_command_with_one_line(
    trained: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("softtune.cli.predict.load_trained", interrupt)
    assert run("predict", str(trained["prefix"]), "--text", "red") == 130
    assert capsys.readouterr().err == "softtune: stopped\n"


def test_ctrl_c_while_the_library_is_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = builtins.__import__

    def interrupt(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "softtune.cli":
            raise KeyboardInterrupt
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", interrupt)
    assert run("inspect", "adapter") == 130
    assert capsys.readouterr().err == "softtune: stopped\n"


def test_predict_refuses_before_any_work(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softtune.cli.predict.load_trained", None)
    data = write_rows(tmp_path / "new.csv", 6)
    (tmp_path / "bad.csv").write_text("words,label\nred sky,warm\nblue sky,tepid\n")
    (tmp_path / "other.csv").write_text("text,label\nred sky,warm\n")
    (tmp_path / "folder").mkdir()
    other = str(tmp_path / "other.csv")
    answers = str(tmp_path / "answers.csv")
    for arguments, message in (
        ([data, "--output", str(tmp_path / "folder")], "folder is a folder: name a CSV or JSONL file"),
        ([data, "--output", str(tmp_path / "a.txt")], "a.txt is neither CSV nor JSONL: let its name end in .csv"),
        ([other], f"reads the column 'words', which {other} lacks; it has 'text', 'label': rename one of them"),
        ([data, "--output", f"{data}/below.csv"], "new.csv is a file: name a folder"),
        ([str(tmp_path / "bad.csv"), "--output", answers], "row 2: label 'tepid' is not one of 'warm', 'cold'"),
    ):
        assert run("predict", str(trained["prefix"]), *arguments) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert message in error
    assert not Path(answers).exists()


def test_inspect_refuses_another_base_model_before_it_shows_anything(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_models(tmp_path, seed=1)["llama"]
    assert run("inspect", str(trained["prefix"]), "--model", other) == 2
    shown = capsys.readouterr()
    assert "another base model" in shown.err
    assert shown.err.strip().endswith("/llama")  # its own
    assert not shown.out


def test_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["inspect", "no/where"], ["predict", "no/where", "--text", "red"]):
        assert run(*arguments) == 2
        assert capsys.readouterr().err == "softtune: there is no folder no/where: check the path\n"


def test_the_libraries_below_are_quiet() -> None:
    quiet()
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "{txt} : "}, "txt"),
        ({"train": "nowhere.csv"}, "nowhere.csv"),
        ({"labels": ["warm"]}, r"r\.csv: row 1: label 'cold' is not one of 'warm'; add it to labels"),
        ({"options": {"num_virtual_tokens": 0}}, r"recipe: PrefixTuningConfig\.num_virtual_tokens = 0: Input should"),
        ({"max_length": 4}, "max_length is 4"),
        ({"model": "nowhere/at-all"}, "cannot load the base model"),
        ({"options": {"layers": "last:9"}}, "'first:N' or 'last:N' with N from 1 to 2"),
        ({"method": "BITFIT", "options": {}}, "add_missing=True"),
        ({"batch": 3}, "no such field"),
        ({"labels": {"warm": "hot", "cold": "icy"}}, "labels 'cold' and 'warm' are the same tokens to the model"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", models["llama"], tmp_path / "adapter", **changes)
    assert run("train", recipe) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(f"^softtune: .*{message}", error)
    assert error.count("recipe") <= 1
    assert not (tmp_path / "adapter").exists()


def test_an_empty_file(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", models["llama"], tmp_path / "adapter")
    (tmp_path / "empty.csv").write_text("words,label\n")
    assert run("train", recipe, "--train", str(tmp_path / "empty.csv")) == 2
    assert "empty.csv" in capsys.readouterr().err


def test_an_adapter_for_another_base_model(
    models: dict[str, str], trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_models(tmp_path, seed=1)["llama"]
    assert run("predict", str(trained["prefix"]), "--text", "red", "--model", other) == 2
    assert "another base model" in capsys.readouterr().err


def test_a_base_model_of_another_kind(
    models: dict[str, str], trained: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("predict", str(trained["prefix"]), "--text", "red", "--model", models["bert"]) == 2
    what = f"the base model {models['bert']!r} is no decoder and goes on from no text"
    remedy = f"name the adapter's own with --model, {models['llama']}, or a copy of it"
    assert capsys.readouterr().err == f"softtune: {what}: {remedy}\n"


def test_every_method_of_a_check_is_shown_in_a_narrow_terminal(models: dict[str, str]) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("softtune"), "check", models["llama"]],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    lines = [line for line in done.stdout.splitlines() if "bitfit" in line and "p tuning" in line]
    assert len(lines) == 1
    assert max(map(len, done.stdout.splitlines()[:10])) <= 80


def test_check_shows_promises_by_methods(
    models: dict[str, str],
    trained: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run("check", models["llama"], "--method", "prefix-tuning", "--method", "BITFIT") == 0
    shown = capsys.readouterr().out
    assert f"LlamaForCausalLM, transformers {INSTALLED}, float32, sdpa" in shown
    assert shown.count("holds") == 2 * len(PROMISES)
    assert run("check", models["llama"], "--adapter", str(trained["words"])) == 0
    assert "prompt tuning" in " ".join(capsys.readouterr().out.split())
    assert run("check", models["bert"], "--task", "SEQ_CLS", "--method", "prefix_tuning") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "cached decoding gives the outputs of one forward is not asked, it writes no text" in shown
    broken = PROMISES["padding"]._replace(check=lambda probe: "off by [1]")
    monkeypatch.setitem(PROMISES, "padding", broken)
    assert run("check", models["llama"], "--method", "prompt_tuning") == 1
    output = capsys.readouterr()
    assert "give the same outputs FAILS, off by [1]" in output.out
    assert re.search(r"│ FAILS +│", output.out)
    assert output.err == "softtune: promises fail for prompt-tuning: see the table\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "lora"), "--method 'lora' is no method: use one of prefix-tuning, "),
        (("--task", "X"), "no base model is loaded for task X: use one of "),
        (("--adapter", "{words}", "--task", "CAUSAL_LM"), "drop --method and --task, or --adapter"),
        (("--adapter", "nowhere"), "nowhere is no local folder"),
    ],
)
def test_check_refuses_in_one_line(
    arguments: tuple[str, ...],
    message: str,
    models: dict[str, str],
    trained: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("check", models["llama"], *(a.format(words=trained["words"]) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_check_refuses_methods_that_a_model_cannot_take(models: dict[str, str], capsys: Any) -> None:
    assert run("check", models["t5"], "--task", "SEQ_2_SEQ_LM", "--method", "prefix_tuning") == 0
    assert "FAILS" not in capsys.readouterr().out


def test_old_flags_of_serve_go_on_and_say_what_they_are_called_now(caplog: pytest.LogCaptureFixture) -> None:
    assert serve_sizes(rows=3, hot=5, slots=None) == {"max_num_seqs": 3, "adapter_cache_mb": 5}
    assert run("serve", "--model", "./nowhere", "--tokens", "7") == 2
    told = [record.getMessage() for record in caplog.records]
    assert [line for line in told if " is " in line] == [
        "--rows is --max-num-seqs now, and will go: use that",
        "--hot is --adapter-cache-mb now, and will go: use that",
        "--tokens is --max-num-batched-tokens now, and will go: use that",
    ]


@pytest.mark.parametrize("old", [("--rows", "0"), ("--slots", "63"), ("--hot", "-1")])
def test_old_flags_of_serve_have_their_bounds(old: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", "--model", "./nowhere", *old) == 2
    assert "Invalid value" in (shown := capsys.readouterr().err)
    assert old[0] in shown
