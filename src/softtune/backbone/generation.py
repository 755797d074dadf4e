"""Corrects ``generate``, which counts virtual tokens at a decoder's input as text tokens when it reads a cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor

from softtune.backbone.stack import cached_length


@contextmanager
def counting_words(model: Any, virtual: int) -> Iterator[None]:
    """Make ``generate`` count text tokens only and leave the mask of a static cache to the model, in the block.

    Args:
        model: the base model, a decoder.
        virtual: number of virtual tokens in its cache, among those of the text.
    """
    stock = model.prepare_inputs_for_generation

    @wraps(stock)
    def prepare(input_ids: Tensor, next_sequence_length: int | None = None, **options: Any) -> Any:
        if next_sequence_length is not None and options.get("is_first_iteration") and cached_length(options)[1]:
            next_sequence_length += virtual
        inputs = stock(input_ids, next_sequence_length=next_sequence_length, **options)
        if inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = options["attention_mask"]
        return inputs

    model.prepare_inputs_for_generation = prepare
    try:
        yield
    finally:
        del model.prepare_inputs_for_generation
