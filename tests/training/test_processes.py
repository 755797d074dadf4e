"""Two processes that share a batch train what one does alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def train(method: str, folder: Path, processes: int) -> dict[str, torch.Tensor]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, str(ROOT / "tests/training/processes.py"), method, str(folder)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["prompt", "prefix_projection", "bitfit"])
def test_two_processes_are_one(method: str, tmp_path: Path) -> None:
    one, two = train(method, tmp_path / "one", 1), train(method, tmp_path / "two", 2)
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
