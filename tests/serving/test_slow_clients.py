"""Clients that send half a request, or read half an answer, are waited for no longer than anyone's answer."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from softtune.serving.engine_config import EngineConfig
from softtune.serving.folder import AdapterFolder
from softtune.serving.http.app import Settings, create_app
from softtune.serving.sampling import SampledToken
from softtune.serving.service import Service, TokenDelta
from tests.serving.test_http import complete, serving

HALF = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 99\r\n\r\nhalf of it"
BETWEEN_TOKENS = 0.5
"""Seconds between two tokens."""


def half_asked(client: httpx.Client) -> bytes:
    """All that is said to half a request."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as sent:
        sent.sendall(HALF)
        return b"".join(iter(lambda: sent.recv(2**16), b""))


async def slowly(*_: Any) -> AsyncIterator[TokenDelta]:
    """A text that never ends."""
    while True:
        yield TokenDelta(SampledToken(3), "red ", None)
        await asyncio.sleep(BETWEEN_TOKENS)


def test_half_a_request_is_given_up_on(llama: str) -> None:
    with serving(llama, None, seconds=1.0) as client:
        answer = half_asked(client)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"the request has not come whole within 1 seconds: send it anew" in answer
        assert 'path="/v1/completions",status="408"' in client.get("/metrics").text


def test_a_stream_has_the_time_of_one_answer(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "generate", slowly)
    with serving(llama, None, seconds=6 * BETWEEN_TOKENS) as client:
        *tokens, error, behind_the_last_line = complete(client, model=llama, stream=True).text.split("\n\n")
    assert tokens
    assert not behind_the_last_line
    assert "the answer takes longer than 3 seconds" in json.loads(error[6:])["error"]["message"]


def test_who_stops_reading_is_left(llama: str, adapters: Path) -> None:
    service, folder = Service(llama, EngineConfig(num_kv_slots=600)), AdapterFolder(str(adapters))
    version = service.registry.add("prefix", adapters / "prefix")
    body = json.dumps({"model": "prefix", "prompt": "red", "max_tokens": 50, "stream": True}).encode()
    asked = iter([{"type": "http.request", "body": body}])
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    told: list[Any] = []

    async def receive() -> Any:
        return next(asked, None) or await asyncio.Event().wait()

    async def send(message: Any) -> None:
        told.append(message)
        if len(told) == 3:
            await asyncio.Event().wait()

    async def ask() -> None:
        await asyncio.wait_for(create_app(service, folder, Settings(seconds=1.0))(scope, receive, send), 20)

    service.start()
    clock = time.monotonic()
    asyncio.run(ask())
    assert time.monotonic() - clock >= 1
    assert [message["type"] for message in told] == ["http.response.start"] + 2 * ["http.response.body"]
    assert not version.leases
    service.close(1)
