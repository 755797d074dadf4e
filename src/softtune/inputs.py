"""The inputs of a model call, checked for consistency. Knows nothing about adapters.

Letters: B rows, T tokens, D embedding size, P virtual tokens, W columns of the attention mask.

Internal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from softtune import compat
from softtune.backbone import Backbone
from softtune.errors import DataError
from softtune.injection.step import is_flat

_TEXTS = ("inputs_embeds", "input_ids", "inputs")
"""Argument names of the text in ``forward`` and ``generate``, in order of precedence."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of one call."""

    text: Tensor | None = None
    """[B, T] token ids or [B, T, D] embeddings; None if the call has neither."""
    mask: Tensor | None = None
    """[B, W] attention mask; None if there is none, or one of another form."""
    labels: Tensor | None = None
    """As the base model takes them."""
    columns: Tensor | None = None
    """[B, P] column before which each virtual token is inserted."""
    prefix_mask: Tensor | None = None
    """[B, P] which virtual tokens of its prefix a row sees."""
    has_cache: bool = False
    """Whether the call has a KV cache, so that the mask may have columns of earlier calls."""
    encoder_outputs: Any = None
    """The encoder's outputs in an encoder-decoder, if the caller passes them."""

    @classmethod
    def from_call(
        cls, call: Mapping[str, Any], columns: Tensor | None, backbone: Backbone, prefix_mask: Tensor | None = None
    ) -> Inputs:
        """Take the inputs from a call's arguments by name, and check them.

        Raises:
            DataError: the text is empty, no tensor or has no rows; the masks, the columns or the labels do not fit it.
        """
        mask = call.get("attention_mask")
        inputs = cls(
            text=next((call[name] for name in _TEXTS if call.get(name) is not None), None),
            mask=mask if is_flat(mask) else None,
            labels=call.get("labels"),
            columns=columns,
            prefix_mask=prefix_mask,
            has_cache=compat.cache_of(call) is not None,
            encoder_outputs=call.get("encoder_outputs"),
        )
        if inputs.text is not None:
            _check_text(inputs.text)
            _check_mask(inputs, inputs.text)
            _check_labels(inputs.labels, inputs.text, backbone)
            _check_rows("prompt_positions", columns, inputs.text)
            _check_rows("prefix_mask", prefix_mask, inputs.text)
        return inputs


def _check_text(text: Any) -> None:
    if not isinstance(text, Tensor):
        raise DataError(
            f"the input is a {type(text).__name__} and no tensor",
            "unpack what a tokenizer returns, as in generate(**tokenizer(text, return_tensors='pt'))",
        )
    if text.dim() < (3 if text.is_floating_point() else 2):
        raise DataError(f"the input {list(text.shape)} has no rows", "give ids [B, T] or vectors [B, T, D]")
    if not text.numel():
        raise DataError(f"the input {list(text.shape)} has no tokens", "leave out empty batches")


def _check_mask(inputs: Inputs, text: Tensor) -> None:
    if inputs.mask is None:
        return
    (rows, width), length = inputs.mask.shape, text.shape[1]
    if rows != len(text) or width < length or (width > length and not inputs.has_cache):
        raise DataError(
            f"attention_mask {[rows, width]} does not fit the input {list(text.shape[:2])}",
            "give one number for each token, cached ones too",
        )


def _check_labels(labels: Tensor | None, text: Tensor, backbone: Backbone) -> None:
    if labels is None:
        return
    per_token = labels.dim() == 2 and not (backbone.labels_whole_texts or backbone.is_encoder_decoder)
    if per_token and labels.shape != text.shape[:2]:
        raise DataError(
            f"labels {list(labels.shape)} do not fit the input {list(text.shape[:2])}",
            "give one for each token, virtual tokens need none",
        )
    if len(labels) != len(text):
        raise DataError(f"labels {list(labels.shape)} do not fit {len(text)} rows", "give labels for each")


def _check_rows(name: str, given: Tensor | None, text: Tensor) -> None:
    if given is not None and given.shape[:1] != text.shape[:1]:
        raise DataError(f"{name} {list(given.shape)} do not fit {len(text)} rows", "give one row for each")
