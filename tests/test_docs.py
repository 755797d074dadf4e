"""The pages name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))]


def listed() -> tuple[list[str], list[str]]:
    """The paths of the rooms and files in docs/design.md. A line belongs to the room that it is indented below."""
    rooms, files, around = list[str](), list[str](), list[tuple[int, str]]()
    for line in (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("```")[1].splitlines():
        indent = len(line) - len(line.lstrip())
        around = [room for room in around if room[0] < indent]
        if room := re.match(r" *([\w/]+)/(?: |$)", line):
            around.append((indent, room[1]))
            rooms.append("/".join(name for _, name in around))
        files += ["/".join([*(name for _, name in around), name]) for name in re.findall(r"[\w/]+\.py\b", line)]
    return rooms, files


def test_every_file_has_a_place_in_the_design_and_no_other() -> None:
    rooms, files = listed()
    source = [file.relative_to(ROOT) for file in sorted((ROOT / "src").rglob("*.py"))]
    assert sorted(files) == [str(file) for file in source if file.stem != "__init__"]
    assert sorted(rooms) == [str(file.parent) for file in source if file.stem == "__init__"]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    for name in re.findall(r"`([\w./-]+/\w+\.py)`", (ROOT / page).read_text(encoding="utf-8")):
        assert any((ROOT / place / name).is_file() for place in (".", "src/softtune")), f"{page} names {name}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} leads to {target}"


def test_make_has_the_targets_that_the_pages_name() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in re.findall(r"`make ([a-z-]+)", (ROOT / page).read_text(encoding="utf-8")):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page} names make {target}"


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


WITHOUT_TESTS = {"injection/arrangement.py"}
"""It holds data alone, which the tests of injection/positions.py read."""


@pytest.mark.parametrize("room", ["injection", "serving"])
def test_every_file_has_tests_of_its_name(room: str) -> None:
    """In the same folder of the tests, or, where they need vLLM, in tests/vllm."""
    source = ROOT / "src" / "softtune"
    files = {file.relative_to(source).as_posix() for file in (source / room).rglob("*.py") if file.stem != "__init__"}
    for file in map(Path, files - WITHOUT_TESTS):
        tests = [ROOT / "tests" / place / f"test_{file.name}" for place in (file.parent, file.parent.name)]
        found = [test for test in tests if test.exists() and "\ndef test_" in test.read_text(encoding="utf-8")]
        assert found, f"{file} has no tests: add tests/{file.parent}/test_{file.name}"
