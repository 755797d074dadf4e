"""Tensors by key: in memory up to a limit, then in a temporary file up to another. Nothing is evicted.

Texts come back once an epoch in a new order, for which keeping the first ones is as good as any other policy. The file
has no name, so that nothing is left of it when the process ends, however it ends. Knows nothing about models.
"""

from __future__ import annotations

import os
import tempfile
import warnings
import zlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softtune.errors import ConfigError

MEGABYTE = 10**6


class _Place(NamedTuple):
    """A tensor's location in the file."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    checksum: int


class TensorStore:
    """Tensors by key, on the CPU.

    Args:
        memory: megabytes (10⁶ bytes) to keep in memory.
        disk: megabytes to keep in a file when memory is full.
        folder: where the file is created; by default the system's folder for temporary files.

    Raises:
        ConfigError: a size is negative, both are 0, or there is no such folder.
    """

    def __init__(self, memory: float, disk: float, folder: str | os.PathLike[str] | None = None) -> None:
        if not (memory >= 0 and disk >= 0 and memory + disk > 0):
            raise ConfigError(
                f"the trunk cache is given {memory} MB of memory and {disk} of disk", "use 0 or more, and one above 0"
            )
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"there is no folder {os.fspath(folder)!r} for the trunk cache", "make it first")
        self._memory = memory * MEGABYTE
        self._disk = disk * MEGABYTE
        self._folder = folder
        self._tensors: dict[Hashable, Tensor] = {}
        self._places: dict[Hashable, _Place] = {}
        self._file: Any = None
        self._end = 0

    def __len__(self) -> int:
        return len(self._tensors) + len(self._places)

    def get(self, key: Hashable) -> Tensor | None:
        """The tensor of a key; None where there is none, or the file no longer has what was written."""
        if key in self._tensors:
            return self._tensors[key]
        if key not in self._places:
            return None
        place = self._places[key]
        buffer = torch.empty(place.shape.numel() * place.dtype.itemsize, dtype=torch.uint8)
        try:
            self._file.seek(place.offset)
            whole = self._file.readinto(buffer.numpy()) == len(buffer)
        except OSError:
            whole = False
        if whole and zlib.crc32(buffer.numpy().data) == place.checksum:
            return buffer.view(place.dtype).view(place.shape)
        del self._places[key]
        return None

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Store a tensor under a new key, if there is room."""
        tensor = tensor.detach().to("cpu", copy=True).contiguous()
        if tensor.nbytes <= self._memory:
            self._memory -= tensor.nbytes
            self._tensors[key] = tensor
        elif self._end + tensor.nbytes <= self._disk:
            self._write(key, tensor)

    def close(self) -> None:
        """Release memory and disk."""
        self._tensors, self._places = {}, {}
        if self._file is not None:
            self._file.close()

    def _write(self, key: Hashable, tensor: Tensor) -> None:
        """Append a tensor to the file. It is stored once all of it is written: a full disk leaves no partial tensor."""
        content = tensor.flatten().view(torch.uint8).numpy().data
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115  # until close()
            self._file.seek(self._end)
            if self._file.write(content) < len(content):
                raise OSError("no space left")
        except OSError as error:
            self._disk = 0
            warnings.warn(
                f"the trunk cache cannot write ({error}): it keeps {len(self)} texts, others are computed every time",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self._places[key] = _Place(self._end, tensor.shape, tensor.dtype, zlib.crc32(content))
        self._end += len(content)
