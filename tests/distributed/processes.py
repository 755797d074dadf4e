"""Two processes that compute together over gloo, and do one piece of work after another."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from socket import socket
from typing import Any

COUNT = 2
PATIENCE = 240.0
"""Seconds after which a piece of work counts as hung."""


class Processes:
    """Processes that have joined each other."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def run(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Do a piece of work in every process, and return its results in their order."""
        for pipe in self._pipes:
            pipe.send((work, arguments))
        assert all(pipe.poll(PATIENCE) for pipe in self._pipes), "a process hangs"
        results = [pipe.recv() for pipe in self._pipes]
        failures = [result for worked, result in results if not worked]
        assert not failures, "\n".join(failures)
        return [result for _, result in results]


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Start the processes; they end with the block."""
    context = get_context("spawn")
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pairs = [context.Pipe() for _ in range(COUNT)]
    workers = [
        context.Process(target=_work, args=(rank, port, theirs), daemon=True) for rank, (_, theirs) in enumerate(pairs)
    ]
    for worker in workers:
        worker.start()
    try:
        yield Processes([ours for ours, _ in pairs])
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _work(rank: int, port: int, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(COUNT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    from softtune.training import ranks

    torch.set_num_threads(1)
    ranks.start(torch.device("cpu"))
    while True:
        work, arguments = pipe.recv()
        try:
            pipe.send((True, work(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
