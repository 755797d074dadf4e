"""The divergence from a teacher's most likely tokens, against the whole distributions and a slow sum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from softtune.distillation.loss import top_k_divergence

N, V = 5, 11


@pytest.fixture
def teacher() -> Tensor:
    return (3 * torch.randn(N, V)).log_softmax(-1)


@pytest.fixture
def logits() -> Tensor:
    return (2 * torch.randn(N, V)).requires_grad_()


def top(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = teacher.topk(k, dim=-1)
    return found.indices, found.values


def slowly(logits: Tensor, teacher: Tensor, k: int) -> list[float]:
    """Both distributions over the k tokens and one for all others, row by row, in Python's numbers."""
    sums = []
    for own, p in zip(logits.detach().double().softmax(-1), teacher.double().exp(), strict=True):
        best = sorted(range(V), key=lambda i: -float(p[i]))[:k]
        others = [i for i in range(V) if i not in best]
        pairs = [(float(p[i]), float(own[i])) for i in best]
        pairs += [(sum(float(p[i]) for i in others), sum(float(own[i]) for i in others))] if others else []
        sums.append(sum(a * math.log(a / b) for a, b in pairs))
    return sums


def test_all_tokens_give_the_whole_divergence_and_its_gradient(teacher: Tensor, logits: Tensor) -> None:
    loss = top_k_divergence(logits, *top(teacher, V)).mean()
    [gradient] = torch.autograd.grad(loss, logits)
    exact = kl_div(logits.log_softmax(-1), teacher, reduction="batchmean", log_target=True)
    [expected] = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("k", [1, 4, V - 1, V])
def test_other_tokens_are_one(k: int, teacher: Tensor, logits: Tensor) -> None:
    found = top_k_divergence(logits, *top(teacher, k))
    assert found.tolist() == pytest.approx(slowly(logits, teacher, k), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("k", [1, 4, V - 1])
def test_gradients_are_those_of_the_coarser_distributions(k: int, teacher: Tensor, logits: Tensor) -> None:
    """Where p is the teacher and q the student, the gradient is q - p, with what the others have in common."""
    ids, values = top(teacher, k)
    [gradient] = torch.autograd.grad(top_k_divergence(logits, ids, values).sum(), logits)
    q = logits.detach().softmax(-1)
    is_kept = torch.zeros(N, V, dtype=torch.bool).scatter(-1, ids, True)
    rest = 1 - values.exp().sum(-1, keepdim=True)
    target = torch.where(is_kept, teacher.exp(), rest * q / q.masked_fill(is_kept, 0).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, q - target, atol=1e-5, rtol=1e-4)


def test_never_more_than_the_whole_and_never_negative(teacher: Tensor, logits: Tensor) -> None:
    by_k = torch.stack([top_k_divergence(logits, *top(teacher, k)).detach() for k in range(1, V + 1)])
    assert (by_k >= 0).all()
    assert (by_k[1:] >= by_k[:-1] - 1e-6).all()


@pytest.mark.parametrize("k", [1, 4, V])
def test_zero_where_both_agree(k: int, teacher: Tensor) -> None:
    same = (teacher + 3.0).requires_grad_()  # logits have no scale of their own
    loss = top_k_divergence(same, *top(teacher, k)).sum()
    [gradient] = torch.autograd.grad(loss, same)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert gradient.abs().max() < 1e-5


def test_a_certain_teacher_gives_numbers(logits: Tensor) -> None:
    certain = torch.full((N, V), -1e4)
    certain[:, 2] = 0.0
    for k in (1, 3, V):
        loss = top_k_divergence(logits, *top(certain, k)).sum()
        [gradient] = torch.autograd.grad(loss, logits)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(loss, -logits.log_softmax(-1)[:, 2].sum())
