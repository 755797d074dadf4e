"""A folder of adapters: which are there, by name."""

from __future__ import annotations

import logging
from pathlib import Path

from softtune.errors import AdapterError, SofttuneError
from softtune.methods.base import CONFIG_NAME
from softtune.serving.registry import Registry, Version

logger = logging.getLogger(__name__)


class AdapterFolder:
    """Adapters to serve, each in a folder of its name; an ensemble's members in folders within its own.

    Args:
        path: the folder; None where there is none.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    @property
    def names(self) -> list[str]:
        """What is there, as ``name``, or ``name/1`` and so on of an ensemble."""
        return sorted(self._listing)

    @property
    def _listing(self) -> dict[str, Path]:
        if self.path is None:
            return {}
        files = [*self.path.glob(f"*/{CONFIG_NAME}"), *self.path.glob(f"*/*/{CONFIG_NAME}")]
        return {file.parent.relative_to(self.path).as_posix(): file.parent for file in files}

    def load(self, name: str, registry: Registry) -> Version:
        """Serve an adapter, in place of what had its name.

        Raises:
            AdapterError: there is none of that name.
            SofttuneError: it cannot be served.
        """
        listing = self._listing
        if name not in listing:
            some = ", ".join(sorted(listing)[:5]) or "none"
            raise AdapterError(f"the folder has no adapter {name!r}: among those that are there are {some}")
        return registry.add(name, listing[name])

    def load_all(self, registry: Registry) -> None:
        """Serve all of them; those that cannot be served are skipped, with a line in the log."""
        for name in self.names:
            try:
                self.load(name, registry)
            except (SofttuneError, OSError) as error:
                logger.warning("skipped %s: %s", name, error)
