"""Training: from a recipe to a trained adapter.

Import from here; the modules are internal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softtune.lazy import public_names

if TYPE_CHECKING:
    from softtune.training.diagnostics import find_learning_rate, profile_recipe
    from softtune.training.progress import Phase, Progress
    from softtune.training.recipe import Recipe
    from softtune.training.report import Report
    from softtune.training.run import train, train_all
else:
    __getattr__, __dir__ = public_names(
        __name__,
        {
            "Phase": "progress",
            "Progress": "progress",
            "Recipe": "recipe",
            "Report": "report",
            "find_learning_rate": "diagnostics",
            "profile_recipe": "diagnostics",
            "train": "run",
            "train_all": "run",
        },
    )

__all__ = ["Phase", "Progress", "Recipe", "Report", "find_learning_rate", "profile_recipe", "train", "train_all"]
