"""Baked prompts in a folder, as vLLM's processes read them: a file's facts, and its numbers in memory.

Letters: P virtual tokens, L layers, H key/value heads, K size of a key or value, W = L·2·H·K.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from softtune.errors import CheckpointError
from softtune.serving.baking import PROMPT_NAME

NAME = re.compile(r"[\w@-][\w@.-]{0,199}")
"""What names a folder within a folder, and nothing else."""


class Prompts:
    """The prompts of a folder, each in a folder of its name. What is in one never changes.

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
            CheckpointError: it is none of keys and values in every layer, in front of a text that begins at position P.
            OSError, SafetensorError, KeyError: there is no such file, or it is damaged.
        """
        with safe_open(self._file(name), "pt") as opened:
            facts = json.loads(opened.metadata()["prompt"])
            shape = opened.get_slice("prefix").get_shape()
            parts = list(opened.keys())
        is_plain = parts == ["prefix"] and facts["shifts_positions"] and not facts["after_text"]
        if not is_plain or shape != [facts["num_virtual_tokens"], torch.Size(self._shape).numel()]:
            raise CheckpointError(f"{name} is no prefix in every layer of this model: bake it for this model")
        return int(shape[0])

    def read(self, name: str) -> Tensor:
        """A prompt's keys and values [P, L, 2, H, K]. Raises what ``length`` does."""
        self.length(name)
        with safe_open(self._file(name), "pt") as opened:
            prefix: Tensor = opened.get_tensor("prefix")
        return prefix.view(-1, *self._shape)

    def _file(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise CheckpointError(f"{name!r} is no adapter's name: use letters, digits, '_', '-', '.' and '@'")
        return self.folder / name / PROMPT_NAME


class HeldPrompts:
    """Prompts in a worker's memory; those asked for longest ago are forgotten.

    Args:
        prompts: where they are read from.
        heads: which of the H heads are the worker's own.
        dtype: of its keys and values.
        device: where it has them.
        bound: bytes to keep.
    """

    def __init__(self, prompts: Prompts, heads: slice, dtype: torch.dtype, device: torch.device, bound: int) -> None:
        self._prompts = prompts
        self._heads = heads
        self._dtype = dtype
        self._device = device
        self._bound = bound
        self._held: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, name: str) -> Tensor:
        """A prompt's keys and values [P, L, 2, H, K] of the worker's heads. Raises what ``Prompts.length`` does."""
        if name not in self._held:
            self._held[name] = self._prompts.read(name)[..., self._heads, :].to(self._device, self._dtype).contiguous()
        self._held.move_to_end(name)
        prompt = self._held[name]
        while len(self._held) > 1 and sum(held.nbytes for held in self._held.values()) > self._bound:
            self._held.popitem(last=False)
        return prompt
