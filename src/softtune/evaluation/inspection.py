"""Inspects a trained adapter: vocabulary entries nearest to its virtual tokens, norms by layer, changes of biases and
factors by role.

Letters: P virtual tokens, D embedding size.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from softtune.backbone import Backbone, Site
from softtune.injection.modules import Additions, Scalings
from softtune.methods.prompt import KeyValue, Prompt


def nearest_words(backbone: Backbone, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The vocabulary entries nearest to each virtual token by cosine (Lester et al. 2021, section 7).

    Args:
        backbone: the base model.
        vectors: [P, D].
        count: how many for each.

    Returns:
        Token ids [P, count] and their cosines [P, count], the nearest first.
    """
    with torch.no_grad():
        embeddings = backbone.stacks[0].embed(torch.arange(backbone.embedding.num_embeddings, device=vectors.device))
        cosines = normalize(vectors.float(), dim=-1) @ normalize(embeddings.float(), dim=-1).T
    found = cosines.topk(count, dim=-1)
    return found.indices, found.values


def prefix_norms(prefixes: Mapping[tuple[Site, int], KeyValue]) -> dict[tuple[Site, int], tuple[float, float]]:
    """The mean Euclidean norm of a virtual token's keys and of its values, over heads, by site and layer."""
    return {
        place: (float(kv.key.norm(dim=-1).mean()), float(kv.value.norm(dim=-1).mean()))
        for place, kv in prefixes.items()
    }


def term_sizes(prompt: Prompt) -> dict[tuple[Site, int], dict[str, float]]:
    """By layer, what adds to the outputs of attention: the mean norm of a head's memory, and the mean absolute gate."""
    sizes: dict[tuple[Site, int], dict[str, float]] = {place: {} for place in sorted(prompt.terms, key=_depth)}
    for place, memory in prompt.memories.items():
        sizes[place]["memory"] = float(memory.detach().flatten(1).norm(dim=1).mean())
    for place, gated in prompt.gated.items():
        sizes[place]["gate"] = float(gated.gate.detach().abs().mean())
    return sizes


def _depth(place: tuple[Site, int]) -> tuple[int, int]:
    return list(Site).index(place[0]), place[1]


def deviations(scalings: Scalings) -> Additions:
    """By how much factors differ from 1."""
    return [(slot, factor - 1) for slot, factor in scalings]


def mean_changes(changes: Additions) -> dict[str, float]:
    """The mean absolute change, of biases or of factors, of each role."""
    by_role: dict[str, list[Tensor]] = defaultdict(list)
    for slot, change in changes:
        by_role[slot.role or "other"].append(change.detach().abs())
    return {role: _mean(parts) for role, parts in by_role.items()}


def mean_changes_by_layer(changes: Additions) -> dict[str, dict[int, float]]:
    """The mean absolute change, of biases or of factors, by role and layer; those outside of layers are left out (Ben
    Zaken et al. 2022, figure 2)."""
    by_place: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for slot, change in changes:
        if number := re.search(r"\.(\d+)\.", f".{slot.module}."):
            by_place[slot.role or "other"][int(number[1])].append(change.detach().abs())
    return {
        role: {layer: _mean(parts) for layer, parts in sorted(by_layer.items())} for role, by_layer in by_place.items()
    }


def _mean(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).mean())
