"""The benchmark that needs a GPU: one line without one, and all of it with a tiny model on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"


def run(*arguments: str) -> str:
    command = [sys.executable, "benchmarks/gpu.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_without_a_gpu() -> None:
    assert run() == "skipped: there is no GPU that CUDA finds\n"


def test_all_of_it_with_a_tiny_model() -> None:
    before = RESULTS.read_text() if RESULTS.exists() else None
    shown = run("--tiny")
    for measure in ("training step", "greedy generation", "tokens/s"):
        assert measure in shown
    assert (RESULTS.read_text() if RESULTS.exists() else None) == before
