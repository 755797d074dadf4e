"""Servers as a user starts them."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import httpx

COMMAND = "from softtune_command import main; main()"
STARTING = 180
"""Seconds to wait."""


@contextmanager
def started(*options: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """``softtune serve`` in a process of its own, which Ctrl-C ends if it has not ended before."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with subprocess.Popen([sys.executable, "-c", COMMAND, "serve", "--port", port, *options]) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                wait_for(lambda: _is_up(client, process), STARTING)
                yield client, process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def _is_up(client: httpx.Client, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "the server has ended"
    return client.get("/healthz").status_code == 200


def wait_for(is_true: Callable[[], bool], seconds: float) -> None:
    for _ in range(int(10 * seconds)):
        with suppress(httpx.HTTPError):
            if is_true():
                return
        time.sleep(0.1)
    raise AssertionError("waited in vain")
