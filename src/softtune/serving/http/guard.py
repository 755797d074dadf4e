"""Who may ask, and how much: keys, the size of a request, and how long it may take."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

Result = TypeVar("Result")

BEARER = HTTPBearer(auto_error=False)
"""How a key is sent."""


def keyed(keys: Sequence[str]) -> type[APIRoute]:
    """Routes that refuse requests without one of the keys, before they read their bodies."""

    class Keyed(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def check(request: Request) -> Response:
                sent = await BEARER(request)
                given = b"" if sent is None else sent.credentials.encode()
                # Compared with all of them, so that the time does not tell which one is close.
                if True not in [secrets.compare_digest(given, key.encode()) for key in keys]:
                    challenge = {"WWW-Authenticate": "Bearer"}
                    raise HTTPException(401, "wrong or missing key: send 'Authorization: Bearer KEY'", challenge)
                return await handle(request)

            return check

    return Keyed


class BodyLimit:
    """ASGI middleware that refuses to read more than so many bytes of a request.

    Args:
        app: the application.
        limit: bytes.
    """

    def __init__(self, app: Any, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        seen = 0

        async def limited() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                raise HTTPException(413, self._refusal)
            return message

        length = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limit:
            await JSONResponse(error_of(413, self._refusal), 413)(scope, receive, send)
            return
        await self.app(scope, limited, send)

    @property
    def _refusal(self) -> str:
        return f"the request has more than {self.limit} bytes: send less"


async def while_asked(request: Request, seconds: float, work: Awaitable[Result]) -> Result:
    """What some work comes to, unless whoever asked has gone, or it takes longer than some seconds.

    Raises:
        HTTPException: one of the two.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise HTTPException(499, "the client has gone")
        raise HTTPException(504, f"the answer takes longer than {seconds:g} seconds: ask for less")
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
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
