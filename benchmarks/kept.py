"""Results of cases that take hours together: one JSON file each, which several processes on one machine may fill at
once.

A process claims a case by a lock on a file, which the operating system releases when the process ends, however it does.
Knows nothing about what the cases are.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Content = dict[str, Any]


class Kept:
    """A folder of results.

    Args:
        folder: the folder, which need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str) -> Content | None:
        """The result of a case; None where it has not run."""
        file = self._file(name)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def all(self) -> dict[str, Content]:
        """All results by name."""
        return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(self.folder.glob("*.json"))}

    def save(self, name: str, content: Mapping[str, Any]) -> None:
        """Save a result, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{name}.{os.getpid()}.part"
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self._file(name))

    def check(self, name: str, asked: Any) -> None:
        """Check that a case's result, if there is one, has these settings as its ``asked``.

        Raises:
            SystemExit: it has others.
        """
        if (saved := self.get(name)) is not None and saved["asked"] != asked:
            raise SystemExit(f"{self._file(name)} has other settings: delete it to run it again")

    def once(self, name: str, run: Callable[[], Mapping[str, Any]]) -> bool:
        """Run a case and save its result, unless it is there or another process has claimed it.

        Returns:
            Whether it ran.
        """
        with self.claimed(name) as is_mine:
            if not is_mine or self.get(name) is not None:
                return False
            self.save(name, run())
            return True

    @contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Claim a case for the block. Yields whether it is this process's, and not another one's."""
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"


class Loaded(Kept):
    """Results that have been read, of which no more are made.

    Args:
        folder: where they come from.
        results: the results by name.
    """

    def __init__(self, folder: Path, results: Mapping[str, Content]) -> None:
        super().__init__(folder)
        self._results = results

    def get(self, name: str) -> Content | None:
        return self._results.get(name)
