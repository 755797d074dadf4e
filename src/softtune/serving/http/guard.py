"""Who may ask, and how much: keys, the size of a request, and how long it may take."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from anyio import fail_after, move_on_after
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from softtune.serving.http.schemas import Failure, Problem

Result = TypeVar("Result")

BEARER = HTTPBearer(auto_error=False)
"""How a key is sent."""
LAST = 1.0
"""Seconds in which a client has to take what it is told when the time is over."""


def keyed(keys: Sequence[str], called: str) -> type[APIRoute]:
    """Routes that refuse requests without one of the keys, which are called so, before they read their bodies."""

    class Keyed(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def check(request: Request) -> Response:
                sent = await BEARER(request)
                given = b"" if sent is None else sent.credentials.encode()
                # Compared with all of them, so that the time does not tell which one is close.
                if True not in [secrets.compare_digest(given, key.encode()) for key in keys]:
                    challenge = {"WWW-Authenticate": "Bearer"}
                    raise HTTPException(401, f"wrong or missing {called}: send 'Authorization: Bearer KEY'", challenge)
                return await handle(request)

            return check

    return Keyed


class Deadline:
    """When a request has to be over.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, none when it is over."""
        return max(0.0, self._end - time.monotonic())

    @property
    def refusal(self) -> str:
        """What is said when an answer is not there by then."""
        return f"the answer takes longer than {self.seconds:g} seconds: ask for less"


class Bounded:
    """ASGI middleware that refuses clients that send too much, or too slowly, and leaves those that do not read.

    Args:
        app: the application, which finds a request's ``deadline`` in its state.
        limit: bytes of a request.
        seconds: until it has to be over.
    """

    def __init__(self, app: Any, limit: int, seconds: float) -> None:
        self.app = app
        self.limit = limit
        self.seconds = seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limit:
            await JSONResponse(error_of(413, self._refusal), 413)(scope, receive, send)
            return
        deadline = scope.setdefault("state", {})["deadline"] = Deadline(self.seconds)
        await self.app(scope, self._reading(receive, deadline), _writing(send, deadline))

    def _reading(self, receive: Any, deadline: Deadline) -> Any:
        """``receive``, which refuses a body that is too long, or is not there when the time is over."""
        seen, is_whole = 0, False

        async def read() -> Any:
            nonlocal seen, is_whole
            if is_whole:  # what comes then is that the client has gone
                return await receive()
            try:
                with fail_after(deadline.left):
                    message = await receive()
            except TimeoutError:
                late = f"the request has not come whole within {self.seconds:g} seconds: send it anew"
                raise HTTPException(408, late, {"Connection": "close"}) from None
            seen += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if seen > self.limit:
                raise HTTPException(413, self._refusal)
            return message

        return read

    @property
    def _refusal(self) -> str:
        return f"the request has more than {self.limit} bytes: send less"


def _writing(send: Any, deadline: Deadline) -> Any:
    """``send``, which says no more to a client that has not read on when the time is over."""
    is_stalled = False

    async def write(message: Any) -> None:
        nonlocal is_stalled
        if is_stalled:
            return
        with move_on_after(max(deadline.left, LAST)) as scope:
            await send(message)
        is_stalled = scope.cancelled_caught

    return write


async def while_asked(request: Request, work: Awaitable[Result]) -> Result:
    """What some work comes to, unless whoever asked has gone, or the request's time is over.

    Raises:
        HTTPException: one of the two.
    """
    deadline: Deadline = request.state.deadline
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, timeout=deadline.left, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise HTTPException(499, "the client has gone")
        raise HTTPException(504, deadline.refusal)
    finally:
        for one in (task, gone):
            one.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)


def error_of(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return Failure(error=Problem(message=message, type=kind, code=code)).model_dump()
