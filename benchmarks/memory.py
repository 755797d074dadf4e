"""How much memory of a process is resident."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def resident(run: Callable[[], Any]) -> tuple[float, float]:
    """Bytes resident before something runs, and the most while it does."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _status("VmRSS")
    run()
    return before, _status("VmHWM")


def apart(file: str, *words: str) -> float:
    """The number that a benchmark prints when it is called with these words, in a process of its own."""
    found = subprocess.run([sys.executable, file, *words], capture_output=True, text=True, check=True)
    return float(found.stdout.split()[-1])


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(name))
