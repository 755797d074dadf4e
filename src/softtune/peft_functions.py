"""PEFT's functions and class names beside ``PeftModel``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from softtune import checkpoint
from softtune.methods import PeftConfig
from softtune.model import PeftModel
from softtune.options import check_options


def get_peft_model(
    model: PreTrainedModel, peft_config: PeftConfig, adapter_name: str = "default", **options: Any
) -> PeftModel:
    """Put a new adapter on a base model; see ``PeftModel``.

    Args:
        model: the base model.
        peft_config: the adapter's config.
        adapter_name: the adapter's name.
        options: ``revision`` of the base model on the hub, for the adapter's config, and those of PEFT that have no
            effect here.

    Raises:
        ConfigError: an unknown option.
    """
    if revision := check_options(options, ("revision",)).get("revision"):
        peft_config = copy.copy(peft_config)
        peft_config.revision = revision
    return PeftModel(model, peft_config, adapter_name)


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


PeftModelForCausalLM = PeftModelForSeq2SeqLM = PeftModelForSequenceClassification = PeftModel
PeftModelForTokenClassification = PeftModelForQuestionAnswering = PeftModelForFeatureExtraction = PeftModel
