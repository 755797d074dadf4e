"""Where the tokens and the virtual tokens of one call stand."""

from __future__ import annotations

from dataclasses import dataclass

from softtune.injection.columns import Columns
from softtune.injection.layout import Layout
from softtune.injection.rows import RowPrompts
from softtune.injection.step import Step


@dataclass(frozen=True)
class Arrangement:
    """The tokens and the virtual tokens of one call's rows."""

    step: Step
    prompts: RowPrompts
    """Each row's prompt."""
    columns: Columns
    layout: Layout | None = None
    """The slots of both, where the layers see other slots than the caller's columns."""
