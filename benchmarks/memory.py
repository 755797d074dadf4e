"""How much memory of a process is resident."""

from __future__ import annotations

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


def apart(file: str, *words: str) -> float:
    """The number that a benchmark prints when it is called with these words, in a process of its own."""
    found = subprocess.run([sys.executable, file, *words], capture_output=True, text=True, check=True)
    return float(found.stdout.split()[-1])
