"""Keys, sizes and deadlines of requests: who is let in, what is cut off, and what goes through untouched."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, HTTPException

from softtune.serving.http import guard
from softtune.serving.http.guard import Bounded, Deadline, error_of, keyed, while_asked

Message = dict[str, Any]
WAITING = 10
"""Seconds to wait for what happens at once."""


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(guard, "time", clock)
    return clock


def test_a_deadline_counts_down_to_nothing(clock: Clock) -> None:
    deadline = Deadline(2.5)
    assert deadline.left == 2.5
    clock.now += 1
    assert deadline.left == 1.5
    clock.now += 10
    assert deadline.left == 0
    assert deadline.refusal == "the answer takes longer than 2.5 seconds: ask for less"
    assert "longer than 300 seconds" in Deadline(300.0).refusal


def ask(application: Any, path: str = "/", **headers: str) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=application)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(send())


@pytest.fixture
def locked() -> FastAPI:
    """An application with a door for two keys."""
    router, application = APIRouter(route_class=keyed(("mine", "yours"), "key")), FastAPI()
    router.get("/")(lambda: "come in")
    application.include_router(router)
    return application


@pytest.mark.parametrize(
    "sent", ["", "mine", "Bearer", "Bearer ", "Bearer min", "Bearer mine2", "Bearer MINE", "Basic mine"]
)
def test_who_has_no_key_stays_outside(locked: FastAPI, sent: str) -> None:
    found = ask(locked, **({"Authorization": sent} if sent else {}))
    assert (found.status_code, found.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert found.json()["detail"] == "wrong or missing key: send 'Authorization: Bearer KEY'"


@pytest.mark.parametrize("sent", ["Bearer mine", "Bearer yours", "bearer mine"])
def test_who_has_a_key_comes_in(locked: FastAPI, sent: str) -> None:
    assert ask(locked, Authorization=sent).json() == "come in"


def test_without_keys_there_is_no_way_in() -> None:
    router, application = APIRouter(route_class=keyed((), "admin key")), FastAPI()
    router.get("/")(lambda: "come in")
    application.include_router(router)
    found = ask(application, Authorization="Bearer ")
    assert (found.status_code, "wrong or missing admin key" in found.text) == (401, True)


class Asked:
    """An ASGI application behind ``Bounded``, and what it has been sent and has sent."""

    def __init__(self, *messages: Message, limit: int = 10, seconds: float = 100.0, **headers: str) -> None:
        self.messages = [*messages]
        self.seen: list[Message] = []
        self.sent: list[Message] = []
        self.bounded = Bounded(self.application, limit, seconds)
        encoded = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self.scope: Message = {"type": "http", "method": "POST", "path": "/", "headers": encoded}

    async def application(self, scope: Any, receive: Any, send: Any) -> None:
        self.deadline = scope["state"]["deadline"]
        while not self.seen or self.seen[-1].get("more_body"):
            self.seen.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive(self) -> Message:
        await asyncio.sleep(0)
        if not self.messages:
            await asyncio.Event().wait()
        return self.messages.pop(0)

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def run(self) -> int:
        """The status of the answer."""
        asyncio.run(asyncio.wait_for(self.bounded(self.scope, self.receive, self.send), WAITING))
        return int(self.sent[0]["status"])


def body(content: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": content, "more_body": more}


def test_a_body_up_to_the_limit_goes_through() -> None:
    asked = Asked(body(b"12345", more=True), body(b"67890"), content_length="10")
    assert asked.run() == 200
    assert b"".join(message["body"] for message in asked.seen) == b"1234567890"
    assert 0 < asked.deadline.left <= 100


@pytest.mark.parametrize("length", ["11", "99999999999999999999"])
def test_a_body_that_says_it_is_too_long_is_not_read(length: str) -> None:
    asked = Asked(body(b"1"), content_length=length)
    assert asked.run() == 413
    assert (asked.seen, len(asked.messages)) == ([], 1)
    assert b"the request has more than 10 bytes: send less" in asked.sent[1]["body"]


@pytest.mark.parametrize("headers", [{}, {"content_length": "3"}, {"content_length": "-1"}, {"content_length": "many"}])
def test_a_body_that_is_too_long_is_cut_off_whatever_it_says(headers: dict[str, str]) -> None:
    asked = Asked(body(b"123456", more=True), body(b"78901", more=True), body(b"more"), **headers)
    with pytest.raises(HTTPException) as refusal:
        asked.run()
    assert (refusal.value.status_code, refusal.value.detail) == (413, "the request has more than 10 bytes: send less")
    assert len(asked.messages) == 1  # which is never read


def test_a_body_that_does_not_end_is_given_up_on() -> None:
    asked = Asked(body(b"1", more=True), seconds=0.0)
    with pytest.raises(HTTPException) as refusal:
        asked.run()
    assert (refusal.value.status_code, refusal.value.headers) == (408, {"Connection": "close"})
    assert refusal.value.detail == "the request has not come whole within 0 seconds: send it anew"


def test_a_client_is_heard_after_its_body_whatever_the_time(clock: Clock) -> None:
    asked, found = Asked(body(b"1"), {"type": "http.disconnect"}), list[Message]()

    async def listen(scope: Any, receive: Any, send: Any) -> None:
        found.append(await receive())
        clock.now += 1000
        found.append(await receive())

    asked.bounded = Bounded(listen, 10, 100.0)
    asyncio.run(asked.bounded(asked.scope, asked.receive, asked.send))
    assert [message["type"] for message in found] == ["http.request", "http.disconnect"]


def test_what_is_no_request_goes_through() -> None:
    found: list[Any] = []

    async def application(*given: Any) -> None:
        found.extend(given)

    asyncio.run(Bounded(application, 1, 1.0)({"type": "lifespan"}, ask, body))
    assert found == [{"type": "lifespan"}, ask, body]


def test_who_stops_reading_is_sent_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LAST", 0.0)
    tried: list[int] = []

    async def stall(number: int) -> None:
        tried.append(number)
        if number == 2:
            await asyncio.Event().wait()

    async def write_all() -> None:
        write = guard._writing(stall, Deadline(0.0))
        for number in (1, 2, 3, 4):
            await write(number)

    asyncio.run(asyncio.wait_for(write_all(), WAITING))
    assert tried == [1, 2]


def request(*, seconds: float = 100.0, is_gone: bool = False) -> Any:
    async def is_disconnected() -> bool:
        return is_gone

    return SimpleNamespace(state=SimpleNamespace(deadline=Deadline(seconds)), is_disconnected=is_disconnected)


async def forever(cancelled: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        cancelled.append("cancelled")
        raise


def asked_for(given: Any, work: Callable[[], Awaitable[Any]]) -> Any:
    """The result of some work, which comes without any waiting."""

    async def run() -> Any:
        result = asyncio.ensure_future(while_asked(given, work()))
        for _ in range(50):
            await asyncio.sleep(0)
        assert result.done()
        return result.result()

    return asyncio.run(run())


def test_work_that_is_done_in_time_gives_its_result() -> None:
    async def work() -> int:
        return 7

    async def fail() -> None:
        raise ValueError("broken")

    assert asked_for(request(), work) == 7
    with pytest.raises(ValueError, match="broken"):
        asked_for(request(), fail)


@pytest.mark.parametrize(
    ("given", "status", "detail"),
    [
        ({"seconds": 0.0}, 504, "the answer takes longer than 0 seconds: ask for less"),
        ({"is_gone": True}, 499, "the client has gone"),
    ],
)
def test_work_that_nobody_waits_for_is_cancelled(given: dict[str, Any], status: int, detail: str) -> None:
    cancelled: list[str] = []
    with pytest.raises(HTTPException) as refusal:
        asked_for(request(**given), lambda: forever(cancelled))
    assert (refusal.value.status_code, refusal.value.detail) == (status, detail)
    assert cancelled == ["cancelled"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (499, "invalid_request_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_errors_have_openais_types(status: int, kind: str) -> None:
    expected = {"message": "no", "type": kind, "param": None, "code": "why"}
    assert error_of(status, "no", "why") == {"error": expected}
    assert error_of(status, "no")["error"]["code"] is None
