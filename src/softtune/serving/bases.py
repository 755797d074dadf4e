"""The frozen base model, with a head for each task type that is served."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from softtune.backbone.quantization import plain_parts
from softtune.model import PeftModel
from softtune.peft_types import TaskType
from softtune.pretrained import DEFAULT_OPTIONS, LoadOptions, load_base_model, locate_base_model


class Bases:
    """Base models by task type, which share all tensors except their heads'.

    Args:
        name: the base model's name, see ``load_base_model``.
        options: how it is loaded.
    """

    def __init__(self, name: str, options: LoadOptions = DEFAULT_OPTIONS) -> None:
        self.name = name
        self.options = options
        self._models: dict[tuple[TaskType, int | None], PeftModel] = {}
        self._tensors: dict[str, list[Tensor]] = {}
        """The plain tensors of each parameter, by its name."""
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def model(self, task: TaskType, num_labels: int | None = None) -> PeftModel:
        """The base model with the head of a task type.

        Raises:
            ConfigError: the base model cannot be loaded for this task.
        """
        key = (task, num_labels)
        if key not in self._models:
            base, self._tokenizer = load_base_model(self.name, task, num_labels=num_labels, options=self.options)
            self._share(base)
            self._models[key] = PeftModel(base).eval()
        return self._models[key]

    @property
    def is_there(self) -> bool:
        """Whether the base model exists, whatever its tasks."""
        try:
            source = locate_base_model(self.name, revision=self.options.revision)
            AutoConfig.from_pretrained(source, **self.options.hub)
        except (OSError, ValueError):
            return False
        return True

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer, available once ``model`` has been called."""
        assert self._tokenizer is not None
        return self._tokenizer

    def _share(self, base: nn.Module) -> None:
        """Replace a new model's parameters by equal ones that are loaded already.

        Offloaded ones stay where they are.
        """
        for name, parameter in base.named_parameters():
            if parameter.is_meta:
                continue
            places = plain_parts(parameter)
            own = [getattr(tensor, part) for tensor, part in places]
            known = self._tensors.setdefault(name, own)
            if len(known) == len(own) and all(map(_is_same, known, own)):
                for (tensor, part), shared in zip(places, known, strict=True):
                    setattr(tensor, part, shared)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.shape == other.shape and torch.equal(one, other)
