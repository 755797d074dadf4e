"""What each endpoint answers, beside a service that is made of what it is told to say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from fastapi import HTTPException

from softtune.errors import AdapterError, RequestError
from softtune.methods import PeftType
from softtune.serving.http import server as server_file
from softtune.serving.http.guard import Deadline
from softtune.serving.http.schemas import ChatRequest, CompletionRequest, LoadRequest, RecordsRequest
from softtune.serving.http.server import Server
from softtune.serving.sampling import SampledToken, SamplingParams
from softtune.serving.service import TokenDelta
from tests.tiny import tokenizer

WAITING = 30
"""Seconds to wait for what happens at once."""
Result = TypeVar("Result")


def finished(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, WAITING))


def version_of(name: str, task: Any = None, peft_type: Any = PeftType.PREFIX_TUNING) -> Any:
    info = SimpleNamespace(task=task, config=SimpleNamespace(peft_type=peft_type))
    return SimpleNamespace(name=name, number=3, info=info, leases=0)


LABELS = SimpleNamespace(
    endpoint="/v1/classify", columns=("x",), describe=lambda: {"template": "{x}", "labels": {"a": "warm"}}
)


class Stub:
    """A service with two adapters that writes two words, or what else it is told to."""

    name = "base"
    engine = None

    def __init__(self) -> None:
        self.tokenizer = tokenizer(ends=False)
        self.is_alive = True
        self.removed: list[str] = []
        self.versions = {"labels": version_of("labels", LABELS), "texts": version_of("texts", None, None)}
        self.registry = SimpleNamespace(versions=[*self.versions.values()], remove=self.removed.append)
        self.checked: list[Any] = []
        self.error: Exception | None = None

    @contextmanager
    def lease(self, name: str) -> Iterator[Any]:
        if name not in self.versions:
            raise AdapterError(f"no adapter is named {name}")
        self.versions[name].leases += 1
        try:
            yield self.versions[name]
        finally:
            self.versions[name].leases -= 1

    def check_writes(self, version: Any) -> None:
        self.checked.append(version)

    def tokenize_prompt(self, version: Any, text: str) -> list[int]:
        return [3] * len(text)

    def tokenize_chat(self, messages: list[Any]) -> list[int]:
        return [3] * len(messages)

    def max_new_tokens(self, version: Any, input_ids: Sequence[int]) -> int:
        return 2

    async def generate(
        self, version: Any, input_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[TokenDelta, None]:
        for text, reason in (("red", None), (" sky", "length")):
            if self.error is not None:
                raise self.error
            yield TokenDelta(SampledToken(3), text, reason)


class Served:
    """A server on a stub, and a request to it."""

    def __init__(self) -> None:
        self.service: Any = Stub()
        self.folder: Any = SimpleNamespace(names=["labels", "more"], load=lambda name, registry: version_of(name))
        metrics: Any = SimpleNamespace(
            text=b"counts", read=lambda *_: None, wrote=lambda *_: None, began_to_write=lambda *_: None
        )
        self.server = Server(self.service, self.folder, metrics)

        async def is_disconnected() -> bool:
            return False

        state = SimpleNamespace(deadline=Deadline(WAITING))
        self.request: Any = SimpleNamespace(state=state, is_disconnected=is_disconnected)

    @property
    def leases(self) -> list[int]:
        return [version.leases for version in self.service.versions.values()]


@pytest.fixture
def own() -> Served:
    return Served()


def test_health_is_the_services(own: Served) -> None:
    assert finished(own.server.health()) == {"status": "ok"}
    own.service.is_alive = False
    with pytest.raises(HTTPException) as refusal:
        finished(own.server.health())
    assert (refusal.value.status_code, "start the server anew" in refusal.value.detail) == (503, True)


BASE = {"id": "base", "object": "model", "created": 0, "owned_by": "softtune"}
LISTED: dict[str, dict[str, Any]] = {
    "labels": {
        **BASE,
        "id": "labels",
        "parent": "base",
        "version": 3,
        "method": "PREFIX_TUNING",
        "endpoint": "/v1/classify",
        "columns": ["x"],
        "template": "{x}",
        "labels": {"a": "warm"},
    },
    "texts": {
        **BASE,
        "id": "texts",
        "parent": "base",
        "version": 3,
        "method": None,
        "endpoint": "/v1/completions",
    },
}


def test_models_are_described_by_what_they_answer(own: Served) -> None:
    assert finished(own.server.models()) == {"object": "list", "data": [BASE, *LISTED.values()]}
    for name, described in LISTED.items():
        assert finished(own.server.model(name)) == described
    assert finished(own.server.model("base")) == BASE
    with pytest.raises(AdapterError):
        finished(own.server.model("nobody"))
    assert own.leases == [0, 0]


def test_adapters_are_listed_loaded_and_removed(own: Served) -> None:
    own.service.versions["texts"].leases = 2
    served = [{"name": "labels", "version": 3, "requests": 0}, {"name": "texts", "version": 3, "requests": 2}]
    assert finished(own.server.adapters()) == {"served": served, "available": ["labels", "more"]}
    assert finished(own.server.load(LoadRequest(name="more"))) == {"name": "more", "version": 3}
    assert finished(own.server.unload("texts")) == {"removed": "texts"}
    assert own.service.removed == ["texts"]


def test_metrics_and_the_page_are_sent_as_they_are(own: Served) -> None:
    assert finished(own.server.metrics()).body == b"counts"
    assert b"<title>softtune</title>" in finished(own.server.page()).body


@pytest.mark.parametrize(("name", "place"), [("texts", 1), ("base", None)])
def test_a_completion_is_sent_whole(own: Served, name: str, place: int | None) -> None:
    body = CompletionRequest(model=name, prompt=["abc", "d"], n=2)
    sent = json.loads(finished(own.server.complete(body, own.request)).body)
    assert [choice["text"] for choice in sent["choices"]] == ["red sky"] * 4
    assert sent["usage"] == {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12}
    assert (sent["model"], own.request.state.adapter) == (name, name)
    assert own.service.checked == [None if place is None else own.service.versions[name]]
    assert own.leases == [0, 0]


def test_a_conversation_is_sent_whole(own: Served) -> None:
    body = ChatRequest.model_validate({"model": "texts", "messages": [{"role": "user", "content": "red"}]})
    sent = json.loads(finished(own.server.chat(body, own.request)).body)
    assert sent["choices"][0]["message"] == {"role": "assistant", "content": "red sky", "refusal": None}


def test_a_stream_keeps_its_adapter_until_its_end(own: Served) -> None:
    body = CompletionRequest.model_validate(
        {"model": "texts", "prompt": "a", "stream": True, "stream_options": {"include_usage": True}}
    )

    async def read() -> list[str]:
        response: Any = await own.server.complete(body, own.request)
        assert (response.media_type, response.headers["Cache-Control"]) == ("text/event-stream", "no-store")
        assert own.leases == [0, 1]
        return [event async for event in response.body_iterator]

    *events, done = finished(read())
    assert done == "data: [DONE]\n\n"
    parts = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [[choice["text"] for choice in part["choices"]] for part in parts] == [["red"], [" sky"], []]
    assert parts[-1]["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    assert own.leases == [0, 0]


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_before_the_first_token_has_its_own_status(own: Served, stream: bool) -> None:
    own.service.error = RequestError("the adapter is broken")
    body = CompletionRequest(model="texts", prompt="a", stream=stream)
    with pytest.raises(RequestError, match="the adapter is broken"):
        finished(own.server.complete(body, own.request))
    assert own.leases == [0, 0]


def test_options_of_a_stream_need_one(own: Served) -> None:
    body = CompletionRequest.model_validate({"model": "texts", "prompt": "a", "stream_options": {}})
    with pytest.raises(RequestError, match="stream_options needs stream: set stream to true"):
        finished(own.server.complete(body, own.request))


class Tasks:
    """Records in place of those that a ``TaskRunner`` runs."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.cancelled: list[Any] = []

    def record(self, version: Any, given: Any) -> Any:
        return {"x": given}

    async def run(self, endpoint: str, version: Any, record: Any) -> dict[str, Any]:
        self.begun.append(record["x"])
        try:
            while len(self.begun) < 3:
                await asyncio.sleep(0)  # until all have begun
            if record["x"] == "wait":
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.append(record["x"])
            raise
        if record["x"] == "broken":
            raise RequestError("the record is broken")
        return {"label": record["x"], "endpoint": endpoint, "adapter": version.name}


