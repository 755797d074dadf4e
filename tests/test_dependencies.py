"""What the package imports is what it says it needs."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = {
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "rouge_score": "rouge-score",
    "prometheus_client": "prometheus-client",
}
"""Packages that are imported by another name."""
UNDER_TRANSFORMERS = {"accelerate", "gguf"}
"""For its Trainer and its GGUF files: used without an import here."""

ON_REQUEST = {"peft", "optuna", "ray", "vllm"}
"""Imported where a user asks for what needs them."""


def imported() -> set[str]:
    found = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    return {NAMES.get(name, name) for name in found - sys.stdlib_module_names - {"softtune"}}


def test_every_dependency_is_declared_and_none_besides() -> None:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split("[<>=]", requirement)[0] for requirement in project["dependencies"]}
    assert declared == imported() - ON_REQUEST | UNDER_TRANSFORMERS
