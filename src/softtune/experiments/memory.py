"""How much memory something takes."""

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
"""Seconds between two looks, where the system keeps no mark that can be reset."""


def measured() -> Callable[[], int]:
    """Begin to measure.

    Returns:
        Ends it, and gives the most bytes in use meanwhile: on the GPU where there is one, else those of the process
        that are resident.
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
    """The same by looks at the process, in a thread of its own."""
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
    """Give the system what is free: garbage, and what glibc keeps."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another libc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _highest() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
