"""Pads examples to tensors, and groups rows of similar length into batches for evaluation.

Letters: B rows, T tokens of the longest row, P virtual tokens. Knows nothing of text,
tokenizers or models: a pad token's id is all it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softtune.data.encoding import IGNORED, Example
from softtune.errors import DataError


@dataclass(frozen=True)
class Collator:
    """Pads examples to one length and stacks them."""

    pad_token_id: int
    """Token id for padding; the attention mask hides it."""
    padding_side: str = "right"
    """"right" or "left": the side to pad on; generation needs "left"."""

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise DataError(f"padding_side is {self.padding_side!r}; use 'left' or 'right'")

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pad and stack ``examples`` (B of them).

        Returns:
            ``input_ids`` [B, T] and ``attention_mask`` [B, T]; ``labels`` [B, T], padded with -100, if any example has
            an answer (answers encoded apart: padded to the longest of them); ``start_positions`` and ``end_positions``
            [B], if the answers are spans; ``token_type_ids`` [B, T] and ``prompt_positions`` [B, P], if the examples
            have them; ``prefix_mask`` [B, P], if any example has one. Positions are counted in the padded row.

        Raises:
            DataError: there are no examples, or they have different numbers of virtual tokens.
        """
        if not examples:
            raise DataError("no examples to collate; give one or more")
        length = max(len(example.input_ids) for example in examples)
        batch = {
            "input_ids": self._stack([example.input_ids for example in examples], length, self.pad_token_id),
            "attention_mask": self._stack([[1] * len(example.input_ids) for example in examples], length, 0),
        }
        if any(example.token_type_ids is not None for example in examples):
            batch["token_type_ids"] = self._stack([example.token_type_ids or [] for example in examples], length, 0)
        if any(example.span is not None for example in examples):
            batch |= self._spans(examples, length)
        elif any(label != IGNORED for example in examples for label in example.labels):
            batch["labels"] = self._labels(examples, length)
        if any(example.prompt_positions is not None for example in examples):
            batch["prompt_positions"] = self._prompt_positions(examples, length)
        if masks := [example.prefix_mask for example in examples if example.prefix_mask is not None]:
            rows = [example.prefix_mask or [1] * len(masks[0]) for example in examples]
            batch["prefix_mask"] = torch.tensor(rows)
        return batch

    def _labels(self, examples: Sequence[Example], length: int) -> Tensor:
        """Labels [B, T] aligned with the tokens, or [B, longest answer] where answers are encoded apart."""
        labels = [example.labels for example in examples]
        if not any(example.is_apart for example in examples):
            return self._stack(labels, length, IGNORED)
        return replace(self, padding_side="right")._stack(labels, max(map(len, labels)), IGNORED)

    def _spans(self, examples: Sequence[Example], length: int) -> dict[str, Tensor]:
        """First and last tokens [B] of the answers, shifted by each row's left padding."""
        shifts = torch.tensor(self._shifts(examples, length))
        ends = torch.tensor([example.span for example in examples])
        return {"start_positions": ends[:, 0] + shifts, "end_positions": ends[:, 1] + shifts}

    def _shifts(self, examples: Sequence[Example], length: int) -> list[int]:
        """Number of padding tokens on the left of each row."""
        return [(length - len(example.input_ids)) * (self.padding_side == "left") for example in examples]

    def _stack(self, rows: list[list[int]], length: int, fill: int) -> Tensor:
        """Pad rows to [B, length]."""
        padding = [[fill] * (length - len(row)) for row in rows]
        if self.padding_side == "left":
            return torch.tensor([pad + row for pad, row in zip(padding, rows, strict=True)], dtype=torch.long)
        return torch.tensor([row + pad for pad, row in zip(padding, rows, strict=True)], dtype=torch.long)

    def _prompt_positions(self, examples: Sequence[Example], length: int) -> Tensor:
        """Positions [B, P] of virtual tokens, shifted by each row's left padding.

        Raises:
            DataError: examples have different numbers of virtual tokens.
        """
        rows = [example.prompt_positions or [] for example in examples]
        counts = sorted({len(row) for row in rows})
        if len(counts) > 1:
            raise DataError(f"examples of one batch have {counts} virtual tokens; encode them with one template")
        return torch.tensor(rows, dtype=torch.long) + torch.tensor(self._shifts(examples, length))[:, None]


def answer_width(labels: Tensor) -> int:
    """Number of columns at the rows' ends that hold all answers in ``labels`` [B, T], and the token before, which
    predicts the first of them."""
    first = int((labels != IGNORED).any(dim=0).int().argmax())
    return int(labels.shape[1]) - max(first - 1, 0)


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Split the indices of ``lengths``, shortest first, into batches of ``batch_size`` (the last may be smaller).

    Raises:
        DataError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; use 1 or more")
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
