"""Renders texts, tables and pictures as self-contained HTML, and as Markdown with picture files beside it.

Knows nothing about runs.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from softtune.experiments.pictures import Picture

STYLE = """
:root { color-scheme: light dark; --ink: #20262c; --paper: #ffffff; --line: #d5dbe1; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe5ea; --paper: #14181c; --line: #333b43; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 76rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; break-after: avoid; }
p, figcaption { max-width: 60rem; }
.wide { overflow-x: auto; margin: 1.2rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 6.5rem; }
figure { margin: 0; overflow-x: auto; break-inside: avoid; }
figure svg { width: 100%; height: auto; min-width: 28rem; max-width: 46rem; }
figcaption, footer { opacity: .8; }
@media (max-width: 40rem) { th, td { padding: .3rem .45rem; font-size: .9rem; } }
"""


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
    body = [
        f"<h1>{html.escape(page.title)}</h1>",
        *(f"<p>{html.escape(text)}</p>" for text in page.texts),
        *map(_html_table, page.tables),
        *(f"<p>{html.escape(note)}</p>" for note in page.notes),
        *map(_section, page.pictures),
    ]
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    icon = '<link rel="icon" href="data:,">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{meta}{icon}<title>{html.escape(page.title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>{''.join(body)}</body></html>\n"
    )


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


def _html_table(table: Table) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rest = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in table.lines)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{rest}</tbody></table></div>'


def _markdown_table(table: Table) -> str:
    rule = ["---"] * len(table.head)
    lines = [f"| {' | '.join(_cell(cell) for cell in cells)} |" for cells in (table.head, rule, *table.lines)]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _section(picture: Picture) -> str:
    says = f"<figcaption>{html.escape(picture.says)}</figcaption>" if picture.says else ""
    return f"<h2>{html.escape(picture.title)}</h2><figure>{picture.svg}{says}</figure>"
