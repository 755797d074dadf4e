"""Adapters by name and version, each checked and exported once.

A request keeps the version that it started with; a version that is replaced or removed is deleted after its last
request. Names that are joined by "+" stand for a version that is composed when it is first asked for. Knows nothing
about what requests compute, and nothing about what adapters do.
"""

from __future__ import annotations

import itertools
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock, RLock
from typing import Any

from softtune.adapter_context import BEHIND
from softtune.errors import AdapterError, ConfigError
from softtune.methods import PeftConfig
from softtune.tasks import Task

MAX_COMPOSED = 64
"""Maximum number of composed versions that are kept; the least recently requested one is dropped."""


@dataclass(frozen=True)
class AdapterInfo:
    """What the server knows about an adapter."""

    config: PeftConfig
    task: Task | None
    """The task it was trained for; None where no recipe is saved with it."""
    engine: Any
    """The engine that runs its requests."""
    has_places_within: bool = False
    """Whether its template has virtual tokens within the text."""
    separator: str = ""
    """The space at its template's end, which is tokenized with the answer."""

    @property
    def num_virtual_tokens(self) -> int:
        return getattr(self.config, "num_virtual_tokens", 0)


@dataclass(eq=False)
class Version:
    """One version of an adapter."""

    name: str
    number: int
    info: AdapterInfo
    folder: Path
    """The folder of its inference form."""
    parts: tuple[Version, ...] = ()
    """The versions that it was composed of, in this order."""
    leases: int = 0
    """Number of requests that use it."""
    is_retired: bool = False
    """Whether it was replaced or removed, so that no new request uses it."""


class Registry:
    """The adapters that are served.

    Args:
        export: checks the adapter in one folder and writes its inference form into another.
        folder: where inference forms are kept.
        forget: called with a retired version that no request uses any more.
        taken: the base model's name, which no adapter can have.
        compose: writes the inference form of several versions together into a folder; None if each is asked alone.
    """

    def __init__(
        self,
        export: Callable[[Path, Path], AdapterInfo],
        folder: Path,
        forget: Callable[[Version], None],
        taken: str,
        compose: Callable[[Sequence[Version], Path], AdapterInfo] | None = None,
    ) -> None:
        self._export = export
        self._folder = folder
        self._forget = forget
        self._taken = taken
        self._compose = compose
        self._versions: dict[str, Version] = {}
        self._composed: OrderedDict[str, Version] = OrderedDict()
        """Composed versions by name, least recently requested first."""
        self._numbers = itertools.count(1)
        self._lock, self._composing = RLock(), Lock()

    @property
    def versions(self) -> list[Version]:
        """The current version of each adapter, sorted by name."""
        with self._lock:
            return [self._versions[name] for name in sorted(self._versions)]

    @property
    def composed(self) -> list[Version]:
        """The composed versions that are kept, sorted by name."""
        with self._lock:
            return [self._composed[name] for name in sorted(self._composed)]

    def add(self, name: str, folder: Path) -> Version:
        """Serve the adapter in a folder under a name, in place of the current version of that name.

        Raises:
            ConfigError: the name is the base model's.
            SofttuneError: the adapter cannot be served; the current version stays.
        """
        if name == self._taken:
            raise ConfigError(f"{name} is the base model's name", "give the adapter's folder another one")
        version = self._made(name, partial(self._export, folder))
        with self._lock:
            before = [self._versions.get(name), self._composed.pop(name, None)]
            self._versions[name] = version
        for other in before:
            self._retire(other)
        return version

    def compose(self, name: str) -> None:
        """Compose the version of adapters whose names are joined by "+", unless there is one of the name.

        It lasts until one of its adapters is replaced or removed.

        Raises:
            AdapterError: one of the names is no adapter's.
            SofttuneError: they cannot be composed.
        """
        with self._composing, ExitStack() as leases:
            with self._lock:
                if self._current(name) is not None:
                    return
                parts = self._parts(name)
                for part in parts:
                    leases.callback(self.lease_again(part))
            assert self._compose is not None
            version = self._made(name, partial(self._compose, parts), parts)
            with self._lock:
                is_outdated = any(part.is_retired for part in parts)
                dropped = version if is_outdated else self._keep(version)
            self._retire(dropped)

    def _keep(self, version: Version) -> Version | None:
        """Keep a composed version; returns the one that has to make room for it."""
        self._composed[version.name] = version
        return self._composed.popitem(last=False)[1] if len(self._composed) > MAX_COMPOSED else None

    def _made(self, name: str, write: Callable[[Path], AdapterInfo], parts: tuple[Version, ...] = ()) -> Version:
        """A new version, whose inference form ``write`` writes into its folder."""
        number = next(self._numbers)
        folder = self._folder / str(number)
        folder.mkdir()
        try:
            info = write(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return Version(name, number, info, folder, parts)

    def _current(self, name: str) -> Version | None:
        """The current version of a name, also of a composed one that is kept; None where there is none."""
        if name in self._composed:
            self._composed.move_to_end(name)
        return self._versions.get(name) or self._composed.get(name)

    def _parts(self, name: str) -> tuple[Version, ...]:
        """The current versions of joined names.

        Raises:
            AdapterError: there is no adapter of one of them.
        """
        names = name.split(BEHIND)
        if self._compose is None or len(names) == 1:
            raise self._unknown(name)
        if unknown := [part for part in names if part not in self._versions]:
            raise self._unknown(unknown[0])
        return tuple(self._versions[part] for part in names)

    def remove(self, name: str) -> None:
        """Stop serving an adapter.

        Raises:
            AdapterError: there is no adapter of that name.
        """
        with self._lock:
            version = self._versions.pop(name, None)
        if version is None:
            raise self._unknown(name)
        self._retire(version)

    def lease(self, name: str) -> Version:
        """Lease the current version of an adapter, which a request uses from its first token to its last.

        Raises:
            AdapterError, SofttuneError: see ``compose``, which this calls unless there is a version of the name.
        """
        while True:
            with self._lock:
                if (version := self._current(name)) is not None:
                    version.leases += 1
                    return version
            self.compose(name)

    def lease_again(self, version: Version) -> Callable[[], None]:
        """Lease a version once more; returns the function that ends this lease."""
        with self._lock:
            version.leases += 1
        return partial(self.release, version)

    def release(self, version: Version) -> None:
        """End a lease of a version."""
        with self._lock:
            version.leases -= 1
        self._forget_unused(version)

    def _retire(self, version: Version | None) -> None:
        if version is not None:
            version.is_retired = True
            with self._lock:
                outdated = [name for name, other in self._composed.items() if version in other.parts]
                composed = [self._composed.pop(name) for name in outdated]
            for other in composed:
                self._retire(other)
            self._forget_unused(version)

    def _forget_unused(self, version: Version) -> None:
        if version.is_retired and not version.leases:
            shutil.rmtree(version.folder, ignore_errors=True)
            self._forget(version)

    def _unknown(self, name: str) -> AdapterError:
        some = ", ".join(sorted(self._versions)[:5]) or "none"
        return AdapterError(f"no adapter is named {name!r}", f"among those that are served are {some}")
