"""How much memory something takes."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


def peak(run: Callable[[], Result]) -> tuple[Result, int]:
    """What something returns, and the most bytes in use while it ran: on the GPU where there is one, else those of the
    process that are resident, now or, where the system does not let the mark be reset, before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return run(), torch.cuda.max_memory_allocated()
    is_reset = _reset()
    result = run()
    return result, _highest() if is_reset else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def _highest() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
