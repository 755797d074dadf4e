"""Keyword options of PEFT's calls: those that act, and those that are accepted because they change nothing here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from softtune.errors import ConfigError

WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "autocast_adapter_dtype": (True,),
    "ephemeral_gpu_offload": (False,),
    "ignore_mismatched_sizes": (False,),
    "key_mapping": (None,),
    "low_cpu_mem_usage": (True, False),
    "mixed": (False,),
    "path_initial_model_for_weight_conversion": (None,),
    "save_embedding_layers": ("auto", False),
    "torch_device": (None,),
    "unwrap_compiled": (False,),
}
"""Options of PEFT, and the values that change nothing here."""


def check_options(options: Mapping[str, Any], known: Sequence[str] = ()) -> dict[str, Any]:
    """The known options out of some; those of PEFT without effect here are dropped, others refused."""
    for name, value in options.items():
        if name in known or value in WITHOUT_EFFECT.get(name, ()):
            continue
        if name in WITHOUT_EFFECT:
            raise ConfigError(f"{name}={value!r} is not for soft prompts: leave it out")
        raise ConfigError(f"no option {name}={value!r}: use one of {', '.join([*known, *WITHOUT_EFFECT])}")
    return {name: value for name, value in options.items() if name in known}