@pytest.fixture
def tasks(own: Served) -> Tasks:
    own.server._tasks = tasks = Tasks()  # type: ignore[assignment]
    return tasks


def test_records_are_answered_in_their_order_all_at_once(own: Served, tasks: Tasks) -> None:
    handle = own.server.records("/v1/classify", "Label records.")
    assert (handle.__name__, handle.__doc__) == ("classify", "Label records.")
    body = RecordsRequest(model="labels", input=["a", "b", "c"])
    sent = finished(handle(body, own.request))
    shared = {"endpoint": "/v1/classify", "adapter": "labels"}
    data = [{"index": index, "label": label, **shared} for index, label in enumerate("abc")]
    assert sent == {"object": "list", "model": "labels", "data": data}
    assert own.leases == [0, 0]


def test_one_broken_record_ends_the_others(own: Served, tasks: Tasks) -> None:
    body = RecordsRequest(model="labels", input=["wait", "broken", "wait"])
    with pytest.raises(RequestError, match="the record is broken"):
        finished(own.server.records("/v1/classify", "")(body, own.request))
    assert tasks.cancelled == ["wait", "wait"]


def test_the_base_model_takes_no_records(own: Served, tasks: Tasks) -> None:
    with pytest.raises(RequestError, match="base is the base model: ask an adapter"):
        finished(own.server.records("/v1/classify", "")(RecordsRequest(model="base", input="a"), own.request))


