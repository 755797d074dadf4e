"""DeBERTa's disentangled attention, reimplemented to call an attention wrapper, since it has no attention interface.

Scores are sums of content to content, content to position and position to content (He et al., DeBERTa, arXiv
2006.03654, section 3.1). Here the last two are a bias of the scores, as in T5. Virtual tokens have no position and get
no bias. Letters: B rows, H heads, T tokens, S keys, K the size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from softtune.backbone.checkpointing import around_runs
from softtune.backbone.interface import Attention, AttentionWrapper, MaskForm
from softtune.compat import is_disentangled


@contextmanager
def wrap_disentangled_attention(stack: nn.Module, wrapper: AttentionWrapper) -> Iterator[None]:
    """Make a stack's attention call ``wrapper`` for the length of the block, and whenever a checkpointed layer that was
    called in it is recomputed."""
    masks: dict[int, tuple[Tensor, Tensor]] = {}
    wrapped = partial(_wrapped, wrapper, masks)
    with wrapped(stack), around_runs(stack, wrapped):
        yield


@contextmanager
def _wrapped(wrapper: AttentionWrapper, masks: dict[int, tuple[Tensor, Tensor]], part: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for module in filter(is_disentangled, part.modules()):
            stack.callback(_restore, module, vars(module).get("forward"))
            vars(module)["forward"] = partial(_forward, module, wrapper, masks)
        yield


def _restore(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del vars(module)["forward"]
    else:
        vars(module)["forward"] = forward


def _forward(
    module: Any,
    wrapper: AttentionWrapper,
    masks: dict[int, tuple[Tensor, Tensor]],
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the outputs of a DeBERTa attention module's ``forward`` through ``wrapper``.

    ``masks`` keeps one boolean tensor for all layers that share a mask, so that a wrapper can recognize the mask.
    """
    assert query_states is None  # no DeBERTa of transformers gives any
    _, mask = masks.setdefault(id(attention_mask), (attention_mask, attention_mask.bool()))
    embeddings = module.pos_dropout(rel_embeddings) if module.relative_attention else None
    project = _project_fused if hasattr(module, "in_proj") else _project
    query, key, value, bias = project(module, hidden_states, relative_pos, embeddings if module.pos_att_type else None)
    attend = Attention(_attend, MaskForm.DENSE)
    output, weights = wrapper(attend, module, query, key, value, mask, position_bias=bias, scaling=1.0)
    return output.flatten(2), weights if output_attentions else None


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, position_bias: Tensor | None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Compute attention outputs [B, T, H, K] of scaled queries, and attention weights [B, H, T, S]."""
    scores = query @ key.transpose(-1, -2)
    scores = scores if position_bias is None else scores + position_bias
    weights = module.dropout(scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1))
    return (weights @ value).transpose(1, 2), weights


Projections = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Scaled queries, keys and values [B, H, T, K], and the position bias [B, H, T, T] if there are relative embeddings."""


def _project(module: Any, states: Tensor, relative_pos: Tensor | None, embeddings: Tensor | None) -> Projections:
    """Project with the modules of DeBERTa-v2 and v3, which merge batch and heads into B·H rows."""
    heads = module.num_attention_heads
    linears = (module.query_proj, module.key_proj, module.value_proj)
    query, key, value = (module.transpose_for_scores(linear(states), heads) for linear in linears)
    factor = 1 + ("c2p" in module.pos_att_type) + ("p2c" in module.pos_att_type)
    bias = None
    if embeddings is not None:
        bias = module.disentangled_attention_bias(query, key, relative_pos, embeddings, factor).unflatten(
            0, (-1, heads)
        )
    query, key, value = (x.unflatten(0, (-1, heads)) for x in (query, key, value))
    return query / (query.shape[-1] * factor) ** 0.5, key, value, bias


def _project_fused(module: Any, states: Tensor, relative_pos: Tensor | None, embeddings: Tensor | None) -> Projections:
    """Project with the first DeBERTa's one fused module, which keeps the biases of queries and values apart."""
    query, key, value = module.transpose_for_scores(module.in_proj(states)).chunk(3, dim=-1)
    query = query + module.transpose_for_scores(module.q_bias[None, None, :])
    factor = 1 + len(module.pos_att_type)
    query = query / (query.shape[-1] * factor) ** 0.5
    value = value + module.transpose_for_scores(module.v_bias[None, None, :])
    bias = None
    if embeddings is not None:
        bias = module.disentangled_att_bias(query, key, relative_pos, embeddings, factor)
    return query, key, value, bias
