"""Which virtual tokens of its prefix a row of a call sees: those that the caller shows, less those that dropout hides.

A hidden virtual token is no key of the row in any layer, so that the row gives it no gradient. Positions stay as they
are: the others keep theirs, and so does the text. Letters: R prompts, B rows, P virtual tokens of the longest prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softtune.backbone import Backbone
from softtune.errors import DataError, UnsupportedModelError
from softtune.injection.rows import multiplied
from softtune.methods.prompt import Prompt


class PrefixMask:
    """The virtual tokens that each row sees, the same in all layers and stacks of a call.

    Args:
        backbone: the base model.
        prompts: R of them, one for each adapter of the batch.
        rows: [B] index of each row's prompt; None where there is only one.
        given: [B, P] which virtual tokens a row sees, those of a shorter prefix in the last columns; None for all.

    Raises:
        DataError: ``given`` is for other prompts than prefixes, or another number of virtual tokens.
        UnsupportedModelError: virtual tokens are to be hidden, and the base model takes a prefix as a cache.
    """

    def __init__(
        self, backbone: Backbone, prompts: Sequence[Prompt], rows: Tensor | None, given: Tensor | None
    ) -> None:
        self._lengths = [prompt.prefix_length for prompt in prompts]
        self._dropout = [prompt.token_dropout if prompt.prefixes else 0.0 for prompt in prompts]
        self._rows = rows
        self._given = given
        self._drawn: Tensor | None = None
        """[B, P] which virtual tokens dropout has left in this call."""
        if given is not None:
            self._check_given(given, prompts)
        if self._hides and not backbone.takes_wrapper:
            raise UnsupportedModelError(
                f"{type(backbone.model).__name__} takes a prefix as a cache, of which every row sees all",
                "leave out prefix_mask and token_dropout",
            )

    @property
    def _hides(self) -> bool:
        return self._given is not None or any(self._dropout)

    def _check_given(self, given: Tensor, prompts: Sequence[Prompt]) -> None:
        """Check that the caller's mask fits the prompts.

        Raises:
            DataError: it does not.
        """
        if not any(self._lengths) or any(prompt.vectors is not None for prompt in prompts):
            raise DataError(
                "prefix_mask hides keys and values of prefixes, and an adapter of the batch has none, or has virtual "
                "tokens among the words",
                "leave it out",
            )
        if given.dim() != 2 or given.shape[1] != max(self._lengths):
            raise DataError(
                f"prefix_mask {list(given.shape)} does not fit", f"give {max(self._lengths)} numbers for each row"
            )

    def for_rows(self, count: int, device: torch.device) -> Tensor | None:
        """[B, P] which virtual tokens the rows of a stack's call see; None where all see all.

        Args:
            count: B, which beams multiply.
            device: the stack's.
        """
        if not self._hides:
            return None
        if self._drawn is None:
            self._drawn = self._draw(count, device)
        return multiplied(self._drawn, count).to(device)

    def _draw(self, count: int, device: torch.device) -> Tensor:
        """[B, P] the virtual tokens that the caller shows, without those that dropout hides: never all of a row's."""
        rows = torch.zeros(count, dtype=torch.long) if self._rows is None else multiplied(self._rows, count)
        rows, columns = rows.to(device), torch.arange(max(self._lengths), device=device)
        shown = columns >= len(columns) - torch.tensor(self._lengths, device=device)[rows, None]
        if self._given is not None:
            shown = shown & multiplied(self._given.to(device) != 0, count)
        if not any(self._dropout):
            return shown
        drawn = torch.rand(shown.shape, device=device)
        kept = drawn >= torch.tensor(self._dropout, device=device)[rows, None]
        highest = drawn.masked_fill(~shown, -1).argmax(dim=1, keepdim=True)
        return shown & kept.scatter(1, highest, True)

    def kinds(self, count: int, device: torch.device) -> Tensor | None:
        """[B] a number for each row, which rows of one adapter that see the same virtual tokens share; None where all
        rows do."""
        shown = self.for_rows(count, device)
        if shown is None:
            return self._rows
        kinds: Tensor = shown.unique(dim=0, return_inverse=True)[1]
        return kinds if self._rows is None else kinds * len(self._lengths) + multiplied(self._rows, count).to(device)
