"""What can be imported is a list: the rooms' public names, in docs/api.md. All else is internal and says so."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "softtune"
ROOMS = ["data", "tasks", "training", "evaluation", "experiments", "distillation", "serving"]
PUBLIC = ["softtune", *(f"softtune.{room}" for room in [*ROOMS, "pretrained", "errors"])]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]
SCRIPTS = [file.read_text("utf-8") for file in sorted((ROOT / "examples").glob("*.py"))]


def listed() -> dict[str, list[str]]:
    """The names in the tables of docs/api.md, by room."""
    sections = re.split(r"^## ", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {section.split("`")[1]: re.findall(r"^\| `(\w+)` \| \S", section, re.MULTILINE) for section in sections}


def test_the_page_lists_every_public_name_by_room() -> None:
    assert listed() == {room: import_module(room).__all__ for room in PUBLIC}


@pytest.mark.parametrize("room", PUBLIC)
def test_every_public_name_can_be_imported(room: str) -> None:
    module = import_module(room)
    assert all(getattr(module, name) is not None for name in module.__all__)
    assert {*module.__all__} <= {*dir(module)}


@pytest.mark.parametrize(
    "room", [room for room in ("", *ROOMS) if "public_names(" in (SOURCE / room / "__init__.py").read_text()]
)
def test_names_that_come_at_their_first_use_are_those_that_type_checkers_see(room: str) -> None:
    name = f"softtune.{room}".rstrip(".")
    module, tree = import_module(name), ast.parse((SOURCE / room / "__init__.py").read_text("utf-8"))
    (for_types,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in for_types.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname or alias.name: (node.module, alias.name) for node in imports for alias in node.names}
    assert sorted(seen) == sorted(module.__all__) == dir(module)
    for public, (place, own_name) in seen.items():
        assert getattr(module, public) is getattr(import_module(place), own_name)
    with pytest.raises(AttributeError, match=rf"module '{re.escape(name)}' has no attribute 'nothing'"):
        _ = module.nothing


@pytest.mark.parametrize("code", [*BLOCKS, *SCRIPTS], ids=lambda code: code.strip().partition("\n")[0])
def test_users_are_told_to_import_what_is_public(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            assert all(alias.name in PUBLIC for alias in node.names if alias.name.startswith("softtune"))
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("softtune"):
            assert node.module in PUBLIC
            assert all(alias.name in import_module(str(node.module)).__all__ for alias in node.names)


def test_there_are_examples_to_look_at() -> None:
    assert sum("import" in code and "softtune" in code for code in BLOCKS) >= 1
    assert len(SCRIPTS) >= 5


@pytest.mark.parametrize(
    "file", [*SOURCE.glob("*.py"), *SOURCE.glob("*/__init__.py"), SOURCE.parent / "softtune_command.py"]
)
def test_what_is_not_public_says_so(file: Path) -> None:
    says = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    name = file.parent.name if file.stem == "__init__" else file.stem
    if name in ROOMS:
        assert "modules are internal" in says
    elif name not in ("softtune", "pretrained", "errors"):
        assert "Internal" in says


def test_a_module_of_a_room_loads_no_more_than_it_needs() -> None:
    rooms = "import softtune.serving, softtune.experiments, softtune.training.recipe, softtune.serving.vllm.prompts"
    heavy = ("datasets", "fastapi", "greenlet", "matplotlib", "typer", "uvicorn")
    code = f"{rooms}\nimport sys\nprint(*[name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
    code = code.replace(rooms, "from softtune.serving import create_app")
    assert "fastapi" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "code",
    [
        "import softtune; softtune.errors.ConfigError; softtune.__version__",
        "import softtune_command; softtune_command.main(['train', '--help'])",
    ],
)
def test_what_needs_no_model_imports_nothing_that_takes_long(code: str) -> None:
    heavy = "[name for name in ('torch', 'transformers', 'datasets') if name in sys.modules]"
    code = f"import atexit, sys; atexit.register(lambda: print({heavy}, file=sys.stderr)); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_modules_of_the_package_are_found_in_it() -> None:
    code = "import softtune; print(softtune.training.Recipe.__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "Recipe\n"
