"""What the tests of a device share: models on it, and their outputs beside the CPU's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softtune import PeftModel, get_peft_model
from tests.families import CAUSAL_LM, METHODS, base_model, batch, labels_for, scramble, texts


def pair(device: torch.device, family: str, task: str, method: str, **sizes: Any) -> tuple[PeftModel, PeftModel]:
    """The same model with the same random adapter on the device and on the CPU, in evaluation mode."""
    return adapted_on(device, family, task, method, **sizes), adapted_on(
        torch.device("cpu"), family, task, method, **sizes
    )


def adapted_on(device: torch.device, family: str, task: str, method: str, **sizes: Any) -> PeftModel:
    base = base_model(family, task, **sizes).to(device)
    return scramble(get_peft_model(base, METHODS[method](task_type=task))).eval()


def inputs_on(device: torch.device, family: str, task: str) -> dict[str, Tensor]:
    """A batch with labels, padded as decoders and encoders are."""
    inputs = batch(texts(family, task), "left" if task == CAUSAL_LM else "right")
    return {name: x.to(device) for name, x in {**inputs, "labels": labels_for(task, inputs)}.items()}


def output_on(device: torch.device, model: torch.nn.Module, family: str, task: str) -> Any:
    return model(**inputs_on(device, family, task))


def to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()
