"""What every test gets: no network, one thread, a fixed seed, Ctrl-C."""

from __future__ import annotations

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Every attempt to connect to another machine fails."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] != "127.0.0.1":
            raise AssertionError(f"a test tried to connect to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(autouse=True, scope="session")
def own_notes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What checks of models have found is not kept in the user's cache."""
    folder = tmp_path_factory.mktemp("self_check")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softtune.self_check.notes_folder", lambda: folder)
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave most of the matrix of families, tasks and methods to the slow suite."""
    from tests.families import FAMILIES, is_slow

    for item in items:
        values = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if values.get("family") in FAMILIES and is_slow(values["family"], values.get("task"), values.get("method")):
            item.add_marker(pytest.mark.slow)
