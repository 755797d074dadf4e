"""How a base model is loaded: its dtype, device, quantisation and so on, and whether this machine can do it.

Knows nothing about adapters. Internal: import ``LoadOptions`` from ``softtune.pretrained``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from pydantic import ConfigDict, ValidationError
from transformers import BitsAndBytesConfig, PretrainedConfig, TorchAoConfig

from softtune.compat import sharded_over
from softtune.errors import ConfigError
from softtune.extras import missing
from softtune.load_fields import LoadFields

PACKAGES = {"bnb": "bitsandbytes", "torchao": "torchao"}
"""The packages of the kinds of quantisation, by the first part of their names."""
TORCHAO = {"Int8WeightOnlyConfig": "torchao-int8", "Int4WeightOnlyConfig": "torchao-int4"}
"""Names of quantisations by the class of torchao's config."""
INT4_GROUP = 32
"""Weights with a scale of their own; the smallest group that torchao has kernels for, which fits most widths."""
INT4_FORMATS = {"cuda": "tile_packed_to_4d", "xpu": "plain_int32"}
"""How torchao's kernels pack 4-bit weights, by the devices that have any. They compute in bfloat16."""
OF_THE_MACHINE = ("device", "device_map", "max_memory", "fsdp")
"""Fields that say where a base model is, and not what it computes."""
LESS_MEMORY = "use dtype bfloat16, quantization bnb-4bit, or device_map auto, which spreads it over all devices"


class LoadOptions(LoadFields):
    """How a base model is loaded.

    By default a CPU computes in float32 whatever the checkpoint's dtype, so that results do not depend on what a
    processor is fast at. Ask for ``dtype="bfloat16"`` where it is.

    Args:
        fields: see ``LoadFields``.

    Raises:
        ConfigError: a field is unknown or out of range, or two of them contradict each other.
    """

    model_config = ConfigDict(frozen=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_what_is_wrong(error, fields)) from None

    def check_machine(self) -> None:
        """Check that this machine can load a base model so.

        Raises:
            ConfigError: there is no such device, or it does not compute in this dtype, or there is one process to shard
                over.
            MissingExtraError: the quantisation's package is not installed.
        """
        device = self.torch_device
        if self.fsdp and num_processes() == 1:
            raise ConfigError(
                "fsdp shards over several processes, and this is one",
                "start as many as there are GPUs, by torchrun --nproc-per-node 8 -m softtune train recipe.yaml",
            )
        if "bfloat16" in (self.dtype, self.needed_dtype) and not has_bfloat16(device):
            remedy = (
                f"{self.quantization} needs it, use bnb-4bit" if self.needed_dtype else "use dtype float16 or float32"
            )
            raise ConfigError(f"{device} does not compute in bfloat16", remedy)
        if self.quantization == "torchao-int4" and device.type not in INT4_FORMATS:
            raise ConfigError(f"torchao-int4 does not run on {device}", "use quantization bnb-4bit, or torchao-int8")
        if self.quantization is not None:
            package = PACKAGES[self.quantization.partition("-")[0]]
            if find_spec(package) is None:
                raise missing(package, "quant")

    @property
    def torch_device(self) -> torch.device:
        """The device where the base model computes; with ``device_map`` the first one.

        Raises:
            ConfigError: it is not there.
        """
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        device = torch.device(name)
        if device.type == "cpu":
            return device
        count = torch.get_device_module(device).device_count()
        if count == 0:
            raise ConfigError(f"no {device.type.upper()} here", f"use device cpu, or install a torch for {device.type}")
        if device.type == "mps":
            return device
        # Under torchrun, each process of a machine has a device of its own.
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= count:
            every = ", ".join(f"{device.type}:{number}" for number in range(count))
            raise ConfigError(f"no {device.type}:{index} here", f"use one of {every}")
        return torch.device(device.type, index)

    def arguments(self, config: PretrainedConfig, heads: Sequence[str] | None = None) -> dict[str, Any]:
        """The keyword arguments of ``from_pretrained`` that load a checkpoint's weights so.

        Args:
            config: the checkpoint's config.
            heads: names of the modules that are not quantised; by default transformers chooses, which leaves out an
                output embedding and takes some heads.

        Raises:
            ConfigError: there is no such device, or the checkpoint is quantised already.
        """
        device, own = self.torch_device, own_quantization(config)
        if own is not None and self.quantization is not None:
            raise ConfigError(f"the base model is quantised already, by {own}", "drop quantization")
        dtype = self._dtype(device, config)
        arguments: dict[str, Any] = {"dtype": dtype}
        if self.fsdp:
            arguments["distributed_config"] = sharded_over(num_processes())
        elif self.device_map is not None:
            arguments |= {"device_map": self.device_map, "max_memory": self.max_memory}
        elif device.type != "cpu" or self.quantization or own:  # a quantised model would go to a GPU by itself
            arguments["device_map"] = {"": str(device)}
        if self.quantization is not None:
            computed = next((x for x in (dtype, config.dtype) if isinstance(x, torch.dtype)), torch.float32)
            arguments["quantization_config"] = _quantization_config(self.quantization, computed, device, heads)
        if self.attn_implementation is not None:
            arguments["attn_implementation"] = self.attn_implementation
        return arguments

    @property
    def hub(self) -> dict[str, Any]:
        """The keyword arguments of ``from_pretrained`` that say which files of a checkpoint to load, and to run."""
        revision = {} if self.revision is None else {"revision": self.revision}
        return {**revision, "trust_remote_code": self.trust_remote_code}

    def _dtype(self, device: torch.device, config: PretrainedConfig) -> torch.dtype | Literal["auto"]:
        """The dtype to load in; "auto" for the checkpoint's own."""
        if (name := self.needed_dtype or self.dtype) != "auto":
            named: torch.dtype = getattr(torch, name)
            return named
        if own_quantization(config) is not None:
            return "auto"
        if device.type == "cpu" or (config.dtype is torch.bfloat16 and not has_bfloat16(device)):
            return torch.float32
        return "auto"


