"""Limits of an engine: their documented defaults, and that a running engine's cannot change."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from softtune.serving.engine_config import EngineConfig


def test_the_defaults_are_those_that_serve_shows() -> None:
    assert dataclasses.asdict(EngineConfig()) == {
        "max_num_seqs": 64,
        "max_num_waiting": 256,
        "max_num_batched_tokens": 256,
        "num_kv_slots": 16384,
        "adapter_cache_bytes": 67108864,
        "prepack_weights": True,
        "threads": None,
    }


def test_a_config_cannot_change() -> None:
    config: Any = EngineConfig(max_num_seqs=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_num_seqs = 4
    assert dataclasses.replace(config, max_num_waiting=7) == EngineConfig(max_num_seqs=3, max_num_waiting=7)


@pytest.mark.parametrize(("values", "given"), [((3,), {}), ((), {"rows": 3})], ids=["by place", "unknown"])
def test_limits_have_names(values: tuple[int, ...], given: dict[str, int]) -> None:
    make: Any = EngineConfig
    with pytest.raises(TypeError):
        make(*values, **given)
