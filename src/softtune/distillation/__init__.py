"""Distillation of a text into a trained KV prefix, a cartridge.

Import from here; the modules are internal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softtune.lazy import public_names

if TYPE_CHECKING:
    from softtune.distillation.report import DistillationReport
    from softtune.distillation.run import distill
    from softtune.distillation.settings import Distillation
else:
    __getattr__, __dir__ = public_names(
        __name__, {"Distillation": "settings", "DistillationReport": "report", "distill": "run"}
    )

__all__ = ["Distillation", "DistillationReport", "distill"]
