"""The handlers of the HTTP endpoints.

A name in a request is looked up among the served adapters or in the listing of the adapters' folder: no part of a
request ever becomes a path. The docstrings of handlers are the endpoints' descriptions in the OpenAPI schema.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar

from anyio import fail_after
from fastapi import HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, Response, StreamingResponse

from softtune.adapter_context import BEHIND
from softtune.errors import RequestError, SofttuneError
from softtune.serving.folder import AdapterFolder
from softtune.serving.http.completions import (
    ChatCompletionFormat,
    CompletionFormat,
    Generations,
    PromptTokens,
    ResponseFormat,
    chat_prompts,
    completion_prompts,
)
from softtune.serving.http.guard import Deadline, error_of, while_asked
from softtune.serving.http.metrics import Metrics
from softtune.serving.http.schemas import ChatRequest, CompletionRequest, LoadRequest, RecordsRequest
from softtune.serving.registry import Version
from softtune.serving.service import Service
from softtune.serving.tasks import TaskRunner

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Server:
    """The handlers of the endpoints.

    Args:
        service: the served base model and adapters.
        folder: the folder from which further adapters are loaded.
        metrics: counts the tokens.
    """

    def __init__(self, service: Service, folder: AdapterFolder, metrics: Metrics) -> None:
        self._service = service
        self._tasks = TaskRunner(service, metrics.read)
        self._folder = folder
        self._metrics = metrics
        self._page = (files("softtune.serving.http") / "page.html").read_text(encoding="utf-8")

    async def page(self) -> HTMLResponse:
        """The HTML page to try the served adapters."""
        return HTMLResponse(self._page)

    async def health(self) -> dict[str, str]:
        """Whether the server works."""
        if not self._service.is_alive:
            raise HTTPException(503, "requests are not worked on: start the server anew")
        return {"status": "ok"}

    async def metrics(self) -> Response:
        """Counts for Prometheus."""
        return Response(self._metrics.text, media_type="text/plain; version=0.0.4")

    async def models(self) -> dict[str, Any]:
        """The base model and all adapters."""
        versions = self._service.registry.versions
        return {"object": "list", "data": [self._base, *(self._described(version) for version in versions)]}

    async def model(self, name: str) -> dict[str, Any]:
        """The base model or an adapter."""
        if name == self._service.name:
            return self._base
        await self._ready(name)
        with self._service.lease(name) as version:
            return self._described(version)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Go on with texts."""

        def ask(version: Version | None) -> tuple[list[PromptTokens], ResponseFormat]:
            kind = CompletionFormat(self._service.tokenizer, body.logprobs is not None)
            return completion_prompts(body, self._service, version), kind

        return await self._write(request, body, ask)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Go on with a conversation."""

        def ask(version: Version | None) -> tuple[list[PromptTokens], ResponseFormat]:
            kind = ChatCompletionFormat(self._service.tokenizer, body.logprobs)
            return chat_prompts(body, self._service, version), kind

        return await self._write(request, body, ask)

    def records(self, endpoint: str, summary: str) -> Callable[..., Awaitable[dict[str, Any]]]:
        """The handler of an endpoint that takes records, with its summary for the API's documentation."""

        async def handle(body: RecordsRequest, request: Request) -> dict[str, Any]:
            return await self._each(body, request, partial(self._tasks.run, endpoint))

        handle.__name__, handle.__doc__ = endpoint.rpartition("/")[2], summary
        return handle

    async def adapters(self) -> dict[str, Any]:
        """The adapters that are served, and those in the folder."""
        versions = self._service.registry.versions
        served = [{"name": v.name, "version": v.number, "requests": v.leases} for v in versions]
        return {"served": served, "available": await run_in_threadpool(lambda: self._folder.names)}

    async def load(self, body: LoadRequest) -> dict[str, Any]:
        """Serve an adapter of the folder, in place of what had its name; where it is broken, that stays."""
        version = await run_in_threadpool(self._folder.load, body.name, self._service.registry)
        return {"name": version.name, "version": version.number}

    async def unload(self, name: str) -> dict[str, str]:
        """Serve an adapter no longer; requests that have begun end as they would."""
        await run_in_threadpool(self._service.registry.remove, name)
        return {"removed": name}

    async def _write(
        self,
        request: Request,
        body: CompletionRequest | ChatRequest,
        ask: Callable[[Version | None], tuple[list[PromptTokens], ResponseFormat]],
    ) -> Response:
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options needs stream", "set stream to true")
        await self._ready(body.model)
        with ExitStack() as stack:
            version = stack.enter_context(self._named(body.model, request))
            self._service.check_writes(version)
            prompts, kind = await run_in_threadpool(ask, version)
            texts = Generations(self._service, self._metrics, version, body.model, prompts, body.n, kind)
            if not body.stream:
                whole = await while_asked(request, texts.whole())
                return Response(json.dumps(whole, allow_nan=False), media_type="application/json")
            parts = texts.parts(with_usage=bool(body.stream_options and body.stream_options.include_usage))
            first = await while_asked(request, anext(parts))  # errors before it get their own HTTP status
            lease = stack.pop_all()
        events = _events(first, parts, lease, request.state.deadline)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _each(
        self, body: RecordsRequest, request: Request, work: Callable[[Version, Mapping[str, Any]], Awaitable[Any]]
    ) -> dict[str, Any]:
        """The response for all records of a request, which are processed concurrently."""
        await self._ready(body.model)
        with self._named(body.model, request) as version:
            if version is None:
                raise RequestError(f"{body.model} is the base model", "ask an adapter")
            records = [self._tasks.record(version, record) for record in body.records]
            together = _together([work(version, record) for record in records])
            results = await while_asked(request, together)
        return {"object": "list", "model": body.model, "data": [{"index": i, **r} for i, r in enumerate(results)]}

    async def _ready(self, name: str) -> None:
        """Compose the version of joined names in a thread, so that the event loop is not blocked."""
        if BEHIND in name and name != self._service.name:
            await run_in_threadpool(self._service.registry.compose, name)

    @contextmanager
    def _named(self, name: str, request: Request) -> Iterator[Version | None]:
        """Lease the adapter that a request names, for the length of the block; None for the base model."""
        if name == self._service.name:
            request.state.adapter = name
            yield None
            return
        with self._service.lease(name) as version:
            request.state.adapter = name
            yield version

    @property
    def _base(self) -> dict[str, Any]:
        return {"id": self._service.name, "object": "model", "created": 0, "owned_by": "softtune"}

    def _described(self, version: Version) -> dict[str, Any]:
        """An adapter's entry in ``/v1/models``: OpenAI's fields, and those that describe its task."""
        task = version.info.task
        more: dict[str, Any] = {"endpoint": (task and task.endpoint) or "/v1/completions"}
        if task is not None:
            more |= {"columns": list(task.columns), **task.describe()}
        method = version.info.config.peft_type
        return {
            **self._base,
            "id": version.name,
            "parent": self._service.name,
            "version": version.number,
            "method": None if method is None else method.value,
            **more,
        }


async def _events(
    first: dict[str, Any], parts: AsyncGenerator[dict[str, Any], None], lease: ExitStack, deadline: Deadline
) -> AsyncGenerator[str, None]:
    """The server-sent events of a streamed response; an error on the way becomes the last event."""
    with lease:
        try:
            yield _event(first)
            with suppress(StopAsyncIteration):
                while True:
                    with fail_after(deadline.left):
                        part = await anext(parts)
                    yield _event(part)
            yield "data: [DONE]\n\n"
        except SofttuneError as error:
            yield _event(error_of(500, str(error)))
        except TimeoutError:
            yield _event(error_of(504, deadline.refusal))
        except Exception:
            logger.exception("a streamed answer failed")
            yield _event(error_of(500, "the server failed, and its log says why"))
        finally:
            await parts.aclose()


async def _together(works: Sequence[Awaitable[Result]]) -> list[Result]:
    """Run awaitables concurrently and return their results; if one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"
