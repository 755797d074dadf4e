"""A folder of adapters, on this machine or in an object store: which are there, and which have changed."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from pathlib import Path
from threading import RLock
from typing import Any

from softtune.errors import AdapterError, ConfigError
from softtune.methods.base import CONFIG_NAME
from softtune.serving.registry import Registry, Version

logger = logging.getLogger(__name__)

Stamps = dict[str, Any]
"""What tells whether a file has changed, by its path within the folder."""


class AdapterFolder:
    """Adapters to serve, each in a folder of its name; an ensemble's members in folders within its own.

    Args:
        path: the folder, or an address of an object store as fsspec knows them (``s3://bucket/adapters``), whose files
            are copied as they change; None where there is none.

    Raises:
        ConfigError: there is no such folder, or the store cannot be reached.
    """

    def __init__(self, path: str | None) -> None:
        self._store = None if path is None or "://" not in path else _Store(path)
        self._path = self._store.copy if self._store is not None else None if path is None else Path(path)
        if self._path is not None and not self._path.is_dir():
            raise ConfigError(f"there is no folder {path}: check the path")
        self._loaded: dict[str, Stamps] = {}
        """What the files of each adapter were when it was tried."""
        self._lock = RLock()

    @property
    def names(self) -> list[str]:
        """What is there, as ``name``, or ``name/1`` and so on of an ensemble."""
        return sorted(self._listing)

    @property
    def _listing(self) -> dict[str, Path]:
        if self._path is None:
            return {}
        files = [*self._path.glob(f"*/{CONFIG_NAME}"), *self._path.glob(f"*/*/{CONFIG_NAME}")]
        return {file.parent.relative_to(self._path).as_posix(): file.parent for file in files}

    def load(self, name: str, registry: Registry) -> Version:
        """Serve an adapter, in place of what had its name.

        Raises:
            AdapterError: there is none of that name.
            SofttuneError: it cannot be served.
        """
        with self._lock:
            self._fetch()
            listing = self._listing
            if name not in listing:
                some = ", ".join(sorted(listing)[:5]) or "none"
                raise AdapterError(f"the folder has no adapter {name!r}: among those that are there are {some}")
            self._loaded[name] = _stamps(listing[name])
            return registry.add(name, listing[name])

    def follow(self, registry: Registry) -> None:
        """Serve what is new or has changed, and no longer what is gone. What cannot be served is skipped, with a line
        in the log; what had its name stays."""
        with self._lock:
            self._fetch()
            listing = self._listing
            for name in self._loaded.keys() - listing.keys():
                del self._loaded[name]
                if name in {version.name for version in registry.versions}:
                    logger.warning("%s is gone, and served no longer", name)
                    registry.remove(name)
            for name in sorted(listing):
                try:
                    if self._loaded.get(name) != (stamps := _stamps(listing[name])):
                        self._loaded[name] = stamps
                        registry.add(name, listing[name])
                except Exception as error:  # whatever is wrong with it, the others are served
                    logger.warning("skipped %s: %s", name, error)

    def _fetch(self) -> None:
        if self._store is not None:
            self._store.fetch()
        elif self._path is not None and not self._path.is_dir():
            raise FileNotFoundError(f"there is no folder {self._path} any more")


class _Store:
    """A copy of an object store's folder.

    Args:
        address: as fsspec knows it.
    """

    def __init__(self, address: str) -> None:
        import fsspec

        self._address = address
        try:
            self._files, self._root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{address} cannot be read ({error}): check the address") from error
        if not self._files.exists(self._root):
            raise ConfigError(f"there is nothing at {address}, or it cannot be reached: check the address")
        self.copy = Path(tempfile.mkdtemp(prefix="softtune-adapters-")).resolve()
        weakref.finalize(self, shutil.rmtree, self.copy, ignore_errors=True)
        self._known: Stamps = {}

    def fetch(self) -> None:
        """Copy what is new or has changed, and remove what is gone. Raises OSError where the store has no such folder
        any more, as some say that cannot be reached."""
        files = self._files.find(self._root, detail=True, refresh=True)
        if not files and not self._files.exists(self._root):
            raise OSError(f"{self._address} cannot be read")
        names = {path: path.removeprefix(self._root).lstrip("/") for path in files}
        found = {
            names[path]: {k: v for k, v in facts.items() if k != "name"}
            for path, facts in files.items()
            if self.copy in (self.copy / names[path]).resolve().parents  # a key may have dots
        }
        for name in self._known.keys() - found.keys():
            (self.copy / name).unlink(missing_ok=True)
        for name, facts in found.items():
            if self._known.get(name) != facts:
                own = self.copy / name
                own.parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(f"{self._root}/{name}", str(own) + ".new")
                shutil.move(str(own) + ".new", own)
        self._known = found


def _stamps(folder: Path) -> Stamps:
    return {
        file.name: (facts.st_mtime_ns, facts.st_size)
        for file in sorted(folder.iterdir())
        if file.is_file() and (facts := file.stat())
    }
