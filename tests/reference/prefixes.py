"""Prefixes, in two ways: as a ready cache of the model's own, and through an attention function made of loops. The
second way also adds terms to the outputs of single heads."""
# ruff: noqa: F722

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import eager_mask

from softtune.compat import renamed

checked = jaxtyped(typechecker=beartype)

Pairs = list[tuple[Tensor, Tensor]]
"""Each layer's key and value [H, P, K]."""


@checked
def split(flat: Float[Tensor, "P W"], sizes: list[tuple[int, int, int]]) -> Pairs:
    """Cut a flat prefix into layers of (heads, key size, value size): a layer's key, then its value, head after
    head."""
    pairs, column = [], 0
    for heads, key_size, value_size in sizes:
        both = []
        for size in (key_size, value_size):
            rows = [flat[:, column + h * size : column + (h + 1) * size] for h in range(heads)]
            both.append(torch.stack(rows))
            column += heads * size
        pairs.append((both[0], both[1]))
    assert column == flat.shape[1]
    return pairs


@checked
def causal_by_cache(
    model: PreTrainedModel, ids: Int[Tensor, " T"], pairs: dict[int, tuple[Tensor, Tensor]], has_ids: bool
) -> Float[Tensor, "T V"]:
    """Logits [T, V] with each layer's prefix as past keys and values; the text starts at position P, where the model
    has positions. A model with other layers beside attention needs a cache that knows of them."""
    cache = DynamicCache() if len(pairs) == model.config.num_hidden_layers else DynamicCache(config=model.config)
    for layer, (key, value) in pairs.items():
        cache.update(key[None], value[None], layer)
    length = next(iter(pairs.values()))[0].shape[1]
    positions = {"position_ids": torch.arange(length, length + len(ids))[None]} if has_ids else {}
    mask = torch.ones(1, length + len(ids), dtype=torch.long)
    call = {"input_ids": ids[None], "attention_mask": mask, "cache": cache, **positions}
    return model(**renamed(call, model.forward)).logits[0]


_prefixes: dict[nn.Module, tuple[Tensor, Tensor]] = {}
_terms: dict[nn.Module, Callable[[int, Tensor], Tensor]] = {}
"""What is added to a head's output [V], by its number and a query [K] as the attention function gets it."""
_hidden_before: dict[nn.Module, int] = {}
_open_slots: set[int] = set()


