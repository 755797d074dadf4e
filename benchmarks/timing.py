"""Times two functions in turn in one process, and saves the results with hardware and commit."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from softtune.training.progress import TRAINING, Phase

RESULTS = Path(__file__).parent / "results"


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any], *, rounds: int) -> tuple[float, float, float]:
    """Median over rounds of ours ÷ theirs, and the median seconds of each. Both run once before the clock starts."""
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return statistics.median(a / b for a, b in pairs), *(statistics.median(side) for side in zip(*pairs, strict=True))


def seconds(run: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class TrainingClock:
    """Measures the processor seconds of training, as the progress callback of a run. Evaluation does not count, and
    neither does what other processes do."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def __call__(self, phase: Phase, done: int, total: int, notes: str) -> None:
        if phase == TRAINING:
            self._times.append(time.process_time())

    @property
    def seconds(self) -> float:
        """From the beginning of training to its last step."""
        return self._times[-1] - self._times[0]


def measure(name: str, value: float, must: float | None, *, at_least: bool = False) -> dict[str, Any]:
    """One line of the results: name, value, and whether it is at most (or at least) the required value ``must``."""
    holds = None if must is None else value >= must if at_least else value <= must
    limit = None if must is None else f"{'>=' if at_least else '<='} {must}"
    return {"measure": name, "value": round(value, 3), "must": limit, "holds": holds}


def report(name: str, measures: Sequence[dict[str, Any]]) -> None:
    """Show the results and write them to ``results/<name>.json``."""
    show(name, measures)
    save(name, {"measures": list(measures)})


def show(name: str, measures: Sequence[dict[str, Any]]) -> None:
    """Show the results."""
    table = Table("measure", "value", "must be", "holds", title=name, title_justify="left")
    for m in measures:
        must, holds = ("", "") if m["must"] is None else (m["must"], "yes" if m["holds"] else "NO")
        table.add_row(m["measure"], f"{m['value']:.3f}", must, holds)
    Console().print(table)


def chosen(parser: ArgumentParser, names: list[str], every: Sequence[str]) -> list[str]:
    """The names that a command line gives, or all where it gives none; ends with a usage error at an unknown one."""
    if unknown := {*names} - {*every}:
        parser.error(f"no {min(unknown)}: use some of {', '.join(every)}")
    return names or list(every)


def save(name: str, results: dict[str, Any]) -> None:
    """Write results to ``results/<name>.json``, with hardware and commit."""
    write(RESULTS / f"{name}.json", {**stamp(), **results})


def write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def stamp() -> dict[str, Any]:
    """Hardware and commit of results."""
    return {"hardware": _hardware(), "commit": _commit()}


def machine(hardware: dict[str, Any]) -> str:
    """Hardware as text."""
    threads = hardware["threads"]
    packages = [f"{name} {hardware[name]}" for name in ("torch", "transformers") if name in hardware]
    where = ", ".join(hardware[name] for name in ("gpu", "cpu") if name in hardware)
    return f"{where}, {threads} thread{'s' * (threads > 1)}, {', '.join(packages)}"


def _hardware() -> dict[str, Any]:
    cpu = next(
        (x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), platform.machine()
    )
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **gpu,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def _commit() -> str:
    """The commit, marked as dirty if anything but results and docs has changed since."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results", ":!/docs")
    return _git("rev-parse", "--short", "HEAD") + "-dirty" * bool(changed)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
