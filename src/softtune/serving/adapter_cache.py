"""The adapters in memory: those that requests use, and idle ones up to a bound in bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from softtune.serving.lru import HasSize, LRUCache
from softtune.serving.registry import Version


class Loaded(HasSize, Protocol):
    """An adapter in memory."""

    def release(self) -> None:
        """Free its memory."""
        ...


Kept = TypeVar("Kept", bound=Loaded)


class AdapterCache(Generic[Kept]):
    """An LRU cache of loaded adapters. Those in use are never evicted.

    Args:
        load: loads an adapter into memory.
    """

    def __init__(self, load: Callable[[Version], Kept]) -> None:
        self._cache: LRUCache[Version, Kept] = LRUCache(load, lambda adapter: adapter.release())
        self._uses: dict[Version, int] = {}
        """Number of uses of each adapter that is in use."""

    @property
    def nbytes(self) -> int:
        """Size of all cached adapters in bytes."""
        return self._cache.nbytes

    def use(self, version: Version) -> Kept:
        """Return an adapter, loaded unless it is cached. It stays in memory until ``done``."""
        adapter = self._cache.use(version)
        self._uses[version] = self._uses.get(version, 0) + 1
        return adapter

    def __getitem__(self, version: Version) -> Kept:
        """An adapter that is in use."""
        return self._cache[version]

    def done(self, version: Version) -> None:
        """End one use of an adapter."""
        self._uses[version] -= 1
        if not self._uses[version]:
            del self._uses[version]

    @property
    def idle(self) -> list[Kept]:
        """Adapters that no request uses, least recently requested first."""
        return [self._cache[version] for version in self._cache if version not in self._uses]

    def shrink(self, max_bytes: int) -> None:
        """Evict idle adapters: retired versions, then the least recently requested ones down to ``max_bytes``."""
        for version in [version for version in self._cache if version.is_retired and version not in self._uses]:
            self._cache.evict(version)
        self._cache.shrink(max_bytes, keep=self._uses)

    def drop_one(self) -> bool:
        """Evict the least recently requested idle adapter; False where all are in use."""
        return self._cache.evict_one(keep=self._uses)
