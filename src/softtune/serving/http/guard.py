"""Guards of the HTTP API: keys, the size limit of a request, and its deadline."""

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
"""Reads the key from the ``Authorization`` header."""
LAST = 1.0
"""Seconds that a client has to receive a message after the deadline."""


def keyed(keys: Sequence[str], called: str) -> type[APIRoute]:
    """A route class that rejects requests without a valid key before their bodies are read.

    Args:
        keys: the valid keys.
        called: what the error message calls them.
    """

    class Keyed(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def check(request: Request) -> Response:
                sent = await BEARER(request)
                given = b"" if sent is None else sent.credentials.encode()
                # Compared with all keys, so that the response time does not reveal which one is close.
                if True not in [secrets.compare_digest(given, key.encode()) for key in keys]:
                    challenge = {"WWW-Authenticate": "Bearer"}
                    raise HTTPException(401, f"wrong or missing {called}: send 'Authorization: Bearer KEY'", challenge)
                return await handle(request)

            return check

    return Keyed


class Deadline:
    """The deadline of a request.

    Args:
        seconds: the time limit, counted from now.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the deadline, 0 after it."""
        return max(0.0, self._end - time.monotonic())

    @property
    def refusal(self) -> str:
        """The error message for a response that misses the deadline."""
        return f"the answer takes longer than {self.seconds:g} seconds: ask for less"


class Bounded:
    """ASGI middleware that rejects requests that are too large or too slow, and drops clients that stop reading.

    Args:
        app: the application; it finds the ``deadline`` in a request's state.
        limit: maximum size of a request body in bytes.
        seconds: time limit of a request.
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
        """Wrap ``receive`` to reject a body that is too long, or not complete by the deadline."""
        seen, is_whole = 0, False

        async def read() -> Any:
            nonlocal seen, is_whole
            if is_whole:  # only the disconnect message comes after it
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
    """Wrap ``send`` to send nothing more once a client has not received a message by the deadline."""
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
    """Await the result of some work, and cancel it when the client disconnects or the deadline passes.

    Raises:
        HTTPException: the client has disconnected (499), or the deadline has passed (504).
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
    """The body of an error response in OpenAI's format."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return Failure(error=Problem(message=message, type=kind, code=code)).model_dump()
