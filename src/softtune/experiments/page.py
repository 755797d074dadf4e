"""Renders texts, tables and pictures as self-contained HTML, and as Markdown with picture files beside it.

Knows nothing about runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from softtune.experiments.pictures import Picture

TEMPLATE_NAME = "page.html.jinja"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first cell of each line is its name."""

    head: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Page:
    """The contents of a report, from top to bottom."""

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    pictures: Sequence[Picture] = ()


def as_html(page: Page) -> str:
    """The page as one self-contained HTML file."""
    return _template().render(page=page)


def as_markdown(page: Page) -> str:
    """The page as Markdown, with links to the pictures' files."""
    parts = [
        f"# {page.title}",
        *page.texts,
        *map(_markdown_table, page.tables),
        "\n".join(f"- {note}" for note in page.notes),
        *(f"![{picture.title}]({file_of(picture)})" for picture in page.pictures),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def file_of(picture: Picture) -> str:
    """The file name of a picture."""
    return re.sub(r"[^a-z0-9]+", "_", picture.title.lower()).strip("_") + ".svg"


@cache
def _template() -> Template:
    """The template of the HTML page, which escapes all texts but the pictures' SVG."""
    environment = Environment(
        autoescape=True,
        loader=PackageLoader("softtune.experiments", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE_NAME)


def _markdown_table(table: Table) -> str:
    rule = ["---"] * len(table.head)
    lines = [f"| {' | '.join(_cell(cell) for cell in cells)} |" for cells in (table.head, rule, *table.lines)]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