class Stream:
    """The rest of a stream, and whether all that belongs to it has been closed."""

    def __init__(self, *parts: dict[str, Any] | Exception | None, seconds: float = WAITING) -> None:
        self.closed: list[str] = []
        lease = ExitStack()
        lease.callback(self.closed.append, "lease")
        self.events = server_file._events({"first": 1}, self._parts(parts), lease, Deadline(seconds))

    async def _parts(self, parts: Sequence[dict[str, Any] | Exception | None]) -> AsyncGenerator[dict[str, Any], None]:
        try:
            for part in parts:
                if isinstance(part, Exception):
                    raise part
                if part is None:
                    await asyncio.Event().wait()
                else:
                    yield part
        finally:
            self.closed.append("parts")

    async def read(self, most: int = 99) -> list[str]:
        found = []
        while len(found) < most:
            try:
                found.append(await anext(self.events))
            except StopAsyncIteration:
                break
        await self.events.aclose()
        return found


def told(status_type: str, message: str) -> str:
    error = {"message": message, "type": status_type, "param": None, "code": None}
    return f"data: {json.dumps({'error': error})}\n\n"


def test_a_stream_ends_with_done() -> None:
    stream = Stream({"second": 2})
    assert finished(stream.read()) == ['data: {"first": 1}\n\n', 'data: {"second": 2}\n\n', "data: [DONE]\n\n"]
    assert stream.closed == ["parts", "lease"]


@pytest.mark.parametrize(
    ("part", "seconds", "message"),
    [
        (RequestError("the adapter is broken"), WAITING, "the adapter is broken"),
        (ZeroDivisionError("secret"), WAITING, "the server failed, and its log says why"),
        (None, 0.0, "the answer takes longer than 0 seconds: ask for less"),
    ],
    ids=["named", "unknown", "late"],
)
def test_an_error_on_the_way_is_the_last_event(
    part: Exception | None, seconds: float, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Stream(part, seconds=seconds)
    assert finished(stream.read()) == ['data: {"first": 1}\n\n', told("server_error", message)]
    assert stream.closed == ["parts", "lease"]
    assert bool(caplog.records) == isinstance(part, ZeroDivisionError)


def test_a_client_that_leaves_a_stream_ends_it() -> None:
    stream = Stream({"second": 2}, None)
    assert len(finished(stream.read(2))) == 2
    assert stream.closed == ["parts", "lease"]
