"""Caches the hidden states of texts below the lowest prefix, so that later calls start above those layers.

No trained tensor reaches those layers: without dropout, hidden states there are a function of the text's token ids and
positions, and need no gradients. A call's texts that are not cached yet are computed in a forward of their own, and
the call itself always starts above those layers.

Letters: B rows, T columns, N tokens of a pack, D hidden size.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from softtune.backbone import Backbone
from softtune.backbone.interface import IN_TRAINING, WRAPPER
from softtune.errors import UnsupportedModelError
from softtune.injection.layout import row_starts
from softtune.injection.pack import Pack, PackedAttention
from softtune.injection.step import Call
from softtune.injection.tensor_store import TensorStore
from softtune.methods.prompt import Prompt

OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Outputs of every layer, which a call or the config can request."""


class FrozenLayerCache:
    """Cached hidden states of texts above a decoder's first layers.

    Args:
        backbone: the base model.
        store: stores them.
    """

    def __init__(self, backbone: Backbone, store: TensorStore) -> None:
        self.backbone = backbone
        self.store = store
        self.hits = self.misses = 0
        """Rows whose states were cached, and rows whose states were computed."""
        self._depths: set[int] = set()

    def depth(self, call: Call, prompts: Sequence[Prompt]) -> int:
        """Number of layers that a call can skip; 0 where their hidden states may differ from another call's.

        Raises:
            UnsupportedModelError: layers pass on more than hidden states, or are trained.
        """
        depth = untouched(prompts)
        if not (depth and torch.is_grad_enabled()) or torch.compiler.is_compiling() or not self._is_plain(call):
            return 0
        self.check(depth)
        return depth

    def _is_plain(self, call: Call) -> bool:
        """Whether a call's token ids are all of its layers' input, and it requests only the last layer's output."""
        stack = self.backbone.stacks[0]
        given = {name: value for name, value in call.items() if value is not None}
        requested = {name: getattr(stack.module.config, name, False) for name in OUTPUTS} | given
        others = (value for name, value in given.items() if name not in ("input_ids", "attention_mask"))
        return (
            "input_ids" in given
            and not any(isinstance(value, Tensor) and value.dim() > 1 for value in others)
            and not any(value is not False for name, value in requested.items() if name.startswith("output_"))
            and not stack.is_random
        )

    def check(self, depth: int) -> None:
        """Check that the layers below ``depth`` can be skipped.

        Raises:
            UnsupportedModelError: they pass on more than hidden states, or are trained.
        """
        stack = self.backbone.stacks[0]
        if depth not in self._depths and not self.backbone.starts_at(depth):
            raise UnsupportedModelError(
                f"{type(self.backbone.model).__name__} has no trunk to cache",
                "that takes a decoder whose layers attend through the attention interface and pass on nothing but "
                "hidden states",
            )
        self._depths.add(depth)
        modules = [stack.module.get_input_embeddings(), *stack.layers[:depth]]
        if any(p.requires_grad for module in modules for p in module.parameters()):
            raise UnsupportedModelError(
                "layers below the prefix are trained, so that their outputs change",
                "freeze them or drop the trunk cache",
            )

    def states(self, call: Call, pack: Pack, depth: int) -> Tensor:
        """[1, N, D] hidden states of a pack's tokens above the first ``depth`` layers.

        Args:
            call: has the rows' token ids and position ids [B, T].
            pack: the places of their tokens.
            depth: see ``depth``.
        """
        ids, positions = call["input_ids"], call["position_ids"]
        keys = self._keys(ids, positions, pack, depth)
        stored = {key: self.store.get(key) for key in {*keys}}
        cached = {key: states.to(ids.device) for key, states in stored.items() if states is not None}
        missing = torch.tensor([i for i, key in enumerate(keys) if key not in cached], device=ids.device)
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        if len(missing):
            rows = self._compute(ids[missing], positions[missing], pack.mask[missing], depth)
            computed = dict(zip([keys[i] for i in missing.tolist()], rows, strict=True))
            for key, states in computed.items():
                self.store.put(key, states)
            cached |= computed
        per_row = [cached[key][common:] for key, common in zip(keys, pack.common.tolist(), strict=True)]
        return torch.cat(per_row)[None]

    def _keys(self, ids: Tensor, positions: Tensor, pack: Pack, depth: int) -> list[Hashable]:
        """Each row's cache key: everything that its hidden states depend on."""
        kind = ids.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        firsts = _firsts(positions, pack.mask).tolist()
        texts = [row[real].numpy().tobytes() for row, real in zip(ids.cpu(), pack.mask.cpu(), strict=True)]
        return [(depth, dtype, first, text) for first, text in zip(firsts, texts, strict=True)]

    def _compute(self, ids: Tensor, positions: Tensor, mask: Tensor, depth: int) -> list[Tensor]:
        """Each row's hidden states, without gradients."""
        stack = self.backbone.stacks[0]
        pack = Pack(mask, ids + _firsts(positions, mask)[:, None] * (int(ids.max()) + 1))
        call: dict[str, Any] = {"input_ids": ids, "position_ids": positions}
        pack.fill(call)
        call["attention_mask"] = stack.causal_masks(int(pack.lengths.max()))
        call[WRAPPER] = PackedAttention(pack, [None] * len(pack.groups))
        call[IN_TRAINING] = stack.module.training
        states = stack.run_below(depth, **call)[0]
        return [states[places[:n]] for places, n in zip(pack.places, pack.lengths.tolist(), strict=True)]


def untouched(prompts: Sequence[Prompt]) -> int:
    """Number of a decoder's first layers that none of a batch's prompts reaches."""
    if any(p.vectors is not None or p.after_text for p in prompts):
        return 0
    return min((index for p in prompts for _, index in (*p.prefixes, *p.terms)), default=0)


def _firsts(positions: Tensor, mask: Tensor) -> Tensor:
    """[B] the position of each row's first real token."""
    return positions.gather(1, row_starts(mask, len(mask), mask.device)[:, None])[:, 0]
