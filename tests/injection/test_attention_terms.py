"""Terms added to attention's outputs, against sums over single heads and queries."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softtune.backbone.interface import Attention, MaskForm
from softtune.injection.attention_terms import Term, TermAttention
from softtune.methods.prompt import GatedKeyValue

B, Q, H, T, K, V, P = 3, 6, 2, 4, 5, 7, 3
SCALING = 0.3


def memory(heads: int, seed: int = 0) -> Tensor:
    return torch.randn(heads, K, V, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def gated(gates: int) -> GatedKeyValue:
    drawn = torch.Generator().manual_seed(7)
    made = [torch.randn(shape, generator=drawn) for shape in ((H, P, K), (H, P, V), (gates,))]
    return GatedKeyValue(*(x.requires_grad_() for x in made))


def slowly(term: Term, query: Tensor) -> Tensor:
    """[B, T, Q, V] one head, row and query at a time."""
    out = torch.zeros(len(query), query.shape[2], query.shape[1], V)
    for b, t, n in product(range(len(query)), range(query.shape[2]), range(query.shape[1])):
        q = query[b, n, t]
        if term.memory is not None:
            own = term.memory[n * len(term.memory) // Q]
            out[b, t, n] += torch.where(q > 0, q, q.exp() - 1) @ own
        if term.gated is not None:
            key, value, gate = term.gated
            weights = torch.softmax(torch.stack([q @ k * SCALING for k in key[n // (Q // H)]]), dim=0)
            out[b, t, n] += gate[n if len(gate) > 1 else 0] * (weights @ value[n // (Q // H)])
    return out


TERMS = [
    Term(memory=memory(Q)),
    Term(memory=memory(H)),
    Term(gated=gated(1)),
    Term(gated=gated(Q)),
    Term(memory=memory(Q), gated=gated(1)),
]


@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_the_sum_over_its_parts(term: Term) -> None:
    query = torch.randn(B, Q, T, K)
    ours, theirs = term(query, SCALING), slowly(term, query)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((x * weights).sum(), term.tensors) for x in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def attend(module: nn.Module, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return torch.ones(len(query), query.shape[2], query.shape[1], V), None


def run(wrapper: TermAttention, module: nn.Module, query: Tensor) -> Tensor:
    keys = torch.zeros(len(query), H, query.shape[2], K)
    return wrapper(Attention(attend, MaskForm.DENSE), module, query, keys, keys, None, scaling=SCALING)[0]


@pytest.mark.parametrize("packed", [False, True])
def test_each_row_gets_the_terms_of_its_adapter(packed: bool) -> None:
    module, other = nn.Identity(), nn.Identity()
    first, second = Term(memory=memory(Q, 1)), Term(memory=memory(Q, 2))
    rows = torch.tensor([1, 2, 0, 1])
    query = torch.randn(1, Q, 4, K) if packed else torch.randn(4, Q, T, K)
    wrapper = TermAttention(None, [{}, {module: first}, {module: second}], rows, packed=packed)
    output = run(wrapper, module, query)
    for number, row in enumerate(rows.tolist()):
        own = query[:, :, number : number + 1] if packed else query[number : number + 1]
        expected = 1 + (slowly((first, second)[row - 1], own) if row else 0 * slowly(first, own))
        found = output[:, number : number + 1] if packed else output[number : number + 1]
        torch.testing.assert_close(found, expected)
    assert wrapper.reached == {id(module)}
    assert torch.equal(run(wrapper, other, query), torch.ones_like(output))


def test_half_precision_keeps_the_dtype_of_attention() -> None:
    module = nn.Identity()
    wrapper = TermAttention(None, [{module: Term(memory=memory(Q))}], None)
    attention = Attention(lambda m, q, *a, **k: (attend(m, q)[0].bfloat16(), None), MaskForm.DENSE)
    query = torch.randn(B, Q, T, K).bfloat16()
    output, _ = wrapper(attention, module, query, query, query, None)
    assert output.dtype == torch.bfloat16
