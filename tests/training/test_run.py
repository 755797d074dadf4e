"""Whole runs on tiny models: what is written, that they can be interrupted anywhere, and how they stop."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.tiny import write_rows
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import EvalLoopOutput

from softtune import CheckpointError, ConfigError, DataError, PeftModel, TrainingError
from softtune.backbone import Backbone
from softtune.training.progress import EVALUATING, EVALUATING_BASE_MODEL, TRAINING, Phase
from softtune.training.recipe import Recipe
from softtune.training.run import train
from softtune.training.trainer import AdapterTrainer

LABEL_METRICS = {"accuracy", "balanced_accuracy", "macro_f1"}

METHODS: dict[str, dict[str, Any]] = {
    "prefix with projection": {
        "method": "PREFIX_TUNING",
        "options": {"num_virtual_tokens": 3, "prefix_projection": True},
    },
    "P-tuning": {
        "method": "P_TUNING",
        "options": {"num_virtual_tokens": 3, "encoder_reparameterization_type": "LSTM"},
    },
    "P-tuning v2": {"method": "P_TUNING_V2", "options": {"num_virtual_tokens": 3, "prefix_dropout": 0.2}},
    "prompt tuning": {"method": "PROMPT_TUNING", "options": {"num_virtual_tokens": 3}},
    "BitFit": {"method": "BITFIT", "options": {"add_missing": True}},
    "cartridge": {"method": "CARTRIDGE", "options": {"num_virtual_tokens": 3}},
    "MPT": {"method": "MULTITASK_PROMPT_TUNING", "options": {"num_virtual_tokens": 3}},
    "CPT": {
        "method": "CPT",
        "options": {"cpt_token_ids": [3, 9, 8], "cpt_tokens_type_mask": [1, 2, 4], "opt_projection_epsilon": 9},
    },
}


def interrupt_at(step: int) -> Any:
    """A progress function that presses Ctrl-C during a step."""

    def progress(phase: Phase, done: int, total: int, notes: str) -> None:
        if phase == TRAINING and done == step - 1:
            os.kill(os.getpid(), signal.SIGINT)

    return progress


def no_work(*step: Any) -> None:
    """A progress function for runs that are refused before any."""
    raise AssertionError(step)


def tensors(folder: str) -> dict[str, torch.Tensor]:
    files = sorted(Path(folder).glob("*.safetensors"))
    return {f"{f.name}/{name}": tensor for f in files for name, tensor in load_file(f).items()}


def test_a_run_writes_the_adapter_and_nothing_else(fields: dict[str, Any]) -> None:
    report = train(Recipe.from_fields(fields))
    assert report.finished
    assert report.steps == 10
    assert (report.training_rows, report.evaluation_rows) == (18, 6)
    assert set(report.after) == set(report.before) == LABEL_METRICS
    assert report.trained == 3 * 2 * 2 * 2 * 6  # P, layers, key and value, heads, head size
    assert {path.name for path in report.folder.iterdir()} == {
        "history.json",
        "metrics.json",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "recipe.yaml",
        "softtune_config.json",
    }
    history, metrics = report.folder / "history.json", report.folder / "metrics.json"
    assert report.size == sum(path.stat().st_size for path in report.folder.iterdir() if path not in (history, metrics))
    steps = json.loads(history.read_text())["default"]
    assert [entry["step"] for entry in steps] == list(range(1, 11))
    assert all(entry["loss"] > 0 for entry in steps)


def test_training_learns(fields: dict[str, Any], models: dict[str, str]) -> None:
    changes = {"model": models["bert"], "task": "SEQ_CLS", "method": "BITFIT", "options": {}, "epochs": 40}
    report = train(Recipe.from_fields({**fields, **changes, "learning_rate": 0.05}))
    assert report.before["accuracy"] < 1.0
    assert report.after["accuracy"] == 1.0


def test_the_same_recipe_gives_the_same_adapter(fields: dict[str, Any], tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(Recipe.from_fields({**fields, "output": str(tmp_path / name)}))
    one, two = tensors(str(tmp_path / "one")), tensors(str(tmp_path / "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [3, 7])
def test_an_interrupted_and_resumed_run_equals_an_unbroken_one(
    fields: dict[str, Any], tmp_path: Path, method: str, step: int
) -> None:
    fields |= METHODS[method]
    whole = Recipe.from_fields({**fields, "output": str(tmp_path / "whole")})
    broken = Recipe.from_fields({**fields, "output": str(tmp_path / "broken")})
    unbroken_report = train(whole)
    first = train(broken, progress=interrupt_at(step))
    assert not first.finished
    assert first.steps == step
    assert first.after == {}
    second = train(broken, resume=True)
    assert second.finished
    assert (second.before, second.after) == (unbroken_report.before, unbroken_report.after)
    a, b = tensors(whole.output), tensors(broken.output)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_cartridge_of_frozen_tokens_alone_is_refused(fields: dict[str, Any]) -> None:
    frozen = {"method": "CARTRIDGE", "options": {"num_virtual_tokens": 3, "num_frozen_tokens": 3}}
    with pytest.raises(TrainingError, match="has nothing to train: lower num_frozen_tokens"):
        train(Recipe.from_fields(fields | frozen))


def test_a_recipe_starts_from_another_tasks_prefix(fields: dict[str, Any], tmp_path: Path) -> None:
    train(Recipe.from_fields({**fields, "options": {"num_virtual_tokens": 3}, "output": str(tmp_path / "first")}))
    start = {"method": "CARTRIDGE", "learning_rate": 1e-9, "options": {"num_virtual_tokens": 3}}
    start["options"]["init_file"] = str(tmp_path / "first")  # type: ignore[index]
    train(Recipe.from_fields(fields | start))
    first, second = (tensors(folder) for folder in (str(tmp_path / "first"), fields["output"]))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def test_an_unfinished_run_is_neither_overwritten_nor_mixed_up(fields: dict[str, Any]) -> None:
    recipe = Recipe.from_fields(fields)
    with pytest.raises(ConfigError, match="no unfinished run"):
        train(recipe, resume=True)
    train(recipe, progress=interrupt_at(3))
    with pytest.raises(ConfigError, match="add --resume"):
        train(recipe)
    with pytest.raises(ConfigError, match=r"learning_rate is 0\.01, and 0\.02 in the run in .*adapter: resume it"):
        train(Recipe.from_fields({**fields, "learning_rate": 0.01}), resume=True)
    assert train(recipe, resume=True).finished


def test_a_checkpoint_that_was_cut_short_is_passed_over(fields: dict[str, Any]) -> None:
    recipe = Recipe.from_fields(fields)
    train(recipe, progress=interrupt_at(6))
    (Path(recipe.output) / "checkpoints" / "checkpoint-9").mkdir()
    assert train(recipe, resume=True).finished


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good_state(fields: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="lower the learning rate"):
        train(Recipe.from_fields({**fields, "learning_rate": 1e38, "max_grad_norm": 1e9}))
    kept = tensors(fields["output"])
    assert kept
    assert all(tensor.isfinite().all() for tensor in kept.values())
    base = AutoModelForCausalLM.from_pretrained(fields["model"])
    ids = torch.tensor([[3, 4, 5]])
    assert PeftModel.from_pretrained(base, fields["output"])(input_ids=ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize(("method", "rate"), [*((m, 1e38) for m in METHODS if m != "CPT"), ("P-tuning", 1e30)])
def test_an_update_that_leaves_the_numbers_is_never_saved(fields: dict[str, Any], method: str, rate: float) -> None:
    """Not at the end either, where no loss is computed with it any more, nor where only the prompt is no number. CPT's
    is projected."""
    wild = {"learning_rate": rate, "max_grad_norm": 1e9, "warmup_steps": 0, "epochs": 0.2}
    with pytest.raises(TrainingError, match="no longer made of numbers after step 1: lower the learning rate"):
        train(Recipe.from_fields({**fields, **METHODS[method], **wild}))
    kept = tensors(fields["output"])
    assert kept
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_an_adapter_that_answers_no_numbers_has_failed(fields: dict[str, Any]) -> None:
    """Its own numbers may be finite, and what layers make of them not."""
    wild = {"learning_rate": 1e30, "max_grad_norm": 1e9, "warmup_steps": 0, "epochs": 0.2}
    with pytest.raises(TrainingError, match="are no numbers"):
        train(Recipe.from_fields({**fields, **METHODS["BitFit"], **wild}))


@pytest.mark.parametrize("base", ["llama", "t5"])
def test_labels_that_the_tokenizer_does_not_tell_apart(
    fields: dict[str, Any], models: dict[str, str], base: str
) -> None:
    task = "SEQ_2_SEQ_LM" if base == "t5" else "CAUSAL_LM"
    changes = {"labels": {"warm": "hot", "cold": "icy"}, "model": models[base], "task": task}
    with pytest.raises(DataError, match="labels 'warm' and 'cold' are the same tokens to the model: give them other"):
        train(Recipe.from_fields({**fields, **changes}), progress=no_work)
    assert not Path(fields["output"]).exists()


@pytest.mark.parametrize("method", ["P_TUNING_V2", "BITFIT", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "CARTRIDGE"])
def test_a_head_on_an_encoder(fields: dict[str, Any], models: dict[str, str], tmp_path: Path, method: str) -> None:
    """It is trained, and so is what the method adds."""
    options = {} if method == "BITFIT" else {"num_virtual_tokens": 3}
    changes = {"model": models["bert"], "task": "SEQ_CLS", "method": method, "options": options}
    states = []
    for name, rate in (("start", 1e-9), ("trained", 0.02)):
        train(Recipe.from_fields({**fields, **changes, "learning_rate": rate, "output": str(tmp_path / name)}))
        states.append(tensors(str(tmp_path / name)))
    start, after = states
    assert start.keys() == after.keys()
    moved = {name.partition("/")[2] for name in start if (after[name] - start[name]).abs().max() > 0.02}
    assert "base_model.classifier.weight" in moved
    assert any(not name.startswith("base_model.classifier") for name in moved)


def test_an_encoder_decoder_writes_the_label(fields: dict[str, Any], models: dict[str, str]) -> None:
    losses: list[float] = []

    def listen(phase: Phase, done: int, total: int, notes: str) -> None:
        losses.extend(float(loss) for loss in re.findall(r"loss ([\d.]+), \d+ tokens/s", notes))

    changes = {"model": models["t5"], "task": "SEQ_2_SEQ_LM", "epochs": 20, "learning_rate": 0.1}
    report = train(Recipe.from_fields({**fields, **changes}), progress=listen)
    assert report.finished
    assert len(losses) == report.steps
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert set(report.after) == LABEL_METRICS


def test_free_text_is_written_and_compared(fields: dict[str, Any], tmp_path: Path) -> None:
    texts = {"labels": None, "max_new_tokens": 4, "evaluation": write_rows(tmp_path / "more.csv", 6), "test_size": 0}
    report = train(Recipe.from_fields({**fields, **texts, "epochs": 40, "learning_rate": 0.1}))
    assert report.before["exact_match"] == 0.0
    assert report.after["exact_match"] == 1.0


def test_a_template_places_the_virtual_tokens(fields: dict[str, Any]) -> None:
    changes = {"template": "{prompt:2} {words} {prompt:1} label : ", "method": "P_TUNING", "options": {}}
    report = train(Recipe.from_fields({**fields, **changes}))
    assert report.finished
    assert load_file(report.folder / "adapter_model.safetensors")["prompt_embeddings"].shape == (3, 24)


def test_a_sample_has_the_shares_that_the_recipe_names(fields: dict[str, Any]) -> None:
    report = train(Recipe.from_fields({**fields, "examples": 8, "shares": {"warm": 0.25, "cold": 0.75}, "epochs": 1}))
    assert report.training_rows == 8
    with pytest.raises(DataError, match="too few rows"):
        train(Recipe.from_fields({**fields, "examples": 18, "shares": {"warm": 1.0}, "output": fields["output"] + "2"}))


@pytest.mark.parametrize("shares", [None, {"warm": 0.5, "cold": 0.5}])
def test_a_sample_is_no_larger_than_the_data(fields: dict[str, Any], shares: dict[str, float] | None) -> None:
    with pytest.raises(DataError, match="examples is 19 and there are 18 rows to train on: lower it"):
        train(Recipe.from_fields({**fields, "examples": 19, "shares": shares}))
    assert train(Recipe.from_fields({**fields, "examples": 18, "epochs": 1})).training_rows == 18


def test_long_texts_are_cut_and_counted(fields: dict[str, Any]) -> None:
    report = train(Recipe.from_fields({**fields, "max_length": 12, "epochs": 1}))
    assert report.truncated > 0
    assert report.evaluation.truncated > 0


def test_a_run_that_died_before_its_first_checkpoint_leaves_nothing_to_mistake(fields: dict[str, Any]) -> None:
    def die(phase: Phase, done: int, total: int, notes: str) -> None:
        if phase == TRAINING:
            raise RuntimeError

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError):
        train(Recipe.from_fields({**fields, "labels": {"warm": "good", "cold": "bad"}}), progress=die)
    assert signal.getsignal(signal.SIGINT) is handler
    recipe = Recipe.from_fields(fields)
    train(recipe, progress=interrupt_at(3))
    assert train(recipe, resume=True).finished


def test_a_run_is_not_resumed_with_other_data(fields: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.from_fields({**fields, "evaluation": write_rows(tmp_path / "more.csv", 6), "test_size": 0})
    train(recipe, progress=interrupt_at(3))
    for source, name in ((recipe.train, "training"), (recipe.evaluation, "evaluation")):
        file = Path(str(source))
        kept = file.read_text()
        file.write_text(kept.replace("green", "blue", 1))
        with pytest.raises(DataError, match=f"the {name} data is not what the run was started with: restore it"):
            train(recipe, resume=True)
        file.write_text(kept)
    assert train(recipe, resume=True).finished


def test_a_finished_adapter_is_not_overwritten(fields: dict[str, Any]) -> None:
    recipe = Recipe.from_fields({**fields, "epochs": 1})
    train(recipe)
    kept = tensors(recipe.output)
    for resume in (False, True):
        with pytest.raises(ConfigError, match="has a finished adapter: choose another output or delete it"):
            train(recipe, resume=resume)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors(recipe.output).items())


@pytest.mark.parametrize("part", ["", "below"])
def test_a_file_in_the_way_of_the_output(fields: dict[str, Any], tmp_path: Path, part: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file is a file: name a folder"):
        train(Recipe.from_fields({**fields, "output": str(tmp_path / "file" / part)}), progress=no_work)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("evaluates", [False, True])
def test_labels_are_checked_by_their_rows_in_the_file_before_any_work(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluates: bool
) -> None:
    monkeypatch.setattr("softtune.training.setup.load_base_model", None)
    bad = Path(write_rows(tmp_path / "bad.csv", 20))
    lines = bad.read_text().splitlines()
    lines[13] = "blue sky,tepid"
    bad.write_text("\n".join(lines))
    source = {"evaluation": str(bad), "test_size": 0} if evaluates else {"train": str(bad)}
    with pytest.raises(
        DataError, match=r"bad\.csv: row 13: label 'tepid' is not one of 'warm', 'cold'; add it to labels"
    ):
        train(Recipe.from_fields({**fields, **source}))


@pytest.mark.parametrize(
    ("phase", "save_steps", "kept"),
    [
        (EVALUATING_BASE_MODEL, 4, "stopped at once; no checkpoint is kept"),
        (TRAINING, 50, "stopped at once; no checkpoint is kept"),
        (TRAINING, 4, "stopped at once; .*checkpoint-4 is kept: go on with --resume"),
        (EVALUATING, 4, "stopped before the evaluation; the adapter is saved in .*adapter"),
    ],
)
def test_a_run_that_is_stopped_at_once_says_what_is_kept(
    fields: dict[str, Any], phase: Phase, save_steps: int, kept: str
) -> None:
    def stop(now: Phase, done: int, total: int, notes: str) -> None:
        if now == phase and (phase != TRAINING or done == 5):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    recipe = Recipe.from_fields({**fields, "save_steps": save_steps})
    with pytest.raises(KeyboardInterrupt, match=kept):
        train(recipe, progress=stop)
    if phase == EVALUATING:
        assert Recipe.from_adapter(recipe.output) == recipe
        return
    if phase == TRAINING:
        with pytest.raises(CheckpointError, match="is unfinished: go on with softtune train --resume, or train anew"):
            Recipe.from_adapter(recipe.output)
    assert train(recipe, resume="kept: go" in kept).finished


def test_tensorboard_logs_beside_the_adapter(fields: dict[str, Any]) -> None:
    report = train(Recipe.from_fields({**fields, "report_to": ["tensorboard"]}))
    logged = EventAccumulator(str(report.folder / "logs")).Reload()
    assert len(logged.Scalars("train/loss")) == report.steps
    assert {"train/learning_rate", "train/num_input_tokens_seen"} <= set(logged.Tags()["scalars"])


def test_a_tracker_is_needed_for_training_alone(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softtune.training.compatibility.find_spec", lambda name: None)
    recipe = Recipe.from_fields({**fields, "report_to": ["wandb"]})
    with pytest.raises(ConfigError, match="report_to needs the package wandb: pip install wandb"):
        train(recipe, progress=no_work)
    train(Recipe.from_fields(fields))
    recipe.save(Path(recipe.output, "recipe.yaml"))
    assert Recipe.from_adapter(recipe.output) == recipe


def test_a_run_stops_when_held_out_rows_say_so_and_keeps_the_best(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []
    load = AdapterTrainer.load_adapter
    monkeypatch.setattr(AdapterTrainer, "load_adapter", lambda self, path: (kept.append(path), load(self, path)))
    wild = {"learning_rate": 3.0, "schedule": "constant", "epochs": 20, "save_steps": 2, "warmup_steps": 0}
    recipe = Recipe.from_fields({**fields, **wild, "patience": 2, "validation_size": 4})
    report = train(recipe)
    assert report.finished
    assert (report.training_rows, report.validation_rows, report.evaluation_rows) == (14, 4, 6)
    assert report.steps < 20 * 4
    assert [int(path.rpartition("-")[2]) for path in kept] == [report.steps - 2 * 2] == report.best_steps


STOPPING = {"schedule": "constant", "epochs": 20, "save_steps": 2, "patience": 2, "validation_size": 4}


@pytest.mark.parametrize("rate", [3.0, 0.02])
@pytest.mark.parametrize("step", [3, 5, 6, 8])
def test_patience_goes_on_after_an_interrupt(fields: dict[str, Any], tmp_path: Path, rate: float, step: int) -> None:
    whole, broken = (
        Recipe.from_fields({**fields, **STOPPING, "learning_rate": rate, "epochs": 4, "output": str(tmp_path / name)})
        for name in ("whole", "broken")
    )
    expected = train(whole)
    first = train(broken, progress=interrupt_at(step))
    if step < expected.steps:
        assert not first.finished
        assert Path(broken.output, "checkpoints", f"checkpoint-{step}").is_dir()
        assert train(broken, resume=True).steps == expected.steps
    a, b = tensors(whole.output), tensors(broken.output)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_output_that_cannot_be_written_is_found_before_any_work(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("softtune.storage.tempfile.TemporaryFile", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be written \(Permission denied\): name another folder"):
        train(Recipe.from_fields({**fields, "output": f"{fields['output']}/new/one"}), progress=no_work)


def test_a_run_that_is_shorter_than_an_interval_is_validated(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    evaluate = AdapterTrainer.evaluate
    monkeypatch.setattr(
        AdapterTrainer, "evaluate", lambda self, *args, **k: steps.append(self.state.global_step) or evaluate(self)
    )
    for save_steps, expected in ((50, [8]), (3, [3, 6, 8])):
        recipe = Recipe.from_fields(
            {**fields, "patience": 5, "save_steps": save_steps, "output": f"{fields['output']}-{save_steps}"}
        )
        assert train(recipe).validation_rows == 2
        assert steps == expected
        steps.clear()


def test_rows_held_out_leave_some_to_train_on(fields: dict[str, Any]) -> None:
    assert train(Recipe.from_fields({**fields, "patience": None, "validation_size": 4})).validation_rows == 0
    with pytest.raises(DataError, match="cannot hold out 18 of 18 rows"):
        train(Recipe.from_fields({**fields, "patience": 1, "validation_size": 18, "output": fields["output"] + "-2"}))


def test_a_recipes_settings_are_the_trainers(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them at its default."""
    seen: list[AdapterTrainer] = []
    monkeypatch.setattr(AdapterTrainer, "train", lambda self, **_: seen.append(self))
    monkeypatch.setattr(AdapterTrainer, "has_ended", True)
    compiled: list[Backbone] = []
    monkeypatch.setattr(Backbone, "compile_layers", lambda self: compiled.append(self))
    settings = {
        "learning_rate": 0.003,
        "warmup_steps": 0.3,
        "epochs": 3.0,
        "weight_decay": 0.2,
        "max_grad_norm": 0.5,
        "save_steps": 7,
        "bf16": True,
        "gradient_checkpointing": True,
        "seed": 5,
    }
    own = {"schedule": "cosine", "batch_size": 3, "compile": True, "patience": 2}
    train(Recipe.from_fields({**fields, **settings, **own, "evaluation": None, "test_size": 0}))
    [trainer] = seen
    names = {"epochs": "num_train_epochs"}
    assert {name: getattr(trainer.args, names.get(name, name)) for name in settings} == settings
    assert trainer.args.lr_scheduler_type == "cosine"
    assert trainer.args.per_device_train_batch_size == 3
    assert trainer.args.load_best_model_at_end
    assert trainer.args.eval_steps == 7
    assert [backbone.model for backbone in compiled] == [trainer.model.base_model]


