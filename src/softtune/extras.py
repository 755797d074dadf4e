"""The extras of the package, ``pip install 'softtune[serve]'`` and so on, and the error where one is not installed.

pyproject.toml says which packages an extra brings; a test compares it with what stands here.

Internal.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

from softtune.errors import MissingExtraError


class Extra(NamedTuple):
    """An extra of the package."""

    user: str
    """What needs it, for the error message."""
    packages: tuple[str, ...]
    """Its own packages, by the names that they are imported by."""
    includes: tuple[str, ...] = ()
    """Other extras that it needs."""


EXTRAS = {
    "metrics": Extra("measuring answers", ("sklearn", "sacrebleu", "rouge_score", "seqeval")),
    "cli": Extra("the command line", ("typer", "rich"), includes=("metrics",)),
    "serve": Extra(
        "the server",
        ("fastapi", "starlette", "uvicorn", "prometheus_client", "anyio", "jinja2", "fsspec", "tokenizers"),
    ),
    "experiments": Extra("an experiment or report", ("matplotlib", "jinja2", "psutil"), includes=("metrics",)),
    "sweep": Extra("a search", ("optuna",)),
    "ray": Extra("running on Ray", ("ray",)),
    "vllm": Extra("the engine vllm", ("vllm",)),
}
"""All extras but ``all`` and ``test``."""


def require(extra: str) -> None:
    """Check that an extra is installed, before anything of it is imported.

    Raises:
        MissingExtraError: a package of it is not.
    """
    needed = EXTRAS[extra]
    included = (package for other in needed.includes for package in EXTRAS[other].packages)
    for package in (*needed.packages, *included):
        if find_spec(package) is None:
            raise missing(extra, package)


def missing(extra: str, package: str) -> MissingExtraError:
    """The error where a package of an extra is not installed."""
    return MissingExtraError(f"{EXTRAS[extra].user} needs {package}", f"pip install 'softtune[{extra}]'")
