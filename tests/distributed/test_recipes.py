"""A recipe that two processes run gives the adapter, losses and metrics of one process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from softtune.errors import SofttuneError
from softtune.training import Recipe, ranks, train
from softtune.training.loss_weight import loss_divisors
from tests.distributed.processes import Processes
from tests.tiny import TEMPLATE, save_models, write_rows

WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "dropout_rate": 0.0}
RECIPES: dict[str, dict[str, Any]] = {
    "prefix": {"model": "llama", "patience": 3},
    "many validated": {"model": "llama", "patience": 9, "validation_size": 13, "metric_for_best_model": "accuracy"},
    "prefix, sharded": {"model": "llama", "patience": 3, "fsdp": True},
    "prompt, sharded": {"model": "llama", "method": "PROMPT_TUNING", "fsdp": True},
    "accumulated": {"model": "llama", "gradient_accumulation_steps": 3, "method": "P_TUNING"},
    "ensemble": {"model": "llama", "ensemble": 2},
    "trunk cache": {"model": "llama", "options": {"num_virtual_tokens": 3, "layers": [1]}, "trunk_cache": 8},
    "head": {"model": "bert", "task": "SEQ_CLS", "template": "{words}", "patience": 3},
    "examples": {
        "model": "llama",
        "start": "examples",
        "max_length": 24,
        "options": {"num_virtual_tokens": 30, "token_dropout": 0.0},
    },
    "CPT": {
        "model": "llama",
        "method": "CPT",
        "start": "examples",
        "max_length": 24,
        "patience": 3,
        "gradient_accumulation_steps": 3,
        "options": {"num_virtual_tokens": 30, "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.9},
    },
    "encoder-decoder": {"model": "t5", "task": "SEQ_2_SEQ_LM", "method": "PROMPT_TUNING"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folders = save_models(tmp_path_factory.mktemp("models"), attention_dropout=0.0)
    for name in ("bert", "t5"):
        file = Path(folders[name], "config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | WITHOUT_DROPOUT))
    return folders


def fields_of(models: dict[str, str], folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe's fields; the last batch of an epoch has three rows, and the last accumulated one fewer batches."""
    shared = {
        "train": write_rows(folder / "rows.csv", 46),
        "template": TEMPLATE,
        "label_column": "label",
        "labels": ["warm", "cold"],
        "test_size": 7,
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 0.05,
        "save_steps": 4,
        "options": {"num_virtual_tokens": 3},
    }
    return {**shared, **changes, "model": models[changes["model"]]}


def run(fields: dict[str, Any], output: Path, *, resume: bool = False) -> dict[str, Any]:
    """Run a recipe, and return what it reports."""
    report = train(Recipe.from_fields({**fields, "output": str(output)}), resume=resume)
    quality = report.evaluation.quality
    assert quality is not None
    return {
        "steps": report.steps,
        "before": report.before,
        "after": quality.metrics,
        "mistakes": quality.mistakes,
        "best": report.best_steps,
    }


@pytest.mark.filterwarnings("ignore:the 3[59] examples have")  # more tokens than fit
@pytest.mark.parametrize("name", RECIPES)
def test_a_shared_run_is_the_run_of_one_process(
    processes: Processes, models: dict[str, str], tmp_path: Path, name: str
) -> None:
    fields = fields_of(models, tmp_path, **RECIPES[name])
    alone = run({**fields, "fsdp": False}, tmp_path / "one")
    for report in processes.run(run, fields, tmp_path / "two"):
        assert report["before"] == pytest.approx(alone["before"])
        assert report["after"] == pytest.approx(alone["after"])
        assert {**report, "before": None, "after": None} == {**alone, "before": None, "after": None}
    assert_same_folder(tmp_path / "two", tmp_path / "one")


def assert_same_folder(found: Path, expected: Path) -> None:
    """The same files, with the same losses and tensors but for rounding."""
    files = {path.relative_to(expected) for path in expected.rglob("*")}
    assert {path.relative_to(found) for path in found.rglob("*")} == files
    for file in (file for file in files if file.suffix == ".safetensors"):
        tensors = load_file(expected / file)
        for key, tensor in load_file(found / file).items():
            limit = 1e-4 * float(tensors[key].abs().max())
            assert float((tensor - tensors[key]).abs().max()) < limit, f"{file}: {key}"
    ours, theirs = (json.loads((folder / "history.json").read_text()) for folder in (found, expected))
    for name, steps in theirs.items():
        assert ours[name] == [pytest.approx(step, rel=1e-4) for step in steps]


def test_a_part_without_labels_counts_nothing(processes: Processes, tmp_path: Path) -> None:
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([[-100, 4, 5], [-100, 6, -100]])}
    found = processes.run(_divisors, batch, True)
    assert [math.isinf(divisor) for [divisor] in found] == [False, True]
    assert found[0] == [0.5]  # the mean over two processes is the loss of the first
    assert all(math.isnan(divisor) for [divisor] in processes.run(_divisors, batch, False))


def _divisors(batch: dict[str, torch.Tensor], first_has_labels: bool) -> list[float]:
    if not (ranks.is_main_process() and first_has_labels):
        batch = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    return loss_divisors([batch], shifts_labels=True)


def test_a_batch_that_does_not_divide_is_refused(processes: Processes, models: dict[str, str], tmp_path: Path) -> None:
    fields = fields_of(models, tmp_path, model="llama", batch_size=3)
    for message in processes.run(_refusal, fields, tmp_path / "out"):
        assert message == "batch_size is 3, which 2 processes cannot share evenly: set a multiple of 2"
    assert not (tmp_path / "out").exists()


def test_different_data_is_refused(processes: Processes, models: dict[str, str], tmp_path: Path) -> None:
    fields = fields_of(models, tmp_path, model="llama")
    for message in processes.run(_refusal_of_other_data, fields, tmp_path):
        assert message.endswith(": give every machine the same files")
        assert "has other training data than process" in message
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_first_process_is_that_of_all(
    processes: Processes, models: dict[str, str], tmp_path: Path
) -> None:
    fields = fields_of(models, tmp_path, model="llama")
    (tmp_path / "out").touch()
    first, second = processes.run(_refusal, fields, tmp_path / "out")
    assert first == second
    assert "out" in first


def _refusal(fields: dict[str, Any], output: Path) -> str:
    with pytest.raises(SofttuneError) as caught:
        run(fields, output)
    return str(caught.value)


def _refusal_of_other_data(fields: dict[str, Any], folder: Path) -> str:
    if not ranks.is_main_process():
        fields = {**fields, "train": write_rows(folder / "others.csv", 44)}
    return _refusal(fields, folder / "out")
