"""Where a batch's tokens and virtual tokens stand in the sequence that the layers see.

Pure index arithmetic. Letters: B rows, T tokens of the caller, P virtual tokens, S = T + P slots. A *column* is a place
in the caller's rows, a *slot* one in the layers' sequence. Virtual tokens stand next to the text, never beyond its
padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The slots of a batch's tokens and virtual tokens. Build it with ``Layout.from_columns``."""

    token_slots: Tensor
    """[B, T] slot of each of the caller's tokens."""
    virtual_slots: Tensor
    """[B, P] slot of each virtual token."""
    output_slots: Tensor
    """[B, T] slot whose output stands for each of the caller's tokens. In a causal model that is the slot before the
    next token, so that a token behind virtual tokens is predicted from the last of them."""
    columns: Tensor
    """[B, P] the caller's column before which each virtual token stands."""
    is_real: Tensor
    """[B, P] which virtual tokens are not padding."""

    @classmethod
    def from_columns(cls, starts: Tensor, length: int, columns: Tensor, is_real: Tensor, *, causal: bool) -> Layout:
        """Compute the layout of a batch.

        Args:
            starts: [B] the column of each row's first real token.
            length: T.
            columns: [B, P], ascending; the column before which each virtual token stands, T at the end.
            is_real: [B, P] which virtual tokens are not padding. Padding comes first in a causal model, where it stands
                before everything, and last in a bidirectional one, where it stands behind everything.
            causal: whether rows stay where the caller has them. A bidirectional encoder's rows move to the left, since
                its pooler and its position table count from the first slot.
        """
        shift = torch.zeros_like(starts) if causal else starts
        places = (torch.arange(length, device=starts.device) - shift[:, None]) % length
        moved = (columns - shift[:, None]).masked_fill(~is_real, 0 if causal else length)

        def slots(place: Tensor) -> Tensor:
            return place + (moved[:, None, :] <= place[:, :, None]).sum(-1)

        token_slots = slots(places)
        virtual_slots = moved + torch.arange(columns.shape[1], device=starts.device)
        output_slots = slots(places + 1) - 1 if causal else token_slots
        return cls(token_slots, virtual_slots, output_slots, columns, is_real)

    def merge(self, tokens: Tensor, virtual: Tensor) -> Tensor:
        """[B, S, ...] tokens [B, T, ...] and virtual tokens [B, P, ...] in their slots."""
        slots = torch.cat([self.token_slots, self.virtual_slots], dim=1)
        return _pick(torch.cat([tokens, virtual.to(tokens.dtype)], dim=1), slots.argsort(dim=1))

    def merge_positions(self, positions: Tensor) -> Tensor:
        """[B, S] positions of all slots, from the tokens' positions [B, T], which do not count virtual tokens."""
        order = (self.is_real.cumsum(1) - 1).clamp(min=0)
        tokens = torch.arange(positions.shape[1], device=positions.device)
        before = ((self.columns[:, None, :] <= tokens[:, None]) & self.is_real[:, None, :]).sum(-1)
        following = torch.cat([positions, positions[:, -1:] + 1], dim=1).gather(1, self.columns)
        return self.merge(positions + before, following + order)

    def align(self, states: Tensor) -> Tensor:
        """[B, T, ...] outputs for the caller's tokens, from the layers' outputs [B, S, ...]."""
        return _pick(states, self.output_slots)

    def align_attention(self, weights: Tensor) -> Tensor:
        """Attention weights [B, H, T, T] of the caller's tokens, from [B, H, S, S]."""
        rows = self.output_slots[:, None, :, None].expand(-1, weights.shape[1], -1, weights.shape[3])
        return self.align_keys(weights.gather(2, rows))

    def align_keys(self, weights: Tensor) -> Tensor:
        """Attention weights [B, H, Q, T] over the caller's tokens, from [B, H, Q, S]."""
        keys = self.token_slots[:, None, None, :].expand(-1, *weights.shape[1:3], -1)
        return weights.gather(3, keys)


def row_starts(mask: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """[B] the column of each row's first real token, by its attention mask [B, T]; 0 without a mask."""
    if mask is None:
        return torch.zeros(rows, dtype=torch.long, device=device)
    return (mask != 0).int().argmax(dim=1)


def row_ends(mask: Tensor | None, rows: int, length: int, device: torch.device) -> Tensor:
    """[B] the column behind each row's last real token; T without a mask."""
    if mask is None:
        return torch.full((rows,), length, dtype=torch.long, device=device)
    return length - (mask != 0).flip(1).int().argmax(dim=1)


def is_contiguous(mask: Tensor) -> bool:
    """Whether each row's real tokens are contiguous, by the attention mask [B, T]."""
    rows, length = mask.shape
    tokens = row_ends(mask, rows, length, mask.device) - row_starts(mask, rows, mask.device)
    return bool((tokens == (mask != 0).sum(dim=1)).all())


def _pick(x: Tensor, slots: Tensor) -> Tensor:
    """[B, N, ...] gathered from [B, S, ...] by slots [B, N]."""
    index = slots.reshape(*slots.shape, *[1] * (x.dim() - 2)).expand(*slots.shape, *x.shape[2:])
    return x.gather(1, index)
