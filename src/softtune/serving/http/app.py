"""The FastAPI application: its endpoints, who may call them, and how errors become HTTP responses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from softtune.errors import (
    AdapterError,
    AdapterMismatchError,
    CheckpointError,
    ClosedError,
    FullError,
    SofttuneError,
)
from softtune.serving.folder import AdapterFolder
from softtune.serving.http.guard import BEARER, Bounded, error_of, keyed
from softtune.serving.http.metrics import Metrics
from softtune.serving.http.schemas import Failure
from softtune.serving.http.server import Server
from softtune.serving.service import Service
from softtune.tasks import KINDS

logger = logging.getLogger(__name__)

STATUS: dict[type[Exception], int] = {
    SofttuneError: 400,
    AdapterError: 404,
    CheckpointError: 400,
    AdapterMismatchError: 400,
    FullError: 429,
    ClosedError: 503,
}
"""The HTTP status of each error class."""
SAID: dict[int | str, dict[str, Any]] = {status: {"model": Failure} for status in (400, 401, 404, 429, "default")}
"""The error responses of every endpoint, for the OpenAPI schema; all have the same body."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of an HTTP server."""

    keys: tuple[str, ...] = ()
    """API keys, one of which a request needs; without any, everyone may send requests."""
    admin_keys: tuple[str, ...] = ()
    """Keys that may load and unload adapters; without any, nobody may."""
    body_limit: int = 2**18
    """Maximum size of a request body in bytes."""
    seconds: float = 300.0
    """Time limit of a request in seconds, from its start to the end of its response."""
    follow: float | None = None
    """Seconds between two scans of the adapters' folder; by default it is scanned only at the start."""
    grace: float = 30.0
    """Seconds that running requests have to finish when the server shuts down."""


def create_app(service: Service, folder: AdapterFolder, settings: Settings) -> FastAPI:
    """Build the FastAPI application.

    Args:
        service: the served base model and adapters; started and closed with the application.
        folder: the folder from which further adapters are loaded.
        settings: the server's settings.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        following = asyncio.create_task(_follow(folder, service, settings.follow))
        yield
        following.cancel()
        await run_in_threadpool(service.close, settings.grace)
        await run_in_threadpool(folder.close)

    app = FastAPI(title="softtune", version=metadata.version("softtune"), lifespan=lifespan)
    metrics = Metrics(service)
    app.add_middleware(Bounded, limit=settings.body_limit, seconds=settings.seconds)
    app.add_middleware(Counting, metrics=metrics)
    for kind, status in STATUS.items():
        app.add_exception_handler(kind, partial(_error_response, status))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _broken)
    _add_endpoints(app, Server(service, folder, metrics), settings)
    return app


def _add_endpoints(app: FastAPI, server: Server, settings: Settings) -> None:
    asking = _router(settings.keys, "key") if settings.keys else APIRouter(responses=SAID)
    ruling = _router(settings.admin_keys, "admin key, one of SOFTTUNE_ADMIN_KEYS")
    app.get("/", response_class=HTMLResponse, include_in_schema=False)(server.page)
    app.get("/healthz")(server.health)
    asking.get("/metrics", response_class=Response)(server.metrics)
    asking.get("/v1/models")(server.models)
    asking.get("/v1/models/{name:path}")(server.model)
    asking.post("/v1/completions")(server.complete)
    asking.post("/v1/chat/completions")(server.chat)
    for endpoint, summary in {
        kind.endpoint: kind.endpoint_summary for kind in [KINDS[-1], *KINDS] if kind.endpoint
    }.items():
        asking.post(endpoint)(server.records(endpoint, summary))
    ruling.get("/v1/adapters")(server.adapters)
    ruling.post("/v1/adapters")(server.load)
    ruling.delete("/v1/adapters/{name:path}")(server.unload)
    app.include_router(asking)
    app.include_router(ruling)


def _router(keys: Sequence[str], called: str) -> APIRouter:
    """A router whose endpoints require one of the keys."""
    return APIRouter(route_class=keyed(keys, called), dependencies=[Depends(BEARER)], responses=SAID)


async def _follow(folder: AdapterFolder, service: Service, seconds: float | None) -> None:
    while seconds is not None:
        await asyncio.sleep(seconds)
        try:
            await run_in_threadpool(folder.follow, service.registry)
        except Exception:  # such as a store that is unreachable for a while
            logger.exception("the adapters' folder could not be read")


class Counting:
    """ASGI middleware that counts requests by adapter, endpoint and status.

    Args:
        app: the application.
        metrics: records each request.
    """

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        clock, status = time.perf_counter(), 500

        async def noting(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        scope.setdefault("state", {})
        try:
            await self.app(scope, receive, noting)
        finally:
            path = getattr(scope.get("route"), "path", "unknown")
            self.metrics.ended(scope["state"].get("adapter", ""), path, status, time.perf_counter() - clock)


async def _error_response(status: int, request: Request, error: Exception) -> JSONResponse:
    code = "model_not_found" if status == 404 else None
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(error_of(status, str(error), code), status, headers)


async def _invalid(request: Request, error: Any) -> JSONResponse:
    errors = error.errors()
    # Of a union's errors, that of the member that was meant.
    first = next((one for one in errors if not one["type"].endswith("_type")), errors[0])
    if first["loc"] == ("body",) and first["type"].endswith("_type"):
        first = {**first, "msg": "send a JSON object, with Content-Type: application/json"}
    place = "" if first["type"] == "json_invalid" else ".".join(str(x) for x in first["loc"][1:] if not _is_form(x))
    return JSONResponse(error_of(400, f"{place or 'the body'}: {first['msg']}"), 400)


def _is_form(part: str | int) -> bool:
    """Whether a part of an error's location is pydantic's name for a member of a union type."""
    return isinstance(part, str) and (part in ("str", "constrained-str", "dict") or "[" in part)


async def _refused(request: Request, error: Any) -> JSONResponse:
    cause = (
        error.__cause__ if isinstance(error.__cause__, HTTPException) else error
    )  # FastAPI wraps errors from reading the body
    return JSONResponse(error_of(cause.status_code, str(cause.detail)), cause.status_code, cause.headers)


async def _broken(request: Request, error: Exception) -> JSONResponse:
    logger.error("a request failed", exc_info=error)
    return JSONResponse(error_of(500, "the server failed, and its log says why"), 500)
