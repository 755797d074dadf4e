"""``softtune report``: the page of a comparison, from what it has kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softtune.cli.console import console, quiet
from softtune.experiments import report


def command(folder: Annotated[Path, typer.Argument(help="The comparison's folder.")]) -> None:
    """Write the page of a comparison, of those entries that are finished."""
    quiet()
    console.print(f"The page is {report.write(folder, title=folder.name)}.", soft_wrap=True)
