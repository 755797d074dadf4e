"""Spares a frozen language head the tokens that change nothing, on a CPU.

A head computes V logits of a token, more than all layers do of theirs in a small model. Hidden states of padding are
zeros, and so are a loss's gradients of the logits of tokens without a label: their rows take no part in the products.
The loss of labels is that of the base model, of the logits of labelled tokens alone.

Letters: B rows, T tokens, M of them in all rows, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from softtune import compat
from softtune.backbone.prepacked_weights import PrepackedLinear, is_frozen_linear
from softtune.methods.prompt import IGNORED


@contextmanager
def sparse_logits(model: PreTrainedModel) -> Iterator[None]:
    """Spare a model's head within the block, in training, if the head is a plain product. Evaluation has all of it."""
    head = model.get_output_embeddings()
    plain = vars(head).get("forward") if head is not None else None
    if not model.training or not is_frozen_linear(head) or not isinstance(plain, PrepackedLinear | None):
        yield
        return
    head.forward = partial(_logits, head, plain)  # type: ignore[method-assign]
    try:
        with compat.causal_loss(model, _sparse_loss):
            yield
    finally:
        if plain is None:
            del head.forward
        else:
            head.forward = plain  # type: ignore[assignment, method-assign]


def _logits(head: nn.Linear, plain: PrepackedLinear | None, states: Tensor) -> Tensor:
    """[..., V] the head's output for hidden states [..., D]; ``plain`` is its forward, if not its class's."""
    is_whole = (
        torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or states.dtype is not head.weight.dtype
    )
    if is_whole or not states.requires_grad:
        return nn.Linear.forward(head, states) if plain is None else plain(states)
    output: Tensor = _SparseProduct.apply(states.flatten(0, -2), head.weight)  # type: ignore[no-untyped-call]
    output = output if head.bias is None else output + head.bias
    return output.view(*states.shape[:-1], -1)


class _SparseProduct(torch.autograd.Function):
    """x · Wᵀ of states [M, D] and weights [V, D], by the rows that are not zeros, and its gradient likewise."""

    @staticmethod
    def forward(states: Tensor, weight: Tensor) -> Tensor:
        return _by_rows(states, weight.t())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return _by_rows(gradient, weight), None


def _by_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """[M, N] the product of rows [M, K] and weights [K, N]."""
    is_zero = ~rows.any(dim=-1)
    if not bool(is_zero.any()):
        return rows @ weight
    places = (~is_zero).nonzero().flatten()
    return rows.new_zeros(len(rows), weight.shape[1]).index_copy_(0, places, rows.index_select(0, places) @ weight)


def _sparse_loss(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same loss of a causal language model, of the logits of labelled tokens alone."""

    def sparse_loss(
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        given = {
            "vocab_size": vocab_size,
            "num_items_in_batch": num_items_in_batch,
            "ignore_index": ignore_index,
            **kwargs,
        }
        following = shift_labels
        if following is None and labels is not None:
            following = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if following is None or following.numel() * vocab_size != logits.numel():
            return loss(logits, labels=labels, shift_labels=shift_labels, **given)
        following = following.flatten().to(logits.device)
        places = (following != ignore_index).nonzero().flatten()
        chosen = logits.reshape(-1, vocab_size).index_select(0, places)
        return loss(chosen, labels=None, shift_labels=following.index_select(0, places), **given)

    return sparse_loss
