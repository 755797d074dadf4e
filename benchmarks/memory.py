"""How much memory of a process is resident."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def resident(run: Callable[[], Any]) -> tuple[float, float]:
    """Bytes resident before something runs, and the most while it does."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _status("VmRSS")
    run()
    return before, _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(name))
