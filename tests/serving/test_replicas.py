"""Several servers behind Ray Serve, as a user starts them."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from tests.serving.test_http import complete, generated

from softtune import ConfigError
from softtune.serving.http.app import Settings
from softtune.serving.limits import Limits
from softtune.serving.replicas import run

COMMAND = "from softtune_command import main; main()"
STARTING, FOLLOWING = 180, 60
"""Seconds to wait."""


@contextmanager
def started(*options: str) -> Iterator[httpx.Client]:
    """``softtune serve`` in a process of its own, which Ctrl-C ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with subprocess.Popen([sys.executable, "-c", COMMAND, "serve", "--port", port, *options]) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                wait_for(lambda: client.get("/healthz").status_code == 200, STARTING)
                yield client
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def wait_for(is_true: Callable[[], bool], seconds: float) -> None:
    for _ in range(int(10 * seconds)):
        with suppress(httpx.HTTPError):
            if is_true():
                return
        time.sleep(0.1)
    raise AssertionError("waited in vain")


@pytest.mark.slow
def test_replicas_answer_and_follow_the_folder(llama: str, adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "prefix", tmp_path / "one")
    with started("--model", llama, "--adapters", str(tmp_path), "--replicas", "2", "--follow", "0.5") as client:
        expected = generated(llama, adapters / "prefix", "the sky is", 9)
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda _: complete(client, model="one", max_tokens=9), range(24)))
        assert {one.json()["choices"][0]["text"] for one in found} == {expected}
        shutil.copytree(adapters / "prompt", tmp_path / "two")

        def is_everywhere() -> bool:
            return all(complete(client, model="two", max_tokens=2).status_code == 200 for _ in range(10))

        wait_for(is_everywhere, FOLLOWING)


def test_requests_do_not_load_adapters_into_one_of_several() -> None:
    with pytest.raises(ConfigError, match="a request reaches one of the replicas: put adapters into their folder"):
        run("any", None, Limits(), Settings(admin_keys=("boss",)), replicas=2, host="127.0.0.1", port=1)
