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
from softtune.backbone.packed_weights import PackedLinear
from softtune.methods.prompt import IGNORED


@contextmanager
def sparse_logits(model: PreTrainedModel) -> Iterator[None]:
    """Spare a model's head within the block, in training, if the head is a plain product. Evaluation has all of it."""
    head = model.get_output_embeddings()
    is_left = not model.training or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    if is_left or not _is_plain(head):
        yield
        return
    assert isinstance(head, nn.Linear)
    packed = vars(head).get("forward")
    head.forward = partial(_logits, head)  # type: ignore[method-assign]
    try:
        with compat.causal_loss(model, _of_labels):
            yield
    finally:
        if packed is None:
            del head.forward
        else:
            head.forward = packed  # type: ignore[method-assign]


def _is_plain(head: nn.Module | None) -> bool:
    """Whether a head is a product with frozen weights on the CPU, which nothing but ``packed_weights`` has changed."""
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return False
    if not isinstance(vars(head).get("forward"), PackedLinear | None):
        return False
    return head.weight.device.type == "cpu" and not any(p.requires_grad for p in head.parameters())


def _logits(head: nn.Linear, states: Tensor) -> Tensor:
    """[..., V] the head's output for hidden states [..., D]."""
    if not states.requires_grad:
        return F.linear(states, head.weight, head.bias)
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


def _of_labels(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same loss of a causal language model, of the logits of labelled tokens alone."""

    def of_labels(
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if shift_labels is None:
            assert labels is not None
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        following = shift_labels.flatten()
        places = (following != ignore_index).nonzero().flatten().to(logits.device)
        return loss(
            logits.view(-1, vocab_size).index_select(0, places),
            labels=None,
            vocab_size=vocab_size,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
            shift_labels=following.index_select(0, places.to(following.device)),
            **kwargs,
        )

    return of_labels
