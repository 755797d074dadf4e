"""Adapters by name and version: checked and baked once, held in memory while they are asked for, else on disk.

A request holds on to the version that it began with; one that is replaced or removed is forgotten with its last
request. Knows nothing about requests, and nothing about what adapters do.
"""

from __future__ import annotations

import itertools
import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any, Generic, Protocol, TypeVar

from softtune.data import Task
from softtune.errors import AdapterError, ConfigError
from softtune.methods import PeftConfig


@dataclass(frozen=True)
class Facts:
    """What there is to know of an adapter."""

    config: PeftConfig
    task: Task | None
    """What it was trained for; None where nobody noted it."""
    lane: Any
    """Where its requests are worked on."""
    has_places_within: bool = False
    """Whether its template has virtual tokens within the text."""
    separator: str = ""
    """The space at its template's end, which is the answer's."""

    @property
    def num_virtual_tokens(self) -> int:
        return getattr(self.config, "num_virtual_tokens", 0)


@dataclass(eq=False)
class Version:
    """One state of an adapter."""

    name: str
    number: int
    facts: Facts
    folder: Path
    """Its inference form."""
    leases: int = 0
    """Requests that hold on to it."""
    is_retired: bool = False
    """Whether new requests see another one, or none."""


class Loaded(Protocol):
    """An adapter in memory."""

    @property
    def bytes(self) -> int:
        """What it takes there."""
        ...

    def release(self) -> None:
        """Forget it."""
        ...


Kept = TypeVar("Kept", bound=Loaded)


class Registry:
    """The adapters that are served.

    Args:
        bake: checks the adapter in a folder and writes its inference form into another.
        folder: where inference forms are kept.
        forget: told of a version that nobody holds on to any more.
        taken: the base model's name, which no adapter can have.
    """

    def __init__(
        self,
        bake: Callable[[Path, Path], Facts],
        folder: Path,
        forget: Callable[[Version], None],
        taken: str,
    ) -> None:
        self._bake = bake
        self._folder = folder
        self._forget = forget
        self._taken = taken
        self._versions: dict[str, Version] = {}
        self._numbers = itertools.count(1)
        self._lock = RLock()

    @property
    def versions(self) -> list[Version]:
        """Those that new requests see, by name."""
        with self._lock:
            return [self._versions[name] for name in sorted(self._versions)]

    def add(self, name: str, folder: Path) -> Version:
        """Serve the adapter in a folder by a name, from now on in place of what had it.

        Raises:
            ConfigError: the name is the base model's.
            SofttuneError: it cannot be served; what had the name is still there.
        """
        if name == self._taken:
            raise ConfigError(f"{name} is the base model's name: give the adapter's folder another one")
        number = next(self._numbers)
        own = self._folder / str(number)
        own.mkdir()
        try:
            facts = self._bake(folder, own)
        except BaseException:
            shutil.rmtree(own, ignore_errors=True)
            raise
        version = Version(name, number, facts, own)
        with self._lock:
            before, self._versions[name] = self._versions.get(name), version
        self._retire(before)
        return version

    def remove(self, name: str) -> None:
        """Serve an adapter no longer. Raises AdapterError where there is none of that name."""
        with self._lock:
            version = self._versions.pop(name, None)
        if version is None:
            raise self._unknown(name)
        self._retire(version)

    def lease(self, name: str) -> Version:
        """The version that a request sees from its first token to its last. Raises AdapterError for an unknown name."""
        with self._lock:
            if name not in self._versions:
                raise self._unknown(name)
            self._versions[name].leases += 1
            return self._versions[name]

    def hold(self, version: Version) -> Callable[[], None]:
        """Lease a version once more; what to call at the end of that."""
        with self._lock:
            version.leases += 1
        return partial(self.release, version)

    def release(self, version: Version) -> None:
        """A request with this version has ended."""
        with self._lock:
            version.leases -= 1
        self._forget_unused(version)

    def _retire(self, version: Version | None) -> None:
        if version is not None:
            version.is_retired = True
            self._forget_unused(version)

    def _forget_unused(self, version: Version) -> None:
        if version.is_retired and not version.leases:
            shutil.rmtree(version.folder, ignore_errors=True)
            self._forget(version)

    def _unknown(self, name: str) -> AdapterError:
        some = ", ".join(sorted(self._versions)[:5]) or "none"
        return AdapterError(f"no adapter is named {name!r}: among those that are served are {some}")


@dataclass
class Hot(Generic[Kept]):
    """The adapters in memory. Those in use stay there, others while there is room."""

    load: Callable[[Version], Kept]
    """Brings an adapter into memory."""
    _held: OrderedDict[Version, Kept] = field(default_factory=OrderedDict)
    _uses: dict[Version, int] = field(default_factory=dict)
    bytes: int = 0
    """Of all of them."""

    def use(self, version: Version) -> Kept:
        """An adapter in memory, which stays there until ``done``."""
        held = self._held.get(version)
        if held is None:
            held = self._held[version] = self.load(version)
            self.bytes += held.bytes
        self._held.move_to_end(version)
        self._uses[version] = self._uses.get(version, 0) + 1
        return held

    def __getitem__(self, version: Version) -> Kept:
        """One that is in use."""
        return self._held[version]

    def done(self, version: Version) -> None:
        """A use has ended."""
        self._uses[version] -= 1
        if not self._uses[version]:
            del self._uses[version]

    @property
    def idle(self) -> list[Kept]:
        """Those that nobody uses, asked for longest ago first."""
        return [held for version, held in self._held.items() if version not in self._uses]

    def shrink(self, bound: int) -> None:
        """Forget what is retired, and what is beyond a bound."""
        for version in [v for v in self._held if v.is_retired and v not in self._uses]:
            self._release(version)
        while self.bytes > bound and self.drop_one():
            pass

    def drop_one(self) -> bool:
        """Forget what was asked for longest ago; False where all are in use."""
        idle = next((version for version in self._held if version not in self._uses), None)
        if idle is not None:
            self._release(idle)
        return idle is not None

    def _release(self, version: Version) -> None:
        held = self._held.pop(version)
        self.bytes -= held.bytes
        held.release()
