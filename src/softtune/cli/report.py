"""``softtune report``: write the page of a comparison, a sweep or an adapter from the files in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softtune.cli.console import console, quiet
from softtune.experiments import report
from softtune.training.recipe import check_finished


def command(folder: Annotated[Path, typer.Argument(help="The folder of a comparison, a sweep or an adapter.")]) -> None:
    """Write the page of a comparison or a sweep, or of an adapter, with its losses and traits.

    Of a comparison or a sweep it shows what is finished.
    """
    quiet()
    check_finished(folder)
    console.print(f"The page is {report.write(folder)}.", soft_wrap=True)