def num_processes() -> int:
    """The number of processes that torchrun or accelerate has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16; CUDA GPUs do from compute capability 8 on."""
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def own_quantization(config: PretrainedConfig) -> str | None:
    """The quantisation of a loaded model or checkpoint, by the name of ``LoadFields.quantization`` where it has one.

    Others have the name of their method, such as gptq.
    """
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return None
    fields = found if isinstance(found, dict) else vars(found)
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))
    if method == "torchao":
        return TORCHAO.get(type(fields.get("quant_type")).__name__, method)
    if method != "bitsandbytes":
        return method
    return "bnb-4bit" if fields.get("load_in_4bit", fields.get("_load_in_4bit")) else "bnb-8bit"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory, or the machine's, is full."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _quantization_config(name: str, dtype: torch.dtype, device: torch.device, heads: Sequence[str] | None) -> Any:
    """transformers' config of a quantisation; 4 bits of bitsandbytes are NF4 (Dettmers et al. 2023, QLoRA)."""
    kept = None if heads is None else [*heads]
    if name == "bnb-4bit":
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=kept, **nf4)
    if name == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    import torchao.quantization as ao

    if name == "torchao-int8":
        weights = ao.Int8WeightOnlyConfig()
    else:
        weights = ao.Int4WeightOnlyConfig(group_size=INT4_GROUP, int4_packing_format=INT4_FORMATS[device.type])
    return TorchAoConfig(weights, modules_to_not_convert=kept)


def _what_is_wrong(error: ValidationError, fields: dict[str, Any]) -> str:
    """The first of pydantic's errors, in one line."""
    first = error.errors()[0]
    says = str(first["msg"]).removeprefix("Value error, ").replace("Input should", "it should", 1)
    if not first["loc"]:
        return says
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"{name}: no such option: use one of {', '.join(LoadFields.model_fields)}"
    return f"{name} is {fields[name]!r}: {says}"
