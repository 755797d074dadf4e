"""Comparisons and sweeps of many runs, and their reports.

Import from here; the modules are internal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softtune.lazy import public_names

if TYPE_CHECKING:
    from softtune.experiments.compare import compare as run_comparison
    from softtune.experiments.outcomes import Entry
    from softtune.experiments.report import write as write_report
    from softtune.experiments.sweep import Sweep
    from softtune.experiments.sweep import sweep as run_sweep
else:
    __getattr__, __dir__ = public_names(
        __name__,
        {
            "Entry": "outcomes",
            "Sweep": "sweep",
            "run_comparison": "compare:compare",
            "run_sweep": "sweep:sweep",
            "write_report": "report:write",
        },
        extra="experiments",
    )

__all__ = ["Entry", "Sweep", "run_comparison", "run_sweep", "write_report"]
