"""Measures the resident memory of a process."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import psutil

from softtune.experiments.memory import measured


def resident(run: Callable[[], Any]) -> tuple[int, int]:
    """Resident bytes before a function runs, and their peak while it runs."""
    end = measured()
    before = psutil.Process().memory_info().rss
    run()
    return before, end()


def apart(file: str, *arguments: str, rounds: int = 1) -> float:
    """The number that a benchmark prints when it runs with these arguments in a separate process. It is the median of
    several rounds, since the memory that the allocator retains differs between them."""
    command = [sys.executable, file, *arguments]
    found = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(rounds)]
    return statistics.median(float(text.split()[-1]) for text in found)
