"""A request waits, runs and ends once, however it ends, and leaves nothing behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from softtune.serving.engine_config import EngineConfig
from softtune.serving.registry import Version
from softtune.serving.request_queue import RequestHandle
from softtune.serving.running_batch import RunningBatch

BYTES = 10
"""Size of each adapter."""


@dataclass(eq=False)
class Request:
    """A request that is done with its last output."""

    name: str
    outputs: int = 1
    taken: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.taken) == self.outputs


@dataclass
class Adapter:
    name: str
    nbytes: int = BYTES

    def release(self) -> None:
        pass


class Batched:
    """A batch, and all that it does to its requests, in order."""

    def __init__(self, **config: int) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.batch: RunningBatch[Request, Adapter] = RunningBatch(
            EngineConfig(**config),
            self.load,
            lambda handle, adapter: self.start(handle, adapter),
            lambda handle: self.events.append(("free", handle.request.name)),
        )
        self.versions = {name: version_of(name) for name in "xyz"}

    def load(self, version: Version) -> Adapter:
        if version.name == "z":
            raise OSError("the file is gone")
        return Adapter(version.name)

    def start(self, handle: RequestHandle[Request], adapter: Adapter | None) -> None:
        self.events.append(("start", handle.request.name, adapter and adapter.name))

    def add(self, name: str, adapter: str | None = None, outputs: int = 1) -> RequestHandle[Request]:
        """A waiting request."""
        handle = RequestHandle(
            None if adapter is None else self.versions[adapter],
            Request(name, outputs),
            lambda error: self.events.append(("fail", name, str(error))),
            lambda: self.events.append(("end", name)),
        )
        self.batch.queue.add(handle)
        return handle

    def admit(self) -> list[str]:
        """Admit all that have a place; the names of those that are running."""
        self.batch.admit(lambda handle: True)
        return self.running

    @property
    def running(self) -> list[str]:
        return [handle.request.name for handle in self.batch.running]

    def new_events(self) -> list[tuple[Any, ...]]:
        events, self.events = self.events, []
        return events


def version_of(name: str) -> Version:
    info: Any = None
    return Version(name, 1, info, Path(name))


def test_requests_start_in_the_order_of_the_queue_while_there_are_places() -> None:
    own = Batched(max_num_seqs=3)
    for name, adapter in [("1", "x"), ("2", "x"), ("3", None), ("4", "y")]:
        own.add(name, adapter)
    assert not own.batch.is_idle
    assert own.admit() == ["1", "3", "4"]  # adapters take turns
    assert own.new_events() == [("start", "1", "x"), ("start", "3", None), ("start", "4", "y")]
    assert [handle.request.name for handle in own.batch.queue] == ["2"]
    assert own.admit() == ["1", "3", "4"]


def test_none_overtakes_a_request_that_does_not_fit() -> None:
    own = Batched()
    for name, adapter in [("small", None), ("large", "x"), ("small too", "y")]:
        own.add(name, adapter)
    own.batch.admit(lambda handle: handle.request.name != "large")
    assert own.running == ["small"]
    assert own.admit() == ["small", "large", "small too"]


def test_whether_a_request_fits_is_asked_of_what_is_running_by_then() -> None:
    own = Batched()
    for name in "123":
        own.add(name)
    seen: list[list[str]] = []
    own.batch.admit(lambda handle: seen.append(own.running) or len(own.running) < 2)
    assert seen == [[], ["1"], ["1", "2"]]
    assert own.running == ["1", "2"]


def test_an_adapter_that_cannot_be_loaded_ends_its_own_requests() -> None:
    own = Batched()
    own.add("broken", "z")
    own.add("good", "x")
    assert own.admit() == ["good"]
    assert own.new_events() == [("fail", "broken", "the file is gone"), ("end", "broken"), ("start", "good", "x")]


def test_a_request_that_cannot_start_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Batched()

    def fail(handle: RequestHandle[Request], adapter: Adapter | None) -> None:
        raise ValueError("no such option")

    monkeypatch.setattr(own, "start", fail)
    own.add("broken", "x")
    assert own.admit() == []
    assert own.new_events() == [
        ("free", "broken"),
        ("fail", "broken", "no such option"),
        ("end", "broken"),
    ]
    assert own.batch.adapter_cache.idle == [Adapter("x")]
    assert own.batch.is_idle


def test_a_request_ends_with_its_last_output() -> None:
    own = Batched()
    handle = own.add("1", "x", outputs=2)
    own.admit()
    own.new_events()
    own.batch.process(handle, handle.request.taken.append, 7)
    assert (own.running, own.new_events()) == (["1"], [])
    assert not own.batch.adapter_cache.idle
    own.batch.process(handle, handle.request.taken.append, 8)
    assert handle.request.taken == [7, 8]
    assert (own.running, own.new_events()) == ([], [("free", "1"), ("end", "1")])
    assert own.batch.adapter_cache.idle == [Adapter("x")]
    assert own.batch.is_idle


def test_an_output_that_cannot_be_taken_ends_one_request() -> None:
    own = Batched()
    bad, good = own.add("bad", "x"), own.add("good", "y")
    own.admit()
    own.new_events()

    def fail(output: int) -> None:
        bad.request.taken.append(output)  # done, but not without an error
        raise ValueError("nobody listens")

    own.batch.process(bad, fail, 7)
    assert own.new_events() == [("free", "bad"), ("fail", "bad", "nobody listens"), ("end", "bad")]
    assert own.running == ["good"]
    own.batch.process(good, good.request.taken.append, 7)
    assert own.new_events() == [("free", "good"), ("end", "good")]


def test_a_preempted_request_comes_first_again() -> None:
    own = Batched(max_num_seqs=2)
    handles = [own.add(name, adapter) for name, adapter in [("1", "x"), ("2", "y"), ("3", "x")]]
    own.admit()
    own.new_events()
    own.batch.preempt(handles[1])
    assert (own.running, own.new_events()) == (["1"], [("free", "2")])
    assert own.batch.adapter_cache.idle == [Adapter("y")]
    assert own.admit() == ["1", "2"]
    assert own.new_events() == [("start", "2", "y")]


def test_waiting_and_running_requests_are_aborted() -> None:
    own = Batched(max_num_seqs=1)
    handles = [own.add("1", "x"), own.add("2", "x")]
    own.admit()
    own.new_events()
    own.batch.abort(handles, ValueError("the engine is gone"))
    assert own.new_events() == [
        ("free", "1"),
        ("fail", "1", "the engine is gone"),
        ("end", "1"),
        ("fail", "2", "the engine is gone"),
        ("end", "2"),
    ]
    assert own.running == []
    assert own.batch.adapter_cache.idle == [Adapter("x")]


def test_cancelled_requests_end_without_an_error() -> None:
    own = Batched(max_num_seqs=2)
    handles = [own.add(name, "x") for name in "1234"]
    own.admit()
    own.new_events()
    handles[1].is_cancelled = handles[2].is_cancelled = True
    own.batch.abort_cancelled()
    assert sorted(own.new_events()) == [("end", "2"), ("end", "3"), ("free", "2")]
    assert own.running == ["1"]
    assert own.admit() == ["1", "4"]
    own.new_events()
    own.batch.abort_cancelled()
    assert own.new_events() == []


def test_idle_adapters_are_kept_up_to_the_configured_size() -> None:
    own = Batched(adapter_cache_bytes=BYTES)
    handles = [own.add("1", "x"), own.add("2", "y")]
    own.admit()
    own.batch.evict_idle_adapters()
    assert own.batch.adapter_cache.nbytes == 2 * BYTES
    for handle in handles:
        own.batch.process(handle, handle.request.taken.append, 7)
    own.batch.evict_idle_adapters()
    assert own.batch.adapter_cache.idle == [Adapter("y")]
