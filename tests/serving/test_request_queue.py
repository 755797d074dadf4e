"""Requests wait by turns of their adapters, whatever other threads do to the queue."""

from __future__ import annotations

from threading import Thread
from typing import Any

from softtune.serving.engine_config import EngineConfig
from softtune.serving.request_queue import RequestHandle, RequestQueue


def handle_of(version: Any) -> RequestHandle[Any]:
    return RequestHandle(version, None, lambda error: None)


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
