"""``torchrun`` and ``accelerate launch`` with ``-m softtune train``: one report, one writer, and one end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.test_recipes import assert_same_folder, fields_of
from tests.tiny import save_models

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
pytestmark = pytest.mark.slow
MOST_SECONDS = 60
"""For all processes to end in, after a signal or the death of one."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    fields = fields_of(save_models(folder, attention_dropout=0.0), folder, model="llama", epochs=12)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**fields, "output": str(folder / "one")}))
    subprocess.run([sys.executable, "-m", "softtune", "train", str(file)], check=True, capture_output=True)
    return file


def started(launcher: list[str], recipe: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *launcher, "-m", "softtune", "train", str(recipe), *flags]
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **settings)


def with_checkpoint(process: subprocess.Popen[str], output: Path) -> Path:
    """Wait for a run's first checkpoint."""
    while not (found := [*output.glob("checkpoints/checkpoint-*/trainer_state.json")]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return found[0].parent


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_report_and_write_once(recipe: Path, tmp_path: Path, launcher: list[str]) -> None:
    process = started(launcher, recipe, "--output", str(tmp_path / "two"))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count("accuracy") == 2  # of all labels, and balanced
    assert err.count("training ") <= 1
    assert_same_folder(tmp_path / "two", recipe.parent / "one")


@pytest.mark.parametrize(("number", "whom"), [(signal.SIGINT, "all"), (signal.SIGTERM, "torchrun")])
def test_a_signal_ends_all_processes_with_one_checkpoint(
    recipe: Path, tmp_path: Path, number: signal.Signals, whom: str
) -> None:
    output = tmp_path / "two"
    process = started(TORCHRUN, recipe, "--output", str(output))
    with_checkpoint(process, output)
    if whom == "all":  # as a terminal does at Ctrl-C
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, _ = process.communicate(timeout=MOST_SECONDS)
    [step] = re.findall(r"Stopped after step (\d+)\. Go on with: torchrun --nproc-per-node 2 -m softtune train", out)
    assert [folder.name for folder in output.glob("checkpoints/checkpoint-*")] == [f"checkpoint-{step}"]
    resumed = started(TORCHRUN, recipe, "--output", str(output), "--resume")
    assert "accuracy" in resumed.communicate()[0]
    assert_same_folder(output, recipe.parent / "one")


def test_the_death_of_a_process_ends_the_others_and_leaves_a_whole_checkpoint(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "two"
    process = started(TORCHRUN, recipe, "--output", str(output))
    with_checkpoint(process, output)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=MOST_SECONDS)
    assert process.returncode != 0
    assert not re.search(r"\[rank\d\]: Traceback", err)
    resumed = started(TORCHRUN, recipe, "--output", str(output), "--resume")
    assert "accuracy" in resumed.communicate()[0]
    assert_same_folder(output, recipe.parent / "one")
