"""Which transformers is installed, and that it is new enough: an old one lacks what softtune imports. Internal."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

OLDEST = "5.17"
"""The oldest transformers that softtune runs with, as in pyproject.toml."""
INSTALLED = Version(version("transformers"))
if Version(OLDEST) > INSTALLED:
    raise ImportError(
        f"softtune needs transformers {OLDEST} or newer, and {INSTALLED} is installed: pip install -U transformers",
        name="transformers",
    )
