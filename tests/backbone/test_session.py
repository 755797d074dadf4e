"""Turns with a base model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Barrier, Thread

import pytest
from torch import nn

from softtune.backbone.session import model_session


@pytest.fixture
def attached() -> list[str]:
    return []


@contextmanager
def note(attached: list[str], name: str) -> Iterator[None]:
    attached.append(name)
    try:
        yield
    finally:
        attached.remove(name)


def test_the_innermost_turn_alone_is_attached(attached: list[str]) -> None:
    model = nn.Identity()
    with model_session(model) as outer:
        outer.attach(partial(note, attached, "a"))
        outer.attach(partial(note, attached, "b"))
        with model_session(model) as inner:
            assert attached == []
            inner.attach(partial(note, attached, "c"))
            assert attached == ["c"]
        assert attached == ["a", "b"]
    assert attached == []


def test_an_error_ends_its_turn_alone(attached: list[str]) -> None:
    model = nn.Identity()
    with model_session(model) as outer:
        outer.attach(partial(note, attached, "a"))
        with pytest.raises(KeyError), model_session(model):
            raise KeyError
        assert attached == ["a"]
    assert attached == []


def test_models_have_turns_of_their_own(attached: list[str]) -> None:
    with model_session(nn.Identity()) as outer, model_session(nn.Identity()):
        outer.attach(partial(note, attached, "a"))
        assert attached == ["a"]


def test_threads_wait(attached: list[str]) -> None:
    model, barrier = nn.Identity(), Barrier(2)

    def wait() -> None:
        barrier.wait()
        with model_session(model) as later:
            later.attach(partial(note, attached, "later"))

    thread = Thread(target=wait)
    thread.start()
    with model_session(model) as first:
        first.attach(partial(note, attached, "first"))
        barrier.wait()
        thread.join(timeout=0.1)
        assert attached == ["first"]
        assert thread.is_alive()
    thread.join()
    assert attached == []
