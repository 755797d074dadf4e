"""Exported prompts in a folder, as vLLM's processes read them: their metadata from the file, their tensors cached.

Letters: P virtual tokens, L layers, H key/value heads, K size of a key or value, W = L·2·H·K.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from softtune.errors import CheckpointError
from softtune.serving.lru import LRUCache
from softtune.serving.prompt_export import PROMPT_NAME

NAME = re.compile(r"[\w@-][\w@.-]{0,199}")
"""Valid names of an adapter's folder; none leads out of the folder that it is in."""


class Prompts:
    """The exported prompts of a folder, each in a subfolder with its name. A subfolder's contents never change.

    Args:
        folder: the folder.
        layers: L.
        heads: H.
        size: K.
    """

    def __init__(self, folder: Path, layers: int, heads: int, size: int) -> None:
        self.folder = folder
        self._shape = (layers, 2, heads, size)
        self.length = lru_cache(maxsize=2**16)(self._length)

    def _length(self, name: str) -> int:
        """P of a prompt.

        Raises:
            CheckpointError: the name is invalid, or it is not a prefix in every layer of the model, in front of a text
                that begins at position P.
            OSError, SafetensorError, KeyError: the file is missing or damaged.
        """
        with safe_open(self._file(name), "pt") as opened:
            facts = json.loads(opened.metadata()["prompt"])
            shape = opened.get_slice("prefix").get_shape()
            parts = list(opened.keys())
        is_plain = parts == ["prefix"] and facts["shifts_positions"] and not facts["after_text"]
        if not is_plain or shape != [facts["num_virtual_tokens"], torch.Size(self._shape).numel()]:
            raise CheckpointError(f"{name} is no prefix in every layer of this model", "bake it for this model")
        return int(shape[0])

    def read(self, name: str) -> Tensor:
        """A prompt's keys and values [P, L, 2, H, K].

        Raises:
            CheckpointError, OSError, SafetensorError, KeyError: see ``_length``.
        """
        self.length(name)
        with safe_open(self._file(name), "pt") as opened:
            prefix: Tensor = opened.get_tensor("prefix")
        return prefix.view(-1, *self._shape)

    def _file(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise CheckpointError(f"{name!r} is no adapter's name", "use letters, digits, '_', '-', '.' and '@'")
        return self.folder / name / PROMPT_NAME


class CachedPrompts:
    """The prompts in a worker's memory, least recently used ones evicted first.

    Args:
        prompts: where they are read from.
        heads: the worker's slice of the H heads.
        dtype: dtype of its KV cache.
        device: device of its KV cache.
        max_bytes: maximum size in bytes; the last used prompt is kept in any case.
    """

    def __init__(
        self, prompts: Prompts, heads: slice, dtype: torch.dtype, device: torch.device, max_bytes: int
    ) -> None:
        self._max_bytes = max_bytes
        self._cache: LRUCache[str, Tensor] = LRUCache(
            lambda name: prompts.read(name)[..., heads, :].to(device, dtype).contiguous()
        )

    def get(self, name: str) -> Tensor:
        """A prompt's keys and values [P, L, 2, H, K] for the worker's H heads.

        Raises:
            CheckpointError, OSError, SafetensorError, KeyError: see ``Prompts._length``.
        """
        prompt = self._cache.use(name)
        self._cache.shrink(self._max_bytes, keep=[name])
        return prompt
