"""The fields of ``LoadOptions``. Imports nothing that takes long. Internal."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator

DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")


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
        if self.needed_dtype and self.dtype not in ("auto", self.needed_dtype):
            raise ValueError(f"{self.quantization} computes in {self.needed_dtype}: drop dtype")
        return self

    @property
    def needed_dtype(self) -> str | None:
        """The one dtype that the quantisation computes in; None where it takes any."""
        return "bfloat16" if self.quantization == "torchao-int4" else None
