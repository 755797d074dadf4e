"""Corrects ``generate``, which takes a decoder's virtual tokens among the words for words when it looks at a cache.

Letters: P virtual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor

from softtune.backbone import cached_length
from softtune.errors import UnsupportedModelError
from softtune.injection import Injection


@contextmanager
def generating(injection: Injection | None, options: Mapping[str, Any]) -> Iterator[None]:
    """Let ``generate`` count words alone, and leave the mask of a static cache to the model, for the length of the
    block.

    Args:
        injection: of the prompts that act; None where none does.
        options: of ``generate``.

    Raises:
        UnsupportedModelError: the text is read in parts, each of which would be taken for the whole.
    """
    if injection is None:
        yield
        return
    in_parts = options.get("prefill_chunk_size") or getattr(
        options.get("generation_config"), "prefill_chunk_size", None
    )
    if in_parts and not injection.is_prefix:
        raise UnsupportedModelError(
            "prefill_chunk_size is for decoders that take virtual tokens as a prefix in front of the text: leave it out"
        )
    model: Any = injection.backbone.model
    virtual = injection.num_among
    if not virtual or not injection.backbone.is_decoder_only:
        yield
        return
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
