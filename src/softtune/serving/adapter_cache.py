"""An LRU cache of adapters: those that requests use stay in memory, idle ones up to a bound in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from softtune.serving.registry import Version


class Loaded(Protocol):
    """An adapter in memory."""

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        ...

    def release(self) -> None:
        """Free its memory."""
        ...


Kept = TypeVar("Kept", bound=Loaded)


@dataclass
class AdapterCache(Generic[Kept]):
    """An LRU cache of loaded adapters. Those in use are never evicted."""

    load: Callable[[Version], Kept]
    """Loads an adapter into memory."""
    _cached: OrderedDict[Version, Kept] = field(default_factory=OrderedDict)
    _uses: dict[Version, int] = field(default_factory=dict)
    bytes: int = 0
    """Size of all cached adapters."""

    def use(self, version: Version) -> Kept:
        """Return an adapter, loaded unless it is cached. It stays in memory until ``done``."""
        cached = self._cached.get(version)
        if cached is None:
            cached = self._cached[version] = self.load(version)
            self.bytes += cached.bytes
        self._cached.move_to_end(version)
        self._uses[version] = self._uses.get(version, 0) + 1
        return cached

    def __getitem__(self, version: Version) -> Kept:
        """An adapter that is in use."""
        return self._cached[version]

    def done(self, version: Version) -> None:
        """End one use of an adapter."""
        self._uses[version] -= 1
        if not self._uses[version]:
            del self._uses[version]

    @property
    def idle(self) -> list[Kept]:
        """Adapters that no request uses, least recently requested first."""
        return [cached for version, cached in self._cached.items() if version not in self._uses]

    def shrink(self, bound: int) -> None:
        """Evict idle adapters: retired versions, then the least recently requested ones down to ``bound`` bytes."""
        for version in [v for v in self._cached if v.is_retired and v not in self._uses]:
            self._release(version)
        while self.bytes > bound and self.drop_one():
            pass

    def drop_one(self) -> bool:
        """Evict the least recently requested idle adapter; False where all are in use."""
        idle = next((version for version in self._cached if version not in self._uses), None)
        if idle is not None:
            self._release(idle)
        return idle is not None

    def _release(self, version: Version) -> None:
        cached = self._cached.pop(version)
        self.bytes -= cached.bytes
        cached.release()