def test_patience_keeps_the_best_of_a_run_that_blows_up(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, best = AdapterTrainer.training_step, dict[str, torch.Tensor]()

    def blow_up(self: AdapterTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 6:
            best.update(load_file(Path(str(self.state.best_model_checkpoint), "adapter_model.safetensors")))
            assert str(self.state.best_model_checkpoint).endswith("-4")
            raise self._blown_up("the loss is nan at step 7")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", blow_up)
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(
        AdapterTrainer, "evaluation_loop", lambda *_, **__: EvalLoopOutput(None, None, {"eval_loss": next(losses)}, 4)
    )
    with pytest.raises(TrainingError, match="kept as it was at its lowest validation loss"):
        train(Recipe.from_fields({**fields, **STOPPING, "patience": 5}))
    kept = load_file(Path(fields["output"], "adapter_model.safetensors"))
    assert all(torch.equal(kept[name], best[name]) for name in best)


def test_every_label_is_trained_on_beside_rows_held_out_for_patience(fields: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="none of 1 training rows is labelled"):
        train(Recipe.from_fields({**fields, "shots": 1, "patience": 1, "validation_size": 1}), progress=no_work)


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize(("how", "share"), [("gradient_checkpointing", 1e-4), ("compile", 1e-4), ("bf16", 0.2)])
def test_ways_to_compute_come_to_the_same(fields: dict[str, Any], tmp_path: Path, how: str, share: float) -> None:
    """To a share of the way that the training goes; bfloat16 has three digits, and Adam scales small gradients up."""
    fields["model"] = no_dropout(fields["model"], tmp_path)
    runs = {"start": {"learning_rate": 1e-9}, "plain": {}, "other": {how: True}}
    states = {}
    for name, changes in runs.items():
        train(Recipe.from_fields({**fields, "epochs": 0.5, "output": str(tmp_path / name), **changes}))
        states[name] = torch.cat([tensor.flatten() for _, tensor in sorted(tensors(str(tmp_path / name)).items())])
    way = states["plain"] - states["start"]
    assert (states["other"] - states["plain"]).norm() < share * way.norm()
    assert how != "bf16" or not torch.equal(states["other"], states["plain"])


def no_dropout(model: str, folder: Path) -> str:
    copy = shutil.copytree(model, folder / "model", dirs_exist_ok=True)
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.1', '"attention_dropout": 0.0'))
    return str(copy)
