"""Adapters stay in memory while requests use them, and after that as long as there is room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from softtune.serving.adapter_cache import AdapterCache
from softtune.serving.registry import Version


class Adapter:
    """An adapter of as many bytes as its version's number."""

    def __init__(self, version: Version) -> None:
        self.name = version.name
        self.nbytes = version.number
        self.is_released = False

    def release(self) -> None:
        assert not self.is_released
        self.is_released = True


def version_of(name: str, nbytes: int) -> Version:
    info: Any = None
    return Version(name, nbytes, info, Path(name))


@pytest.fixture
def versions() -> list[Version]:
    return [version_of(name, 10) for name in "abcd"]


def names(adapters: list[Adapter]) -> list[str]:
    return [adapter.name for adapter in adapters]


def test_an_adapter_in_use_stays_whatever_the_bound(versions: list[Version]) -> None:
    cache = AdapterCache(Adapter)
    a, b, c, _ = versions
    used = [cache.use(version) for version in (a, b, a, c)]
    assert used[0] is used[2] is cache[a]
    assert cache.nbytes == 30
    cache.done(a)  # one of two uses
    cache.done(b)
    assert names(cache.idle) == ["b"]
    cache.shrink(0)
    assert [adapter.is_released for adapter in used] == [False, True, False, False]
    assert cache.nbytes == 20
    cache.done(a)
    cache.done(c)
    assert names(cache.idle) == ["a", "c"]
    cache.shrink(0)
    assert (cache.nbytes, cache.idle) == (0, [])


def test_idle_adapters_go_in_the_order_of_their_last_request(versions: list[Version]) -> None:
    cache = AdapterCache(Adapter)
    a, b, c, d = versions
    for version in (a, b, c, a, d):
        cache.use(version)
        cache.done(version)
    assert names(cache.idle) == ["b", "c", "a", "d"]
    cache.shrink(39)
    assert names(cache.idle) == ["c", "a", "d"]
    assert cache.drop_one()
    assert names(cache.idle) == ["a", "d"]
    cache.shrink(20)
    assert names(cache.idle) == ["a", "d"]


def test_nothing_is_dropped_where_all_are_in_use(versions: list[Version]) -> None:
    cache = AdapterCache(Adapter)
    assert not cache.drop_one()
    cache.use(versions[0])
    assert not cache.drop_one()
    assert cache.nbytes == 10


def test_retired_versions_go_first_and_below_the_bound_too(versions: list[Version]) -> None:
    cache = AdapterCache(Adapter)
    for version in versions:
        cache.use(version)
    for version in versions[:3]:
        cache.done(version)
    versions[1].is_retired = versions[3].is_retired = True
    cache.shrink(10**6)
    assert names(cache.idle) == ["a", "c"]
    assert cache.nbytes == 30  # the last one is retired, but in use
    cache.done(versions[3])
    cache.shrink(10**6)
    assert names(cache.idle) == ["a", "c"]
    assert cache.nbytes == 20


def test_an_adapter_is_loaded_anew_after_its_eviction(versions: list[Version]) -> None:
    cache = AdapterCache(Adapter)
    first = cache.use(versions[0])
    cache.done(versions[0])
    assert cache.use(versions[0]) is first
    cache.done(versions[0])
    cache.shrink(0)
    assert cache.use(versions[0]) is not first


def test_an_adapter_that_cannot_be_loaded_is_not_in_use(versions: list[Version]) -> None:
    def fail(version: Version) -> Adapter:
        raise OSError("the file is gone")

    cache = AdapterCache(fail)
    with pytest.raises(OSError, match="the file is gone"):
        cache.use(versions[0])
    assert (cache.idle, cache.nbytes) == ([], 0)
    with pytest.raises(KeyError):
        cache.done(versions[0])
    with pytest.raises(KeyError):
        _ = cache[versions[0]]
