"""How much memory of a process is resident."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import psutil

from softtune.experiments.memory import measured


def resident(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes resident before something runs, and the most while it does."""
    end = measured()
    before = psutil.Process().memory_info().rss
    run()
    return before, end()


def apart(file: str, *words: str, rounds: int = 1) -> float:
    """The number that a benchmark prints when it is called with these words, in a process of its own; the median of
    several, since what the allocator keeps for later differs from one to the next."""
    command = [sys.executable, file, *words]
    found = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(rounds)]
    return statistics.median(float(text.split()[-1]) for text in found)
