"""Two processes that share a batch train what one does alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.training.processes import PATIENCE

ROOT = Path(__file__).parents[2]


def train(method: str, folder: Path, processes: int) -> dict[str, torch.Tensor]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    shared = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    if processes > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        shared |= {"WORLD_SIZE": str(processes)}
    command = [sys.executable, str(ROOT / "tests/training/processes.py"), method, str(folder)]
    running = [
        subprocess.Popen(
            command, env={**os.environ, **shared, **ranks(i, processes)}, stderr=subprocess.PIPE, text=True
        )
        for i in range(processes)
    ]
    try:
        errors = [process.communicate(timeout=PATIENCE + 30)[1][-3000:] for process in running]
        assert all(process.returncode == 0 for process in running), "\n\n".join(errors)
    finally:
        for process in running:
            process.kill()
    return load_file(folder / "adapter_model.safetensors")


def ranks(number: int, processes: int) -> dict[str, str]:
    return {"RANK": str(number), "LOCAL_RANK": str(number)} if processes > 1 else {}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prompt", "prefix_projection", "bitfit"])
def test_two_processes_are_one(method: str, tmp_path: Path) -> None:
    one, two = train(method, tmp_path / "one", 1), train(method, tmp_path / "two", 2)
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
