"""A text in a model's context, as a prefix that is the keys and values of all its tokens.

Everything that is asked about one text shares it: it is read once, whatever the number of questions. Letters: T tokens,
W numbers of one token's keys and values over all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from softtune.methods import CartridgeConfig
from softtune.model import PeftModel
from softtune.peft_types import TaskType


def prefill_context(base: PreTrainedModel, input_ids: Sequence[int]) -> PeftModel:
    """Compute the keys and values of token ids [T], and return a model that goes on from them; the base model alone
    without any.

    Raises:
        UnsupportedModelError: the base model cannot take a prefix.
    """
    return PeftModel(base).eval() if not input_ids else _create_prefix(base, input_ids, frozen=len(input_ids)).eval()


def create_cartridge(base: PreTrainedModel, input_ids: Sequence[int]) -> PeftModel:
    """Create a model with a trained prefix that starts from the keys and values of token ids [P]; the first stays
    as it is.

    Raises:
        UnsupportedModelError: the base model cannot take a prefix.
    """
    return _create_prefix(base, input_ids, frozen=min(1, len(input_ids) - 1))


def kv_bytes(base: PreTrainedModel, num_tokens: int) -> int:
    """Bytes of the keys and values of so many tokens in the base model's dtype."""
    layers = PeftModel(base).backbone.attention_layers
    return num_tokens * sum(layer.width for layer in layers) * base.dtype.itemsize


def _create_prefix(base: PreTrainedModel, input_ids: Sequence[int], *, frozen: int) -> PeftModel:
    """Create a model whose prefix is the keys and values [T, W] of token ids [T], of which the first ``frozen`` are not
    trained."""
    config = CartridgeConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=len(input_ids),
        num_frozen_tokens=frozen,
        init_weights="zero",
    )
    model = PeftModel(base, config)
    module = model.adapter("default").module
    ids = torch.tensor(input_ids, device=model.device)
    with torch.no_grad():
        module.start_from(module.states_of_words(ids, model.backbone))
    return model
