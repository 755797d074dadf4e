"""Where the tools are missing, their tests are not collected."""

from __future__ import annotations

from importlib.util import find_spec

TOOLS = ("lm_eval", "outlines", "sentence_transformers")
collect_ignore_glob = [] if all(find_spec(name) for name in TOOLS) else ["test_*.py"]
