"""The rows of one call of a stack: where their text starts and ends, and how much of it is cached.

Letters: B rows, T tokens of this call, W columns of the whole attention mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softtune.backbone import cached_length
from softtune.injection.graphs import holds
from softtune.injection.layout import row_ends, row_starts

Call = dict[str, Any]
"""A stack's arguments by name."""
TEXT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
"""Arguments of every stack that have a column for each token."""
_OF_OTHERS = ("encoder_", "entity_")
"""How the names of arguments begin whose columns are another sequence's, which may have the same length by chance."""


def is_flat(mask: Any) -> bool:
    """Whether an attention mask is [B, W], rather than in a form that is ready for attention."""
    return isinstance(mask, Tensor) and mask.dim() == 2


def features_of(call: Call) -> list[str]:
    """Names of the arguments with more features of each token [B or 1, T, ...], such as its type or its box on a page.
    Virtual tokens get zeros there."""
    rows, length = _tokens(call).shape[:2]
    further = {name: x for name, x in call.items() if name not in TEXT and not name.startswith(_OF_OTHERS)}
    tensors = {name: x for name, x in further.items() if isinstance(x, Tensor) and x.dim() > 1}
    return [name for name, x in tensors.items() if x.shape[1] == length and len(x) in (rows, 1)]


def masks_of(call: Call) -> list[str]:
    """Names of the arguments [B, heads or 1, T, ...] that mask something else for each token, such as an image's
    patches."""
    rows, length = _tokens(call).shape[:2]
    others = {name: x for name, x in call.items() if isinstance(x, Tensor) and name not in TEXT and x.dim() == 4}
    return [name for name, x in others.items() if x.shape[2] == length and len(x) in (rows, 1)]


def _tokens(call: Call) -> Tensor:
    """[B, T] token ids or [B, T, D] embeddings."""
    tokens: Tensor = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    return tokens


class Step:
    """The rows of one call: their mask, and the columns where they start and end.

    Args:
        call: the stack's arguments.
        outer_mask: the mask of the model around the stack, used where the call's own is not [B, W].
    """

    def __init__(self, call: Call, outer_mask: Any = None) -> None:
        tokens = _tokens(call)
        mask = call.get("attention_mask")
        self.device = tokens.device
        self.rows, self.length = tokens.shape[:2]
        self.has_ready_mask = mask is not None and not is_flat(mask)
        mask = outer_mask if self.has_ready_mask else mask
        self.mask: Tensor | None = mask if is_flat(mask) else None
        self.cached, self.is_continued = cached_length(call)
        self.width = self.mask.shape[1] if self.mask is not None else self.cached + self.length
        self.starts = row_starts(self.mask, self.rows, self.device)

    @property
    def ends(self) -> Tensor:
        """[B] the column behind each row's last real token."""
        return row_ends(self.mask, self.rows, self.width, self.device)

    def full_mask(self) -> Tensor:
        """[B, W] the attention mask; ones where the call has none."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.rows, self.width, dtype=torch.long, device=self.device)

    def positions(self) -> Tensor:
        """[B, T] positions of this call's tokens, counted from each row's first real token."""
        columns = torch.arange(self.width, device=self.device)[-self.length :]
        return (columns - self.starts[:, None]).clamp(min=0)

    def has_restarts(self, positions: Tensor) -> bool:
        """Whether real tokens' positions [B, T] restart within a row, as those of packed texts do."""
        is_real = self.full_mask()[:, -self.length :] != 0
        highest = positions.where(is_real, -1).cummax(dim=1).values
        falls = is_real[:, 1:] & (positions[:, 1:] < highest[:, :-1])
        return holds(falls.any(), when_exporting=False)

    def is_from(self, columns: Tensor) -> Tensor:
        """[B, T] which tokens stand at or behind a column [B, 1]."""
        return torch.arange(self.length, device=self.device) >= columns
