"""Folders of adapters on this machine, in an object store or on the hub: lists adapters, and finds changed ones."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from pathlib import Path
from threading import RLock
from typing import Any

from softtune.errors import AdapterError, ConfigError, SofttuneError
from softtune.methods.base import CONFIG_NAME
from softtune.serving.registry import Registry, Version

logger = logging.getLogger(__name__)

Stamps = dict[str, Any]
"""Metadata that differs once a file has changed, by the file's path within the folder."""


class AdapterFolder:
    """Adapters to serve, each in a folder of its name; an ensemble's members in subfolders.

    Args:
        paths: folders with a subfolder for each adapter, or an adapter's own folder; or fsspec URLs of an object store
            (``s3://bucket/adapters``) or the hub (``hf://user/adapter``), whose files are copied whenever they change.
            Where several contain an adapter of the same name, the first one's is served.

    Raises:
        ConfigError: a folder does not exist, or the store cannot be reached.
    """

    def __init__(self, *paths: str) -> None:
        self._sources = [_Store(path) if "://" in path else _Local(path) for path in paths]
        self._listings: list[dict[str, Path]] = [{} for _ in self._sources]
        """The adapters of each source when it could last be read."""
        self._loaded: dict[str, Stamps] = {}
        """Stamps of each adapter's files when it was last loaded, or could not be served."""
        self._hidden: set[Path] = set()
        """Folders that were logged as not served, since another adapter has the name."""
        self._lock = RLock()

    @property
    def names(self) -> list[str]:
        """Names of all adapters: ``name``, or ``name/1`` and so on for the members of an ensemble."""
        with self._lock:
            return sorted(self._look())

    def load(self, name: str, registry: Registry) -> Version:
        """Load an adapter, and serve it in place of the current version of that name.

        Raises:
            AdapterError: there is no adapter of that name.
            SofttuneError: the adapter cannot be served.
        """
        with self._lock:
            listing = self._look()
            if name not in listing:
                some = ", ".join(sorted(listing)[:5]) or "none"
                raise AdapterError(f"the folder has no adapter {name!r}", f"among those that are there are {some}")
            return self._serve(name, listing[name], registry)

    def follow(self, registry: Registry) -> None:
        """Serve new and changed adapters, and remove those that are gone.

        An adapter that cannot be served is skipped with a warning in the log; the current version of its name stays.
        """
        with self._lock:
            listing = self._look()
            for name in self._loaded.keys() - listing.keys():
                del self._loaded[name]
                if name in {version.name for version in registry.versions}:
                    logger.warning("%s is gone, and served no longer", name)
                    registry.remove(name)
            for name in sorted(listing):
                try:
                    if self._loaded.get(name) != _stamps(listing[name]):
                        self._serve(name, listing[name], registry)
                except Exception as error:  # whatever is wrong with one adapter, the others are served
                    is_served = name in {version.name for version in registry.versions}
                    logger.warning("%s %s: %s", "kept the old" if is_served else "skipped", name, error)

    def _serve(self, name: str, path: Path, registry: Registry) -> Version:
        """Serve an adapter's folder. After an error of the machine, which may be temporary, ``follow`` tries again."""
        stamps = _stamps(path)
        try:
            version = registry.add(name, path)
        except SofttuneError:
            self._loaded[name] = stamps
            raise
        self._loaded[name] = stamps
        return version

    def close(self) -> None:
        """Remove the local copies of remote folders."""
        with self._lock:
            for source in self._sources:
                source.close()

    def _look(self) -> dict[str, Path]:
        """The adapters' folders by name; for a source that cannot be read, those of its last listing."""
        for number, source in enumerate(self._sources):
            try:
                source.fetch()
                self._listings[number] = _adapters_in(source.path, source.name)
            except Exception as error:  # stores and their network libraries raise types of their own
                logger.warning("%s cannot be read: %s", source.name, error)
        folders: dict[str, Path] = {}
        for listing in self._listings:
            for name, path in listing.items():
                if folders.setdefault(name, path) != path and path not in self._hidden:
                    logger.warning("%s is not served: there is another %s in %s", path, name, folders[name].parent)
                    self._hidden.add(path)
        return folders


def _adapters_in(path: Path, name: str) -> dict[str, Path]:
    """The adapters' folders within a folder, by name; a folder that is an adapter itself has the given name."""
    if (path / CONFIG_NAME).is_file():
        return {name: path}
    files = [*path.glob(f"*/{CONFIG_NAME}"), *path.glob(f"*/*/{CONFIG_NAME}")]
    return {file.parent.relative_to(path).as_posix(): file.parent for file in files}


class _Local:
    """A folder on this machine."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.name = self.path.resolve().name
        if not self.path.is_dir():
            raise ConfigError(f"there is no folder {path}", "check the path")

    def fetch(self) -> None:
        """Check that the folder still exists.

        Raises:
            FileNotFoundError: it does not.
        """
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no folder {self.path} any more")

    def close(self) -> None:
        """Do nothing, since nothing was copied."""


class _Store:
    """A local copy of a folder in an object store.

    Args:
        address: the folder's fsspec URL.
    """

    def __init__(self, address: str) -> None:
        import fsspec

        self._address = address
        try:
            self._files, self._root = fsspec.core.url_to_fs(address)
            is_there = self._files.exists(self._root)
        except Exception as error:  # stores and their network libraries raise types of their own
            raise ConfigError(f"{address} cannot be read ({error})", "check the address") from error
        if not is_there:
            raise ConfigError(f"there is nothing at {address}, or it cannot be reached", "check the address")
        self.path = Path(tempfile.mkdtemp(prefix="softtune-adapters-")).resolve()
        self.name = Path(self._root).name
        self.close = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self._known: Stamps = {}

    def fetch(self) -> None:
        """Copy new and changed files, and remove those that are gone.

        Raises:
            OSError: the store no longer has the folder, which some stores also answer when they cannot be reached.
        """
        files = self._files.find(self._root, detail=True, refresh=True)
        if not files and not self._files.exists(self._root):
            raise OSError(f"{self._address} cannot be read")
        names = {path: path.removeprefix(self._root).lstrip("/") for path in files}
        stamps = {
            names[path]: {k: v for k, v in facts.items() if k != "name"}
            for path, facts in files.items()
            if self.path in (self.path / names[path]).resolve().parents  # a key may contain ".."
        }
        for name in self._known.keys() - stamps.keys():
            (self.path / name).unlink(missing_ok=True)
        for name, facts in stamps.items():
            if self._known.get(name) != facts:
                copy = self.path / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(f"{self._root}/{name}", str(copy) + ".new")
                shutil.move(str(copy) + ".new", copy)
        self._known = stamps


def _stamps(folder: Path) -> Stamps:
    return {
        file.name: (facts.st_mtime_ns, facts.st_size)
        for file in sorted(folder.iterdir())
        if file.is_file() and (facts := file.stat())
    }
