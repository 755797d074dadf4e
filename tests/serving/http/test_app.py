"""The application: its endpoints and their doors, errors as OpenAI's clients read them, and its beginning and end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from softtune.errors import (
    AdapterError,
    AdapterMismatchError,
    CheckpointError,
    ClosedError,
    ConfigError,
    DataError,
    FullError,
    RequestError,
    TooLongError,
    UnsupportedModelError,
)
from softtune.serving.http import app as app_file
from softtune.serving.http.app import Settings, create_app

WAITING = 30
"""Seconds to wait for what happens at once."""


class Stub:
    """A service without adapters, whose every lease fails as it is told to."""

    name = "base"

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error or AdapterError("no adapter is named so")
        self.is_alive = True
        self.called: list[Any] = []
        self.thread = SimpleNamespace(engines=[])
        self.registry = SimpleNamespace(versions=[])

    @contextmanager
    def lease(self, name: str) -> Iterator[Any]:
        raise self.error
        yield

    def start(self) -> None:
        self.called.append("start")

    def close(self, grace: float) -> None:
        self.called.append(("close", grace))


def application(error: Exception | None = None, **settings: Any) -> FastAPI:
    folder: Any = SimpleNamespace(names=[])
    service: Any = Stub(error)
    return create_app(service, folder, Settings(**settings))


def ask(app: FastAPI, method: str, path: str, **given: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, **given)

    return asyncio.run(asyncio.wait_for(send(), WAITING))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (AdapterError("no"), 404),
        (FullError("no"), 429),
        (ClosedError("no"), 503),
        (CheckpointError("no"), 400),
        (AdapterMismatchError("no"), 400),
        (RequestError("no"), 400),
        (TooLongError("no"), 400),
        (DataError("no"), 400),
        (ConfigError("no"), 400),
        (UnsupportedModelError("no"), 400),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_have_their_status(error: Exception, status: int) -> None:
    found = ask(application(error), "GET", "/v1/models/any")
    assert found.status_code == status
    assert found.json()["error"]["message"] == "no"
    assert found.json()["error"]["code"] == ("model_not_found" if status == 404 else None)
    assert found.headers.get("Retry-After") == ("1" if status in (429, 503) else None)


def test_an_error_that_nobody_expects_is_told_to_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    found = ask(application(ValueError("secret")), "GET", "/v1/models/any")
    assert found.status_code == 500
    assert found.json()["error"]["message"] == "the server failed, and its log says why"
    assert "secret" not in found.text
    [record] = [record for record in caplog.records if record.name == app_file.__name__]
    assert "secret" in str(record.exc_info)


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("path", "sent", "message"),
    [
        ("completions", {"content": b'{"model": ', "headers": JSON}, "the body: JSON decode error"),
        (
            "completions",
            {"content": b"{}", "headers": {"Content-Type": "text/plain"}},
            "the body: send a JSON object, with Content-Type: application/json",
        ),
        ("completions", {"json": [1]}, "the body: send a JSON object, with Content-Type: application/json"),
        ("completions", {"json": {"prompt": "red"}}, "model: Field required"),
        (
            "completions",
            {"json": {"model": "m", "prompt": "red", "n": 9}},
            "n: Input should be less than or equal to 8",
        ),
        (
            "completions",
            {"json": {"model": "m", "prompt": []}},
            "prompt: Value should have at least 1 item after validation, not 0",
        ),
        ("completions", {"json": {"model": "m", "prompt": "red", "x": 1}}, "x: Extra inputs are not permitted"),
        (
            "chat/completions",
            {"json": {"model": "m", "messages": [{"role": "user", "content": "red"}, {"role": "user"}]}},
            "messages.1.content: Field required",
        ),
        (
            "chat/completions",
            {"json": {"model": "m", "messages": [{"role": "user", "content": [{"type": "text"}]}]}},
            "messages.0.content.0.text: Field required",
        ),
        (
            "classify",
            {"json": {"model": "m", "input": ["red"] * 33}},
            "input: List should have at most 32 items after validation, not 33",
        ),
    ],
)
def test_what_is_wrong_with_a_body_is_said_in_a_line(path: str, sent: dict[str, Any], message: str) -> None:
    found = ask(application(), "POST", f"/v1/{path}", **sent)
    assert (found.status_code, found.json()["error"]["message"]) == (400, message)
    assert found.json()["error"]["type"] == "invalid_request_error"


def test_what_is_not_there_is_said_as_any_error() -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("DELETE", "/v1/completions", 405)):
        found = ask(application(), method, path)
        assert found.status_code == status
        assert found.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_too_large_is_said_as_any_error() -> None:
    for sent in ({"content": b"x" * 101}, {"content": iter([b"x" * 60, b"x" * 60])}):
        content = sent["content"]

        async def parts(content: Any = content) -> Any:
            for part in [content] if isinstance(content, bytes) else content:
                yield part

        found = ask(application(body_limit=100), "POST", "/v1/completions", content=parts(), headers=JSON)
        assert found.status_code == 413
        assert found.json()["error"]["message"] == "the request has more than 100 bytes: send less"


ENDPOINTS = {
    ("get", "/healthz"),
    ("get", "/metrics"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{name}"),
    ("post", "/v1/completions"),
    ("post", "/v1/chat/completions"),
    ("post", "/v1/classify"),
    ("post", "/v1/tag"),
    ("post", "/v1/answer"),
    ("get", "/v1/adapters"),
    ("post", "/v1/adapters"),
    ("delete", "/v1/adapters/{name}"),
}
OPEN = {("get", "/healthz")}
ADMIN = {(method, path) for method, path in ENDPOINTS if path.startswith("/v1/adapters")}


def test_the_endpoints() -> None:
    paths = ask(application(), "GET", "/openapi.json").json()["paths"]
    assert {(method, path) for path, own in paths.items() for method in own} == ENDPOINTS


@pytest.mark.parametrize(("method", "path"), sorted(ENDPOINTS))
def test_each_endpoint_has_its_keys(method: str, path: str) -> None:
    app = application(keys=("mine",), admin_keys=("boss",))
    known = {"mine": (method, path) not in ADMIN, "boss": (method, path) in ADMIN, "no": False}
    for key, is_known in known.items():
        found = ask(app, method, path, headers={"Authorization": f"Bearer {key}"})
        is_refused = found.status_code == 401
        assert is_refused == (not is_known and (method, path) not in OPEN), (key, found.text)
        if is_refused:
            called = "admin key, one of SOFTTUNE_ADMIN_KEYS" if (method, path) in ADMIN else "key"
            assert found.json()["error"]["message"].startswith(f"wrong or missing {called}: ")
            assert found.headers["WWW-Authenticate"] == "Bearer"


def test_without_keys_everyone_asks_and_nobody_rules() -> None:
    app = application()
    assert ask(app, "GET", "/v1/models").status_code == 200
    assert ask(app, "GET", "/v1/adapters").status_code == 401


class Counted:
    """What a middleware has told the metrics."""

    def __init__(self) -> None:
        self.ends: list[tuple[Any, ...]] = []

    def ended(self, adapter: str, path: str, status: int, seconds: float) -> None:
        assert seconds >= 0
        self.ends.append((adapter, path, status))


@pytest.mark.parametrize(
    ("scope", "messages", "expected"),
    [
        ({}, [{"type": "http.response.start", "status": 418}, {"type": "http.response.body"}], ("", "unknown", 418)),
        ({"route": SimpleNamespace(path="/v1/{x}"), "state": {"adapter": "one"}}, [], ("one", "/v1/{x}", 500)),
    ],
)
def test_requests_are_counted_however_they_end(
    scope: dict[str, Any], messages: list[Any], expected: tuple[Any, ...]
) -> None:
    metrics: Any = Counted()
    sent: list[Any] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)
        if not messages:
            raise ValueError("broken")

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        await app_file.Counting(inner, metrics)({"type": "http", **scope}, None, send)

    if messages:
        asyncio.run(run())
    else:
        with pytest.raises(ValueError, match="broken"):
            asyncio.run(run())
    assert (metrics.ends, sent) == ([expected], messages)


def test_what_is_no_request_is_not_counted() -> None:
    metrics: Any = Counted()
    seen: list[Any] = []

    async def inner(*given: Any) -> None:
        seen.append(given)

    asyncio.run(app_file.Counting(inner, metrics)({"type": "lifespan"}, 1, 2))
    assert (seen, metrics.ends) == ([({"type": "lifespan"}, 1, 2)], [])


def test_the_application_starts_and_closes_what_it_serves() -> None:
    service: Any = Stub()
    folder: Any = SimpleNamespace(close=lambda: service.called.append("folder"))
    app = create_app(service, folder, Settings(grace=7.0, follow=1000.0))

    async def run() -> None:
        before = asyncio.all_tasks()
        async with app.router.lifespan_context(app):
            assert service.called == ["start"]
            assert len(asyncio.all_tasks() - before) == 1
        assert asyncio.all_tasks() == before  # the folder is no longer followed

    asyncio.run(asyncio.wait_for(run(), WAITING))
    assert service.called == ["start", ("close", 7.0), "folder"]


def test_a_folder_is_followed_whatever_goes_wrong(caplog: pytest.LogCaptureFixture) -> None:
    outcomes = iter([None, OSError("the store is gone"), None])
    done = Event()

    def follow(registry: Any) -> None:
        outcome = next(outcomes, done)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is done:
            done.set()

    async def run() -> None:
        folder: Any = SimpleNamespace(follow=follow)
        following = asyncio.create_task(app_file._follow(folder, service, 0.0))
        while not done.is_set():
            await asyncio.sleep(0)
        following.cancel()

    service: Any = Stub()
    asyncio.run(asyncio.wait_for(run(), WAITING))
    assert [record.getMessage() for record in caplog.records] == ["the adapters' folder could not be read"]


def test_a_folder_is_not_followed_unless_asked_for() -> None:
    folder: Any = None
    service: Any = None
    asyncio.run(asyncio.wait_for(app_file._follow(folder, service, None), WAITING))
