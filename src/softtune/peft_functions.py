"""PEFT's functions that accompany ``PeftModel``. Internal: import from ``softtune``."""

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
    """Create a ``PeftModel`` with a new adapter on a base model, of the class for the config's task.

    Args:
        model: the base model.
        peft_config: the adapter's config.
        adapter_name: the adapter's name.
        options: ``revision`` of the base model on the hub, for the adapter's config, and those of PEFT that have no
            effect here.

    Raises:
        ConfigError: an option is unknown, or the config is passed in the model's place; see also ``PeftModel``.
        UnsupportedModelError: see ``PeftModel``.
    """
    if isinstance(model, PeftConfig):
        raise ConfigError("the base model comes first", "get_peft_model(model, config)")
    if revision := check_options(options, ("revision",)).get("revision"):
        peft_config = copy.copy(peft_config)
        peft_config.revision = revision
    return class_for(peft_config)(model, peft_config, adapter_name)


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """Create a config of the class that ``config_dict["peft_type"]`` names.

    Raises:
        ConfigError: the type or a key is unknown, or a value is out of range.
    """
    return PeftConfig.from_dict(config_dict)


def get_peft_model_state_dict(
    model: PeftModel, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default", **options: Any
) -> dict[str, Tensor]:
    """An adapter's tensors that inference needs, under PEFT's names: the prompt or bias changes, and the heads.

    Args:
        model: the model with the adapter.
        state_dict: take the tensors from this ``model.state_dict()`` instead of from the model.
        adapter_name: the adapter's name.
        options: PEFT's options that have no effect here.

    Raises:
        AdapterError: no such adapter.
        ConfigError: an option is unknown.
    """
    check_options(options)
    with model.numbers_of(state_dict):
        state = checkpoint.export(model.adapter(adapter_name), model.backbone)
        return state if state_dict is None else {name: tensor.clone() for name, tensor in state.items()}


def set_peft_model_state_dict(
    model: PeftModel, peft_model_state_dict: dict[str, Tensor], adapter_name: str = "default", **options: Any
) -> None:
    """Load the tensors that ``get_peft_model_state_dict`` returned, here or in PEFT, into an adapter.

    Args:
        model: the model with the adapter.
        peft_model_state_dict: the tensors.
        adapter_name: the adapter's name.
        options: PEFT's options that have no effect here.

    Raises:
        AdapterError: no such adapter.
        ConfigError: an option is unknown.
        AdapterMismatchError: names or shapes do not fit.
        CheckpointError: the adapter trains through an encoder, which such a state lacks.
    """
    check_options(options)
    checkpoint.fill(model.adapter(adapter_name), peft_model_state_dict)


def load_peft_weights(model_id: str | os.PathLike[str], device: str | None = None, **options: Any) -> dict[str, Tensor]:
    """Read the tensors of a saved adapter, under PEFT's names.

    Args:
        model_id: the adapter's folder or hub repository.
        device: the device of the tensors; by default the CPU.
        options: options of loading, see ``PeftModel.from_pretrained``.

    Raises:
        CheckpointError: the weights are missing or damaged, or they are pickled and that is not allowed.
        ConfigError: an option is unknown.
    """
    found = checkpoint.weights(model_id, **check_options(options, LOADING_OPTIONS))
    return {name: tensor.to(device or "cpu") for name, tensor in found.items()}


def get_base_model_state_dict(model: PeftModel) -> dict[str, Tensor]:
    """The base model's ``state_dict``, under its own names."""
    return dict(model.get_base_model().state_dict())


def set_base_model_state_dict(model: PeftModel, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Load a ``state_dict`` into the base model; see ``torch.nn.Module.load_state_dict``."""
    return model.get_base_model().load_state_dict(state_dict, strict=strict)


def prepare_model_for_kbit_training(
    model: PreTrainedModel,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> PreTrainedModel:
    """Freeze a base model, cast what is not quantised to fp32, and enable gradient checkpointing if it is quantised.

    Soft prompts need none of this, since the base model is frozen anyway; it is for scripts that call it.

    Args:
        model: the base model, which is changed.
        use_gradient_checkpointing: enable gradient checkpointing if the model is quantised.
        gradient_checkpointing_kwargs: arguments of torch's ``checkpoint``.
        auto_clear_cache: release the GPU memory that the casts freed.
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
    """Not supported, see ``PeftModel.get_layer_status``.

    Raises:
        TypeError: always.
    """
    return model.get_layer_status()


def get_model_status(model: PeftModel) -> Any:
    """Not supported, see ``PeftModel.get_model_status``.

    Raises:
        TypeError: always.
    """
    return model.get_model_status()


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Labels [B, T] as decoder inputs: shifted right by one behind the start token, with -100 replaced by padding."""
    shifted = torch.cat([torch.full_like(input_ids[:, :1], decoder_start_token_id), input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)
