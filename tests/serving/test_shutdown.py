"""A server that is told to end lets what it has begun end, or fail in words."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn

from softtune.cli.serve import _Server
from tests.serving.processes import started
from tests.serving.test_slow_clients import HALF
from tests.tiny import save_models

TOKENS = 1500
"""More than can be written while a signal is on its way."""


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama that never ends a text."""
    folder = save_models(tmp_path_factory.mktemp("models"), max_position_embeddings=2 * TOKENS)["llama"]
    file = Path(folder, "generation_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": None}))
    return folder


def events(response: httpx.Response) -> Iterator[str]:
    return (line.removeprefix("data: ") for line in response.iter_lines() if line)


@pytest.mark.slow
@pytest.mark.parametrize("grace", [60, 0])
def test_a_stream_ends_in_order(endless: str, grace: int) -> None:
    asked = {"model": endless, "prompt": "the sky is", "max_tokens": TOKENS, "temperature": 0, "stream": True}
    with started("--model", endless, "--grace", str(grace)) as (client, process):
        with client.stream("POST", "/v1/completions", json=asked) as response:
            parts = events(response)
            next(parts)
            process.send_signal(signal.SIGTERM)
            rest = list(parts)
        assert process.wait(60) == -signal.SIGTERM  # which ends it for good when all is done
    if grace:
        assert (len(rest), rest[-1]) == (TOKENS, "[DONE]")
    else:
        assert len(rest) < TOKENS
        assert "the server is shutting down: try again later" in json.loads(rest[-1])["error"]["message"]


@pytest.mark.slow
def test_who_stalls_does_not_keep_it(endless: str) -> None:
    with (
        started("--model", endless, "--grace", "0") as (client, process),
        socket.create_connection((client.base_url.host, client.base_url.port)) as stalling,
    ):
        stalling.sendall(HALF)
        assert client.get("/healthz").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM


def test_a_signal_waits_for_no_lock() -> None:
    ended: list[float] = []
    service: Any = SimpleNamespace(thread=SimpleNamespace(end=ended.append))
    server = _Server(uvicorn.Config(lambda: None), service, 1.0)
    server.handle_exit(signal.SIGTERM, None)
    assert server.should_exit
    assert not ended  # it takes locks, which whoever the signal has interrupted may have