def _naive(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention one head and one query at a time, of a batch of one row. Gemma 2 caps its scores, and GPT-OSS has a
    sink beside the keys, which takes a share of the weights and has no value."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    group = query.shape[1] // key.shape[1]
    prefix_key, prefix_value = _prefixes.get(module, (key[0, :, :0], value[0, :, :0]))
    length = prefix_key.shape[1]
    heads = []
    for n in range(query.shape[1]):
        keys = torch.cat([prefix_key[n // group], key[0, n // group]])
        values = torch.cat([prefix_value[n // group], value[0, n // group]])
        rows = []
        for t in range(query.shape[2]):
            scores = keys @ query[0, n, t] * scaling
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if position_bias is not None:
                scores = scores + torch.cat([_prefix_bias(module, t, length, n), position_bias[0, n, t]])
            if attention_mask is not None:
                row = attention_mask[0, min(n, attention_mask.shape[1] - 1), min(t, attention_mask.shape[2] - 1)]
                sees = range(t + 1 if getattr(module, "is_causal", False) else len(row))
                row = torch.tensor([0.0 if s in _open_slots and s in sees else float(x) for s, x in enumerate(row)])
                scores = scores + torch.cat([torch.zeros(length), row])
            if t < _hidden_before.get(module, 0):
                scores = torch.cat([torch.full((length,), float("-inf")), scores[length:]])
            if s_aux is not None:
                scores = torch.cat([scores, s_aux[n : n + 1]])
            added = _terms[module](n, query[0, n, t]) if module in _terms else 0
            rows.append(torch.softmax(scores, dim=0)[: len(values)] @ values + added)
        heads.append(torch.stack(rows))
    return torch.stack(heads, dim=1)[None], None


def _prefix_bias(module: nn.Module, t: int, length: int, head: int) -> Tensor:
    """[P] T5's relative bias of query t for P tokens right before position 0."""
    owner = _bias_owners.get(module)
    if owner is None:
        return torch.zeros(length)
    return owner.compute_bias(1, length, past_seen_tokens=length + t)[0, head, 0]


_bias_owners: dict[nn.Module, nn.Module] = {}


def _naive_disentangled(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    *_: Any,
    relative_pos: Tensor,
    rel_embeddings: Tensor,
    **__: Any,
) -> tuple[Tensor, None]:
    """DeBERTa's attention one head and one query at a time, of a batch of one row, with c2p and p2c: He et al.,
    equation 4, where words and virtual tokens have no distance to one another."""
    count, is_fused = module.num_attention_heads, hasattr(module, "in_proj")

    def by_head(flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (count, -1)).transpose(0, 1)

    if is_fused:
        query, key, value = by_head(module.in_proj(hidden_states[0])).chunk(3, dim=-1)
        query, value = query + by_head(module.q_bias[None]), value + by_head(module.v_bias[None])
        far, to_keys, to_queries = module.max_relative_positions, module.pos_proj, module.pos_q_proj
    else:
        query, key, value = (
            by_head(f(hidden_states[0])) for f in (module.query_proj, module.key_proj, module.value_proj)
        )
        far, to_keys, to_queries = module.pos_ebd_size, module.key_proj, module.query_proj  # share_att_key
    keys_of_distance, queries_of_distance = by_head(to_keys(rel_embeddings)), by_head(to_queries(rel_embeddings))
    prefix_key, prefix_value = _prefixes.get(module, (key[:, :0], value[:, :0]))
    heads = []
    for n in range(count):
        rows = []
        for t in range(len(query[n])):
            scores = [query[n, t] @ k for k in prefix_key[n]]
            for s in range(len(key[n])):
                to, back = far + int(relative_pos[0, t, s]), far - int(relative_pos[0, s, t])
                score = query[n, t] @ key[n, s] + query[n, t] @ keys_of_distance[n, to]
                score = score + key[n, s] @ queries_of_distance[n, back]
                scores.append(score if attention_mask[0, 0, t, s] else score - float("inf"))
            weights = torch.softmax(torch.stack(scores) / (3 * query.shape[-1]) ** 0.5, dim=0)
            added = _terms[module](n, query[n, t] / (3 * query.shape[-1]) ** 0.5) if module in _terms else 0
            rows.append(weights @ torch.cat([prefix_value[n], value[n]]) + added)
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=-1)[None], None


AttentionInterface.register("naive", _naive)
AttentionMaskInterface.register("naive", eager_mask)


@contextmanager
def naive_prefixes(
    model: PreTrainedModel,
    prefixes: dict[str, tuple[Tensor, Tensor]],
    hidden_before: int = 0,
    open_slots: tuple[int, ...] = (),
    terms: dict[str, Callable[[int, Tensor], Tensor]] | None = None,
) -> Iterator[PreTrainedModel]:
    """The model with a prefix before each named module's keys, which queries before ``hidden_before`` do not see, with
    slots that windows end for no query, and with terms that are added to the heads' outputs."""
    _terms.update({model.base_model.get_submodule(name): term for name, term in (terms or {}).items()})
    _open_slots.update(open_slots)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "naive"
    own = [m for m in model.modules() if type(m).__name__ == "DisentangledSelfAttention"]
    for module in own:
        vars(module)["forward"] = partial(_naive_disentangled, module)
    modules = {model.base_model.get_submodule(name): pair for name, pair in prefixes.items()}
    _prefixes.update(modules)
    _hidden_before.update(dict.fromkeys(modules, hidden_before))
    for module in modules:
        if (owner := _owner(model, module)) is not None:
            _bias_owners[module] = owner
    try:
        yield model
    finally:
        for module in own:
            del vars(module)["forward"]
        _prefixes.clear()
        _terms.clear()
        _hidden_before.clear()
        _open_slots.clear()
        _bias_owners.clear()


def _owner(model: PreTrainedModel, module: nn.Module) -> nn.Module | None:
    """The self-attention of the first block of T5's stack that ``module`` is in, or the block's own in UMT5; None for
    cross-attention."""
    if getattr(module, "has_relative_attention_bias", False):
        return module
    if type(module).__name__ != "T5Attention":
        return None
    for stack in (model.base_model.encoder, model.base_model.decoder):
        if any(module is block.layer[0].SelfAttention for block in stack.block):
            return stack.block[0].layer[0].SelfAttention
    return None
