"""The pages name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("file", sorted((ROOT / "src").rglob("*.py")), ids=lambda file: file.stem)
def test_every_file_has_a_place_in_the_design(file: Path) -> None:
    rooms = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("```")[1]
    name = file.parent.name if file.stem == "__init__" else file.stem
    assert re.search(rf"\b{name}\b", rooms), f"docs/design.md does not name {file}"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} leads to {target}"


def test_make_has_the_targets_that_the_pages_name() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8")):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name} names make {target}"


def test_the_places_of_changes_are_there() -> None:
    table = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").partition("## Where a change goes")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 10
    for row in rows:
        paths = re.findall(r"`((?:src|tests)/[^`]+)`", row)
        assert paths, row
        for path in paths:
            assert (ROOT / path).exists(), path
        names = set(re.findall(r"`([A-Z]\w+)`", row))
        places = [
            file for path in paths for file in ([ROOT / path] if path.endswith(".py") else (ROOT / path).glob("*.py"))
        ]
        assert all(any(name in file.read_text(encoding="utf-8") for file in places) for name in names), row
