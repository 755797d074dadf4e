"""Measures peak memory."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import psutil
import torch

INTERVAL = 0.02
"""Seconds between two samples, where the system has no peak counter that can be reset."""


def measured() -> Callable[[], int]:
    """Begin to measure peak memory.

    Returns:
        A function that ends the measurement and returns the peak number of bytes in use: on the GPU where there is one,
        else resident in the process.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return sampled()
    return _highest


def sampled() -> Callable[[], int]:
    """Like ``measured``, by sampling the resident memory of the process in a separate thread."""
    process, ended, seen = psutil.Process(), Event(), list[int]()

    def look() -> None:
        while True:
            seen[:] = [max(*seen, process.memory_info().rss, 0)]
            if ended.wait(INTERVAL):
                return

    thread = Thread(target=look, daemon=True)
    thread.start()

    def end() -> int:
        ended.set()
        thread.join()
        return seen[0]

    return end


def _give_back() -> None:
    """Return free memory to the system: garbage, and what glibc retains."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another libc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _highest() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
