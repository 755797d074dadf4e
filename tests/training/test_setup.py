"""Fields of recipes that are the Trainer's: what they do to a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import write_rows
from tests.training.test_run import interrupt_at, no_dropout, no_work, tensors
from transformers import Adafactor

from softtune import ConfigError, TrainingError
from softtune.errors import AdapterError, MissingExtraError
from softtune.evaluation import answers
from softtune.training.recipe import Recipe
from softtune.training.run import train
from softtune.training.trainer import AdapterTrainer


def history(folder: str | Path) -> list[dict[str, float]]:
    steps: list[dict[str, float]] = json.loads(Path(folder, "history.json").read_text())["default"]
    return steps


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[AdapterTrainer]:
    """All Trainers that run."""
    seen: list[AdapterTrainer] = []
    run = AdapterTrainer.train
    monkeypatch.setattr(AdapterTrainer, "train", lambda self, **own: (seen.append(self), run(self, **own)))
    return seen


def test_settings_are_the_trainers(fields: dict[str, Any], trainers: list[AdapterTrainer]) -> None:
    settings = {
        "gradient_accumulation_steps": 3,
        "max_steps": 2,
        "optim": "sgd",
        "label_smoothing_factor": 0.1,
        "dataloader_num_workers": 1,
        "eval_steps": 1,
        "metric_for_best_model": "macro_f1",
        "save_steps": 2,
    }
    report = train(Recipe.from_fields({**fields, **settings, "epochs": 50}))
    [trainer] = trainers
    assert {name: getattr(trainer.args, name) for name in settings} == settings
    assert (report.steps, report.best_by) == (2, "macro_f1")


def test_updates_of_several_batches(fields: dict[str, Any], tmp_path: Path) -> None:
    """Eighteen rows are three updates of two batches and half a one; every update has as many rows as a large batch."""
    fields["model"] = no_dropout(fields["model"], tmp_path)
    found = {}
    for name, sizes in (("large", (8, 1)), ("small", (4, 2))):
        own = dict(zip(("batch_size", "gradient_accumulation_steps"), sizes, strict=True))
        report = train(Recipe.from_fields({**fields, **own, "optim": "sgd", "output": str(tmp_path / name)}))
        assert report.steps == 6
        found[name] = tensors(report.folder)
    for name, large in found["large"].items():
        torch.testing.assert_close(found["small"][name], large, atol=1e-6, rtol=1e-5)


def test_updates_of_several_batches_go_on_after_an_interrupt(fields: dict[str, Any], tmp_path: Path) -> None:
    fields |= {"batch_size": 3, "gradient_accumulation_steps": 2, "group_by_length": True, "epochs": 3}
    whole, broken = (Recipe.from_fields({**fields, "output": str(tmp_path / name)}) for name in ("whole", "broken"))
    train(whole)
    assert not train(broken, progress=interrupt_at(5)).finished
    assert train(broken, resume=True).steps == 9
    a, b = tensors(whole.output), tensors(broken.output)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_rows_of_similar_length_share_a_batch(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[torch.Tensor] = []
    collect = AdapterTrainer.get_batch_samples

    def note(self: AdapterTrainer, *args: Any) -> Any:
        found = collect(self, *args)
        masks.extend(batch["attention_mask"] for batch in found[0])
        return found

    monkeypatch.setattr(AdapterTrainer, "get_batch_samples", note)
    fields |= {"train": write_rows(tmp_path / "more.csv", 66), "epochs": 1, "patience": 3, "batch_size": 3}
    padding = []
    for grouped in (True, False):
        masks.clear()
        train(Recipe.from_fields({**fields, "group_by_length": grouped, "output": str(tmp_path / str(grouped))}))
        padding.append(sum(int((mask == 0).sum()) for mask in masks))
        assert sum(map(len, masks)) == 54
    assert padding[0] < 0.5 * padding[1]


def test_epochs_have_other_orders(fields: dict[str, Any], trainers: list[AdapterTrainer]) -> None:
    train(Recipe.from_fields({**fields, "group_by_length": True}))
    [trainer] = trainers
    orders = []
    for epoch in (0.0, 1.0, 1.5):
        trainer.state.epoch = epoch
        orders.append([*trainer._by_length()])
    assert orders[0] != orders[1] == orders[2]
    assert sorted(orders[0]) == [*range(18)]


@pytest.mark.parametrize(
    ("optim", "kind"), [("adafactor", Adafactor), ("sgd", torch.optim.SGD), (None, torch.optim.AdamW)]
)
def test_optimisers(fields: dict[str, Any], trainers: list[AdapterTrainer], optim: str | None, kind: type) -> None:
    report = train(Recipe.from_fields({**fields, "optim": optim, "max_steps": 3}))
    assert report.finished
    assert isinstance(trainers[0].optimizer.optimizer, kind)


def test_an_optimiser_whose_package_is_missing(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softtune.training.compatibility.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"^the optimiser adamw_8bit needs bitsandbytes: .*softtune\[quant\]"):
        train(Recipe.from_fields({**fields, "optim": "adamw_8bit"}), progress=no_work)


def test_labels_are_smoothed_with_the_trunk_cache_too(fields: dict[str, Any], tmp_path: Path) -> None:
    fields["model"] = no_dropout(fields["model"], tmp_path)
    fields |= {"options": {"num_virtual_tokens": 3, "layers": "last:1"}, "label_smoothing_factor": 0.2}
    found = {}
    for name, size in (("plain", 0), ("cached", 1)):
        report = train(Recipe.from_fields({**fields, "trunk_cache": size, "output": str(tmp_path / name)}))
        found[name] = [step["loss"] for step in history(report.folder)]
    assert found["cached"] == pytest.approx(found["plain"], abs=1e-5)


def test_evaluations_need_not_be_where_checkpoints_are(fields: dict[str, Any], trainers: list[AdapterTrainer]) -> None:
    """All steps run without patience, and the best of them is kept wherever it was."""
    wild = {"learning_rate": 3.0, "schedule": "constant", "warmup_steps": 0, "max_steps": 7}
    report = train(Recipe.from_fields({**fields, **wild, "eval_steps": 3, "save_steps": 5, "validation_size": 4}))
    assert (report.steps, report.validation_rows) == (7, 4)
    losses = {
        int(entry["step"]): entry["validation_loss"] for entry in history(report.folder) if "validation_loss" in entry
    }
    assert [*losses] == [3, 6, 7]
    assert report.best_steps == [min(losses, key=losses.__getitem__)]
    assert str(trainers[0].state.best_model_checkpoint).endswith(f"checkpoint-{report.best_steps[0]}")


def test_a_metric_chooses_the_best_checkpoint(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch, trainers: list[AdapterTrainer]
) -> None:
    """By its own direction, and on the validation rows."""
    seen: list[int] = []
    judge = answers.judge

    def note(task: Any, rows: Any, found: Any) -> Any:
        seen.append(len(rows))
        return judge(task, rows, found)

    monkeypatch.setattr("softtune.training.setup.judge", note)
    own = {"eval_steps": 1, "metric_for_best_model": "accuracy", "validation_size": 5, "max_steps": 6}
    report = train(Recipe.from_fields({**fields, **own, "learning_rate": 1.0, "warmup_steps": 0}))
    measured = [entry for entry in history(report.folder) if "validation_accuracy" in entry]
    assert seen == [5] * 6
    assert [int(entry["step"]) for entry in measured] == [1, 2, 3, 4, 5, 6]
    best = max(entry["validation_accuracy"] for entry in measured)
    first = next(int(entry["step"]) for entry in measured if entry["validation_accuracy"] == best)
    assert report.best_steps == [first]
    assert trainers[0].args.greater_is_better
    assert trainers[0].state.best_metric == best


def test_patience_waits_for_the_metric(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Quality:
        def __init__(self, perplexity: float) -> None:
            self.metrics = {"perplexity": perplexity}

    values = iter([3.0, 2.0, 2.5, 2.5, 9.0])
    monkeypatch.setattr("softtune.training.setup.judge", lambda *_: Quality(next(values)))
    own = {"labels": None, "metric_for_best_model": "perplexity", "patience": 2, "eval_steps": 2, "max_steps": 20}
    report = train(Recipe.from_fields({**fields, **own, "max_new_tokens": 2, "test_size": 0}))
    assert (report.steps, report.best_steps, report.best_by) == (8, [4], "perplexity")


def test_members_are_measured_each(fields: dict[str, Any]) -> None:
    own = {"ensemble": 2, "eval_steps": 2, "metric_for_best_model": "accuracy", "label_smoothing_factor": 0.1}
    report = train(Recipe.from_fields({**fields, **own, "max_steps": 4}))
    assert len(report.best_steps) == 2


def test_an_adapter_that_answers_no_numbers_at_an_evaluation(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AdapterError("the outputs are no numbers")

    monkeypatch.setattr("softtune.training.setup.answer_each", fail)
    with pytest.raises(
        TrainingError, match="are no numbers: lower the learning rate; the adapter is kept as it was at"
    ):
        train(Recipe.from_fields({**fields, "test_size": 0, "eval_steps": 2, "metric_for_best_model": "accuracy"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metric_for_best_model": "rouge", "eval_steps": 2},
            "metric_for_best_model is 'rouge': use one of loss, accu",
        ),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model chooses a checkpoint by held-out rows: set pat"),
        ({"optim": "adam"}, "optim is 'adam': it should be 'adamw_torch'"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor is 1.0: it should be less than 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0: it should be greater"),
        ({"max_steps": 0}, "max_steps is 0: it should be greater"),
        ({"eval_steps": 0}, "eval_steps is 0: it should be greater"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1: it should be greater"),
        (
            {"task": "QUESTION_ANS", "labels": None, "template": "{label} {words}", "label_smoothing_factor": 0.1},
            "label_smoothing_factor is for labels and tokens, and not for parts of a text: drop it",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(fields: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe.from_fields({**fields, **changes})
    assert "\n" not in str(caught.value)
