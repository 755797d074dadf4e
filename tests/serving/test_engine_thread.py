"""One thread steps all engines while any has requests, and ends every request, whatever goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Queue
from threading import Event
from typing import Any

import pytest

from softtune.errors import ClosedError
from softtune.serving.engine_config import EngineConfig
from softtune.serving.engine_thread import EngineThread
from softtune.serving.request_queue import RequestHandle
from softtune.serving.running_batch import RunningBatch

WAITING = 30
"""Seconds to wait for what happens at once."""


class Engine:
    """An engine whose steps are a function, which by default finishes all requests."""

    def __init__(self, run: Callable[[Engine], None] | None = None) -> None:
        self.backbone: Any = None
        self.batch: RunningBatch[Any, Any] = RunningBatch(EngineConfig(), lambda version: None)
        self.steps = 0
        self._run = run or finish_all

    def export_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Export nothing."""

    def submit(self, handle: RequestHandle[Any]) -> None:
        self.batch.queue.add(handle)

    def step(self) -> None:
        self.steps += 1
        self.batch.abort_cancelled()
        self.batch.admit(lambda handle: True)
        self._run(self)


class Request:
    is_done = False

    def finish(self, output: None) -> None:
        self.is_done = True


def finish_all(engine: Engine) -> None:
    for handle in [*engine.batch.running]:
        engine.batch.process(handle, handle.request.finish, None)


def stay(engine: Engine) -> None:
    """Finish nothing."""


class Ended:
    """A request, and how it ended."""

    def __init__(self, engine: Engine) -> None:
        self._ended: Queue[str] = Queue()
        self.errors: list[Exception] = []
        self.handle = RequestHandle(None, Request(), self.errors.append, lambda: self._ended.put("end"))
        engine.submit(self.handle)

    def wait(self) -> list[Exception]:
        """The errors that it ended with."""
        self._ended.get(timeout=WAITING)
        assert self._ended.empty()
        return self.errors


@contextmanager
def running(*engines: Engine) -> Iterator[EngineThread]:
    thread = EngineThread([*engines])
    thread.start()
    try:
        yield thread
    finally:
        thread.close(0)
    assert not thread.is_alive


def test_a_request_that_comes_later_is_run_by_its_engine() -> None:
    one, other = Engine(), Engine()
    with running(one) as thread:
        thread.engines.append(other)
        for engine in (one, other, one):
            request = Ended(engine)
            thread.wake()
            assert request.wait() == []
        assert thread.is_alive
    assert thread.is_idle


def test_a_thread_without_requests_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    thread, waits = EngineThread([engine]), Queue[str]()
    wait = thread._work.wait
    monkeypatch.setattr(thread._work, "wait", lambda: waits.put("wait") or wait())
    thread.start()
    waits.get(timeout=WAITING)
    assert engine.steps == 0
    request = Ended(engine)
    thread.wake()
    assert request.wait() == []
    waits.get(timeout=WAITING)
    assert engine.steps == 1
    thread.close(WAITING)


def test_an_error_in_a_step_ends_the_running_requests_of_one_engine(caplog: pytest.LogCaptureFixture) -> None:
    broken_steps = iter([ValueError("out of memory")])

    def fail(engine: Engine) -> None:
        for error in broken_steps:
            raise error
        finish_all(engine)

    broken, good = Engine(fail), Engine()
    requests = [Ended(broken), Ended(broken), Ended(good)]
    with running(broken, good) as thread:
        assert [[str(error) for error in request.wait()] for request in requests] == [["out of memory"]] * 2 + [[]]
        later = Ended(broken)
        thread.wake()
        assert later.wait() == []
    assert [record.getMessage() for record in caplog.records] == ["a step failed"]


def test_the_end_waits_for_what_has_begun_and_takes_nothing_more() -> None:
    may_end, has_begun = Event(), Event()

    def wait(engine: Engine) -> None:
        has_begun.set()
        assert may_end.wait(WAITING)
        finish_all(engine)

    engine = Engine(wait)
    request = Ended(engine)
    with running(engine) as thread:
        assert has_begun.wait(WAITING)
        thread.end(WAITING)
        with pytest.raises(ClosedError, match="the server is shutting down: try again later"):
            Ended(engine)
        assert thread.is_alive
        may_end.set()
        assert request.wait() == []


def test_what_has_not_ended_in_time_fails() -> None:
    engine = Engine(stay)
    engine.batch = RunningBatch(EngineConfig(max_num_seqs=1), lambda version: None)
    begun, waiting = Ended(engine), Ended(engine)
    with running(engine) as thread:
        thread.close(0)
    for request in (begun, waiting):
        [error] = request.wait()
        assert isinstance(error, ClosedError)
        assert str(error) == "the server is shutting down: try again later"


def test_the_shortest_grace_counts() -> None:
    engine = Engine(stay)
    request = Ended(engine)
    with running(engine) as thread:
        thread.end(0)
        thread.end(10 * WAITING)
        assert [type(error) for error in request.wait()] == [ClosedError]


def test_a_thread_that_was_never_started_can_be_closed() -> None:
    thread = EngineThread([Engine()])
    thread.close(0)
    assert not thread.is_alive


def test_a_cancelled_request_ends_although_nothing_else_happens() -> None:
    engine = Engine(stay)
    request = Ended(engine)
    with running(engine) as thread:
        request.handle.is_cancelled = True
        thread.wake()
        assert request.wait() == []


def test_an_engine_that_comes_while_the_thread_ends_refuses_requests() -> None:
    thread = EngineThread([Engine()])
    before, after = Engine(), Engine()
    thread.add(before)
    thread.end(WAITING)
    thread.add(after)
    for engine in (before, after):
        with pytest.raises(ClosedError, match="shutting down"):
            Ended(engine)
