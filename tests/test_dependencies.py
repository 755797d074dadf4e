"""What the package imports is what it says it needs: the library what every installation has, and a room its extra."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from softtune.cli import NEEDS
from softtune.extras import EXTRAS
from softtune_command import COMMANDS

ROOT = Path(__file__).parents[1]
NAMES = {
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "rouge_score": "rouge-score",
    "prometheus_client": "prometheus-client",
}
"""Packages that are imported by another name."""
UNDER_TRANSFORMERS = {"gguf"}
"""For its GGUF files: used without an import here."""

ON_REQUEST = {"peft", "optuna", "ray", "vllm", "torchao"}
"""Imported where a user asks for what needs them."""


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(file): file for file in (ROOT / "src").rglob("*.py")}
COMMAND_FILES = {
    name: FILES[f"softtune.cli.{name}" if name != "import" else "softtune.cli.import_"] for name in COMMANDS
}
COMMAND = "softtune_command"
ROOMS = {
    "cli": {
        file
        for name, file in FILES.items()
        if name.startswith(("softtune.cli", "softtune_command", "softtune.__main__"))
    },
    "serve": {file for name, file in FILES.items() if name.startswith("softtune.serving")},
    "experiments": {file for name, file in FILES.items() if name.startswith("softtune.experiments")},
}
"""The files that need an extra, beside the commands for it."""
LIBRARY = {*FILES.values()}.difference(*ROOMS.values())


def walk(node: ast.AST, *, at_once: bool) -> Iterator[ast.AST]:
    """All nodes of a file, or those that run as it is imported."""
    yield node
    is_later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    if not (at_once and (is_later or is_for_types)):
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_once=at_once)


@cache
def imports_of(file: Path, *, at_once: bool = False) -> set[str]:
    """The modules that a file imports, and the names that it imports from them."""
    found = set()
    for node in walk(ast.parse(file.read_text(encoding="utf-8")), at_once=at_once):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def packages_in(imports: Iterable[str]) -> set[str]:
    found = {name.partition(".")[0] for name in imports}
    return {NAMES.get(name, name) for name in found - sys.stdlib_module_names - {"softtune", COMMAND}}


def packages_of(files: Iterable[Path]) -> set[str]:
    return packages_in(name for file in files for name in imports_of(file))


def packages_to_import(module: str) -> set[str]:
    """The packages without which a module cannot be imported."""
    left, seen = [module], set[str]()
    while left:
        parts = left.pop().split(".")
        new = {".".join(parts[:count]) for count in range(1, len(parts) + 1)} & FILES.keys() - seen
        seen |= new
        left += [name for one in new for name in imports_of(FILES[one], at_once=True) if name.startswith("softtune")]
    return packages_in(name for one in seen for name in imports_of(FILES[one], at_once=True))


def brought_by(*extras: str) -> set[str]:
    """The packages of extras and those that they include."""
    every = [*extras, *(other for extra in extras for other in EXTRAS[extra].includes)]
    return {NAMES.get(name, name) for extra in every for name in EXTRAS[extra].packages}


@pytest.fixture(scope="module")
def declared() -> dict[str, set[str]]:
    """The requirements of every extra, without versions, and those of the library under ""."""
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: {re.split("[<>=]", one)[0] for one in requirements} for extra, requirements in groups.items()}


def test_every_dependency_is_declared_and_none_besides(declared: dict[str, set[str]]) -> None:
    assert declared[""] == packages_of(LIBRARY) - ON_REQUEST - brought_by("metrics") | UNDER_TRANSFORMERS


@pytest.mark.parametrize("extra", ROOMS)
def test_what_a_room_imports_is_what_its_extra_brings(extra: str, declared: dict[str, set[str]]) -> None:
    commands = {COMMAND_FILES[name] for name, needed in NEEDS.items() if needed == extra}
    others = {COMMAND_FILES[name] for name in NEEDS} - commands
    packages = packages_of((ROOMS[extra] | commands) - others)
    of_the_command_line = set() if extra == "cli" else brought_by("cli")
    own = {name for name in declared[extra] if not name.startswith("softtune")}
    assert packages - declared[""] - of_the_command_line - ON_REQUEST == own


def test_metrics_are_imported_where_something_is_measured(declared: dict[str, set[str]]) -> None:
    measuring = FILES["softtune.tasks.metrics"]
    assert declared["metrics"] < packages_of([measuring])
    assert not declared["metrics"] & packages_of({*FILES.values()} - {measuring})


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_error_names_what_the_extra_brings(extra: str, declared: dict[str, set[str]]) -> None:
    included = {name for one in declared[extra] if "softtune[" in one for name in one[9:-1].split(",")}
    assert included - {"sweep"} == set(EXTRAS[extra].includes)
    own = {NAMES.get(name, name) for name in EXTRAS[extra].packages}
    assert {name.partition("[")[0] for name in declared[extra]} - {"softtune"} == own


def test_all_are_all_that_run_anywhere(declared: dict[str, set[str]]) -> None:
    assert declared["all"] == {"softtune[cli,serve,experiments]"}
    assert "softtune[metrics,sweep]" in declared["experiments"]


def test_the_library_is_imported_without_extras(declared: dict[str, set[str]]) -> None:
    for file in LIBRARY:
        assert packages_to_import(module_name(file)) <= declared[""], file


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_imported_with_its_extras(name: str, declared: dict[str, set[str]]) -> None:
    extras = brought_by("cli", *([NEEDS[name]] if name in NEEDS else []))
    assert packages_to_import(module_name(COMMAND_FILES[name])) <= declared[""] | extras


def test_a_vllm_of_ones_own_needs_the_library_alone(declared: dict[str, set[str]]) -> None:
    assert packages_to_import("softtune.serving.vllm.connector") <= declared[""] | {"vllm"}
