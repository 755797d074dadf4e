"""How a base model is loaded: its dtype, device, quantisation and so on, and whether this machine can do it.

Knows nothing about adapters. Internal: import ``LoadOptions`` from ``softtune.pretrained``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from transformers import BitsAndBytesConfig, PretrainedConfig, TorchAoConfig

from softtune.compat import sharded_over
from softtune.errors import ConfigError
from softtune.extras import missing

DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")
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


def _known_device(device: str) -> str:
    if not DEVICE.fullmatch(device):
        raise ValueError("use auto, cpu, cuda, cuda:1 and so on, mps or xpu")
    return device


def _with_numbers(sizes: Any) -> Any:
    """Sizes by device, whose numbers may be spelled as strings, as they are in JSON."""
    if not isinstance(sizes, dict):
        return sizes
    return {int(name) if isinstance(name, str) and name.isdecimal() else name: size for name, size in sizes.items()}


class LoadFields(BaseModel):
    """The fields of ``LoadOptions``, which a recipe has too."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base model: auto is the checkpoint's own on an accelerator, and float32 on a CPU."""
    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    """Where the base model computes: auto (a CUDA GPU if there is one, else the CPU), cpu, cuda, cuda:1, mps or xpu."""
    device_map: str | dict[str, int | str] | None = None
    """Spread the base model over several devices, as transformers does it: auto, balanced, or a device by module."""
    max_memory: Annotated[dict[int | str, int | str], BeforeValidator(_with_numbers)] | None = None
    """Memory to use of each device with device_map, such as {0: 20GiB, cpu: 60GiB}."""
    fsdp: bool = False
    """Shard the base model over the processes that torchrun starts, each of which holds a part of every layer."""
    quantization: Literal["bnb-4bit", "bnb-8bit", "torchao-int8", "torchao-int4"] | None = None
    """Quantise the base model's weights as they are loaded; checkpoints in GPTQ, AWQ or HQQ load as they come."""
    attn_implementation: str | None = None
    """The attention function, such as sdpa, eager or flash_attention_2; by default transformers' choice."""
    revision: str | None = None
    """The base model's branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the base model."""

    @model_validator(mode="after")
    def _places_once(self) -> LoadFields:
        if self.device_map is not None and self.device != "auto":
            raise ValueError("device_map says where the base model is: drop device, or device_map")
        if self.fsdp and (self.device_map is not None or self.quantization is not None):
            other = "device_map" if self.device_map is not None else "quantization"
            raise ValueError(f"fsdp does not go with {other}: drop one of the two")
        if self.max_memory is not None and self.device_map is None:
            raise ValueError("max_memory bounds a device_map: set device_map to auto, or drop max_memory")
        if self._needed_dtype and self.dtype not in ("auto", self._needed_dtype):
            raise ValueError(f"{self.quantization} computes in {self._needed_dtype}: drop dtype")
        return self

    @property
    def _needed_dtype(self) -> str | None:
        """The one dtype that the quantisation computes in; None where it takes any."""
        return "bfloat16" if self.quantization == "torchao-int4" else None


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
        if "bfloat16" in (self.dtype, self._needed_dtype) and not has_bfloat16(device):
            remedy = (
                f"{self.quantization} needs it, use bnb-4bit" if self._needed_dtype else "use dtype float16 or float32"
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
        if (name := self._needed_dtype or self.dtype) != "auto":
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
