"""Keyword options of PEFT's calls: those with an effect, and those accepted because they change nothing here.

Internal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from softtune.errors import ConfigError
from softtune.storage import HUB_OPTIONS

ANY = object()
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "autocast_adapter_dtype": (ANY,),  # prompts are trained in fp32, in PEFT too
    "device_map": (ANY,),  # adapters are put on the base model's device; so for the next ones
    "dtype": (ANY,),
    "ephemeral_gpu_offload": (False,),
    "ignore_mismatched_sizes": (False,),
    "key_mapping": (None,),
    "low_cpu_mem_usage": (ANY,),
    "max_memory": (ANY,),
    "mixed": (False,),
    "offload_buffers": (ANY,),
    "offload_dir": (ANY,),
    "offload_folder": (ANY,),
    "offload_index": (ANY,),
    "path_initial_model_for_weight_conversion": (None,),
    "save_embedding_layers": ("auto", False),
    "torch_device": (ANY,),  # adapters are where the base model is
    "torch_dtype": (ANY,),
    "trust_remote_code": (ANY,),
    "unwrap_compiled": (ANY,),  # a compiled model has the attributes of the model in it
    "use_safetensors": (True, None),
}
"""Options of PEFT, and the values that change nothing here: ``ANY`` where no value has an effect."""
LOADING_OPTIONS = (*HUB_OPTIONS, "allow_pickle")
"""Options of loading that have an effect."""


def check_options(options: Mapping[str, Any], known: Sequence[str] = ()) -> dict[str, Any]:
    """Select the known options, and drop those of PEFT that have no effect here.

    Raises:
        ConfigError: an option is unknown, or its value is not supported for soft prompts.
    """
    for name, value in options.items():
        if name in known or any(same is ANY or same == value for same in WITHOUT_EFFECT.get(name, ())):
            continue
        if name in WITHOUT_EFFECT:
            raise ConfigError(f"{name}={value!r} is not for soft prompts", "leave it out")
        raise ConfigError(f"no option {name}={value!r}", f"use one of {', '.join([*known, *WITHOUT_EFFECT])}")
    return {name: value for name, value in options.items() if name in known}
