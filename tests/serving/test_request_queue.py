"""Requests wait by turns of their adapters, whatever other threads do to the queue."""

from __future__ import annotations

import random
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from softtune.errors import ClosedError, FullError
from softtune.serving.engine_config import EngineConfig
from softtune.serving.request_queue import RequestHandle, RequestQueue


def handle_of(version: Any, request: Any = None) -> RequestHandle[Any]:
    return RequestHandle(version, request, lambda error: None)


def queue_of(max_num_waiting: int = 100, running: list[Any] | None = None, max_num_seqs: int = 0) -> RequestQueue[Any]:
    config = EngineConfig(max_num_seqs=max_num_seqs, max_num_waiting=max_num_waiting)
    return RequestQueue(config, [] if running is None else running)


def popped(queue: RequestQueue[Any]) -> list[Any]:
    """All requests in their order, each as ``first`` has announced it."""
    found = []
    while (first := queue.first) is not None:
        assert queue.pop() is first
        found.append(first.request)
    return found


def test_adapters_take_turns_and_each_keeps_its_order() -> None:
    queue = queue_of()
    for version, request in [("x", "x1"), ("x", "x2"), ("x", "x3"), ("y", "y1"), (None, "1"), ("y", "y2")]:
        queue.add(handle_of(version, request))
    assert len(queue) == 6
    assert [handle.request for handle in queue] == ["x1", "x2", "x3", "y1", "y2", "1"]
    assert popped(queue) == ["x1", "y1", "1", "x2", "y2", "x3"]
    assert len(queue) == 0


def test_an_adapter_whose_turn_has_been_waits_for_the_others() -> None:
    queue = queue_of()
    for request in ("x1", "x2"):
        queue.add(handle_of("x", request))
    queue.add(handle_of("y", "y1"))
    assert queue.pop().request == "x1"
    queue.add(handle_of("z", "z1"))
    assert popped(queue) == ["y1", "x2", "z1"]


@pytest.mark.parametrize("seed", range(5))
def test_turns_are_those_of_a_list(seed: int) -> None:
    """Beside a plain list: adapters in the order of their turns, each with its requests."""
    draw, queue = random.Random(seed), queue_of()
    turns: list[tuple[str, list[int]]] = []
    for number in range(300):
        if draw.random() < 0.55:
            version = draw.choice("vwxyz")
            queue.add(handle_of(version, number))
            own = next((requests for other, requests in turns if other == version), None)
            if own is None:
                turns.append((version, [number]))
            else:
                own.append(number)
        elif turns:
            version, requests = turns.pop(0)
            assert queue.pop().request == requests.pop(0)
            if requests:
                turns.append((version, requests))
        assert [handle.request for handle in queue] == [request for _, requests in turns for request in requests]
        assert len(queue) == sum(len(requests) for _, requests in turns)
        first = queue.first
        assert (first and first.request) == (turns[0][1][0] if turns else None)


def test_a_preempted_request_comes_before_all_others() -> None:
    queue = queue_of()
    for version, request in [("x", "x1"), ("y", "y1"), ("y", "y2")]:
        queue.add(handle_of(version, request))
    queue.add_first(handle_of("y", "preempted"))
    queue.add_first(handle_of("z", "preempted too"))
    assert popped(queue) == ["preempted too", "preempted", "x1", "y1", "y2"]


def test_places_in_the_batch_count_as_places_in_the_queue() -> None:
    running: list[Any] = []
    queue = queue_of(max_num_waiting=2, running=running, max_num_seqs=3)
    for _ in range(5):
        queue.add(handle_of("x"))
    with pytest.raises(FullError, match="2 requests are waiting: try again later"):
        queue.add(handle_of("x"))
    queue.pop()
    running.append("x")
    with pytest.raises(FullError):
        queue.add(handle_of("x"))  # 4 wait: 2 for the places that are left, and 2 more
    running.clear()
    queue.add(handle_of("x"))
    assert len(queue) == 5


def test_more_running_requests_than_places_take_none_from_the_queue() -> None:
    queue = queue_of(max_num_waiting=2, running=[1, 2, 3], max_num_seqs=1)
    for _ in range(2):
        queue.add(handle_of("x"))
    with pytest.raises(FullError):
        queue.add(handle_of("x"))


def test_the_last_request_of_the_largest_crowd_gives_up_its_place() -> None:
    queue, events = queue_of(max_num_waiting=5), []
    for version, request in [("x", "x1"), ("y", "y1"), ("y", "y2"), ("y", "y3"), ("x", "x2")]:
        queue.add(
            RequestHandle(
                version,
                request,
                lambda error, request=request: events.append((request, str(error))),
                lambda request=request: events.append((request, "end")),
            )
        )
    queue.add(handle_of("z", "z1"))
    assert events == [("y3", "5 requests are waiting: try again later"), ("y3", "end")]
    with pytest.raises(FullError):  # z would have 2, and no other has more
        queue.add(handle_of("z", "z2"))
    assert popped(queue) == ["x1", "y1", "z1", "x2", "y2"]


def test_a_closed_queue_takes_no_requests_and_gives_those_that_it_has() -> None:
    queue = queue_of()
    queue.add(handle_of("x", "x1"))
    queue.is_closed = True
    with pytest.raises(ClosedError, match="the server is shutting down: try again later"):
        queue.add(handle_of("x", "x2"))
    queue.add_first(handle_of("x", "preempted"))
    assert popped(queue) == ["preempted", "x1"]


def test_cancelled_requests_leave_their_places() -> None:
    queue = queue_of()
    handles = {request: handle_of(request[0], request) for request in ("x1", "y1", "x2", "z1")}
    for handle in handles.values():
        queue.add(handle)
    for request in ("y1", "x1"):
        handles[request].is_cancelled = True
    assert sorted(handle.request for handle in queue.remove_cancelled()) == ["x1", "y1"]
    assert queue.remove_cancelled() == []
    assert popped(queue) == ["x2", "z1"]


def test_the_number_of_virtual_tokens_is_the_adapters() -> None:
    version = SimpleNamespace(info=SimpleNamespace(num_virtual_tokens=7))
    assert handle_of(version).num_virtual_tokens == 7
    assert handle_of(None).num_virtual_tokens == 0


def test_a_request_that_is_displaced_while_cancelled_ones_leave() -> None:
    """A full queue drops the last request of the adapter with most, which may be cancelled just then."""
    queue: RequestQueue[Any] = RequestQueue(EngineConfig(max_num_seqs=1, max_num_waiting=1), [])
    late = Thread(target=lambda: queue.add(handle_of("other")))

    class Displaced(RequestHandle[Any]):
        @property
        def is_cancelled(self) -> bool:  # type: ignore[override]
            if not late.ident:
                late.start()
                late.join(timeout=0.5)
            return True

        @is_cancelled.setter
        def is_cancelled(self, value: bool) -> None:
            pass

    queue.add(handle_of("crowd"))
    displaced = Displaced("crowd", None, lambda error: None)  # type: ignore[arg-type]
    queue.add(displaced)
    assert queue.remove_cancelled() in ([displaced], [])
    late.join()
    assert displaced not in list(queue)
