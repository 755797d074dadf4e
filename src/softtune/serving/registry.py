"""Adapters by name and version, each checked and exported once.

A request keeps the version that it started with; a version that is replaced or removed is deleted after its last
request. Knows nothing about what requests compute, and nothing about what adapters do.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

from softtune.errors import AdapterError, ConfigError
from softtune.methods import PeftConfig
from softtune.tasks import Task


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
    """

    def __init__(
        self,
        export: Callable[[Path, Path], AdapterInfo],
        folder: Path,
        forget: Callable[[Version], None],
        taken: str,
    ) -> None:
        self._export = export
        self._folder = folder
        self._forget = forget
        self._taken = taken
        self._versions: dict[str, Version] = {}
        self._numbers = itertools.count(1)
        self._lock = RLock()

    @property
    def versions(self) -> list[Version]:
        """The current version of each adapter, sorted by name."""
        with self._lock:
            return [self._versions[name] for name in sorted(self._versions)]

    def add(self, name: str, folder: Path) -> Version:
        """Serve the adapter in a folder under a name, in place of the current version of that name.

        Raises:
            ConfigError: the name is the base model's.
            SofttuneError: the adapter cannot be served; the current version stays.
        """
        if name == self._taken:
            raise ConfigError(f"{name} is the base model's name", "give the adapter's folder another one")
        number = next(self._numbers)
        export_folder = self._folder / str(number)
        export_folder.mkdir()
        try:
            info = self._export(folder, export_folder)
        except BaseException:
            shutil.rmtree(export_folder, ignore_errors=True)
            raise
        version = Version(name, number, info, export_folder)
        with self._lock:
            before, self._versions[name] = self._versions.get(name), version
        self._retire(before)
        return version

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
            AdapterError: there is no adapter of that name.
        """
        with self._lock:
            if name not in self._versions:
                raise self._unknown(name)
            self._versions[name].leases += 1
            return self._versions[name]

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
            self._forget_unused(version)

    def _forget_unused(self, version: Version) -> None:
        if version.is_retired and not version.leases:
            shutil.rmtree(version.folder, ignore_errors=True)
            self._forget(version)

    def _unknown(self, name: str) -> AdapterError:
        some = ", ".join(sorted(self._versions)[:5]) or "none"
        return AdapterError(f"no adapter is named {name!r}", f"among those that are served are {some}")
