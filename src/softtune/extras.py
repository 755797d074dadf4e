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
        ("fastapi", "starlette", "uvicorn", "prometheus_client", "anyio", "fsspec", "tokenizers"),
    ),
    "experiments": Extra("an experiment or report", ("matplotlib",), includes=("metrics",)),
    "sweep": Extra("a search", ("optuna",)),
    "ray": Extra("running on Ray", ("ray",)),
    "vllm": Extra("the engine vllm", ("vllm",)),
    "quant": Extra("a quantised base model", ("bitsandbytes", "torchao")),
}
"""All extras but ``all`` and ``test``."""


def require(*extras: str) -> None:
    """Check that extras are installed, before anything of them is imported.

    Raises:
        MissingExtraError: a package of them is not; the message names all extras that lack one.
    """
    lacking = {extra: package for extra in extras if (package := _missing_package(extra)) is not None}
    if lacking:
        raise missing(next(iter(lacking.values())), *lacking)


def missing(package: str, *extras: str, user: str | None = None) -> MissingExtraError:
    """The error where a package of the first of these extras is not installed.

    Args:
        package: the package.
        extras: the extras to install.
        user: what needs it; by default what the first extra is for.
    """
    names = ",".join(extras)
    error = MissingExtraError(f"{user or EXTRAS[extras[0]].user} needs {package}", f"pip install 'softtune[{names}]'")
    error.name = package
    return error


def _missing_package(extra: str) -> str | None:
    """The first package of an extra, and of those that it includes, that is not installed."""
    every = (package for name in (extra, *EXTRAS[extra].includes) for package in EXTRAS[name].packages)
    return next((package for package in every if find_spec(package) is None), None)
