"""PEFT's functions and class names beside ``PeftModel``."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softtune import checkpoint, compat
from softtune.errors import ConfigError
from softtune.methods import PeftConfig
from softtune.model import PeftModel, class_for
from softtune.options import LOADING_OPTIONS, check_options


def get_peft_model(
    model: PreTrainedModel, peft_config: PeftConfig, adapter_name: str = "default", **options: Any
) -> PeftModel:
    """Put a new adapter on a base model; see ``PeftModel``. The model's class is the task's.

    Args:
        model: the base model.
        peft_config: the adapter's config.
        adapter_name: the adapter's name.
        options: ``revision`` of the base model on the hub, for the adapter's config, and those of PEFT that have no
            effect here.

    Raises:
        ConfigError: an unknown option, or the config stands in the model's place.
    """
    if isinstance(model, PeftConfig):
        raise ConfigError("the base model comes first: get_peft_model(model, config)")
    if revision := check_options(options, ("revision",)).get("revision"):
        peft_config = copy.copy(peft_config)
        peft_config.revision = revision
    return class_for(peft_config)(model, peft_config, adapter_name)


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """A config of the class that ``config_dict["peft_type"]`` names.

    Raises:
        ConfigError: an unknown type or key, or a value out of range.
    """
    return PeftConfig.from_dict(config_dict)


def get_peft_model_state_dict(
    model: PeftModel, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default", **options: Any
) -> dict[str, Tensor]:
    """What inference needs of an adapter, by PEFT's names: the baked prompt or bias changes, and the heads.

    Args:
        model: holds the adapter.
        state_dict: take the numbers from this ``model.state_dict()`` instead of from the model.
        adapter_name: the adapter's name.
        options: those of PEFT that have no effect here.

    Raises:
        AdapterError: no such adapter.
        ConfigError: an unknown option.
    """
    check_options(options)
    with model.numbers_of(state_dict):
        state = checkpoint.export(model.adapter(adapter_name), model.backbone)
        return state if state_dict is None else {name: tensor.clone() for name, tensor in state.items()}


def set_peft_model_state_dict(
    model: PeftModel, peft_model_state_dict: dict[str, Tensor], adapter_name: str = "default", **options: Any
) -> None:
    """Put what ``get_peft_model_state_dict`` returned, here or in PEFT, into an adapter.

    Args:
        model: holds the adapter.
        peft_model_state_dict: its tensors.
        adapter_name: the adapter's name.
        options: those of PEFT that have no effect here.

    Raises:
        ConfigError: an unknown option.
        AdapterMismatchError: names or shapes do not fit.
        CheckpointError: the adapter trains through an encoder, which such a state lacks.
    """
    check_options(options)
    checkpoint.fill(model.adapter(adapter_name), peft_model_state_dict)


def load_peft_weights(model_id: str | os.PathLike[str], device: str | None = None, **options: Any) -> dict[str, Tensor]:
    """The tensors of a saved adapter, by PEFT's names.

    Args:
        model_id: the adapter's folder or hub repository.
        device: where to put them; the CPU by default.
        options: those of loading, see ``PeftModel.from_pretrained``.

    Raises:
        CheckpointError: the weights are missing or damaged, or they are pickled and that is not allowed.
        ConfigError: an unknown option.
    """
    found = checkpoint.weights(model_id, **check_options(options, LOADING_OPTIONS))
    return {name: tensor.to(device or "cpu") for name, tensor in found.items()}


def get_base_model_state_dict(model: PeftModel) -> dict[str, Tensor]:
    """The base model's ``state_dict``, by its own names."""
    return dict(model.get_base_model().state_dict())


def set_base_model_state_dict(model: PeftModel, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Put a ``state_dict`` into the base model; see ``torch.nn.Module.load_state_dict``."""
    return model.get_base_model().load_state_dict(state_dict, strict=strict)


def prepare_model_for_kbit_training(
    model: PreTrainedModel,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> PreTrainedModel:
    """Freeze a quantised base model, compute in fp32 what is not quantised, and let its layers run again in the
    backward pass.

    Soft prompts need none of it, since the base model is frozen anyway; it is for scripts that have the line.

    Args:
        model: the base model, which is changed.
        use_gradient_checkpointing: whether layers run again in the backward pass.
        gradient_checkpointing_kwargs: settings of torch's ``checkpoint``.
        auto_clear_cache: give memory that the casts left free back to the accelerator.
    """
    model.requires_grad_(False)
    quantised = getattr(model, "quantization_method", None)
    if quantised is None or str(getattr(quantised, "value", quantised)) == "bitsandbytes":
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter) is nn.Parameter:
                parameter.data = parameter.data.float()
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if quantised is not None and use_gradient_checkpointing:
        compat.enable_checkpointing(model, **(gradient_checkpointing_kwargs or {}))
    return model


def get_layer_status(model: PeftModel) -> Any:
    """Refused, see ``PeftModel.get_layer_status``."""
    return model.get_layer_status()


def get_model_status(model: PeftModel) -> Any:
    """Refused, see ``PeftModel.get_model_status``."""
    return model.get_model_status()


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Labels [B, T] as a decoder reads them: one token later, from the start token on, -100 as padding."""
    shifted = torch.cat([torch.full_like(input_ids[:, :1], decoder_start_token_id), input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)
