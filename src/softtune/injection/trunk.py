"""Keeps what the layers below every prefix make of a text, so that later calls start above them.

Nothing that is trained reaches those layers, the trunk: without dropout, hidden states there are a function of the
text's ids and positions, and need no gradients. They are computed for the texts of a call that are not kept yet, in a
forward of their own, and the call itself always begins above the trunk.

Letters: B rows, T columns, N tokens of a pack, D hidden size.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from softtune.backbone import Backbone
from softtune.backbone.interface import WRAPPER
from softtune.errors import UnsupportedModelError
from softtune.injection.layout import row_starts
from softtune.injection.pack import Pack, PackedAttention
from softtune.injection.step import Call
from softtune.injection.store import Store
from softtune.methods.base import Prompt

OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Outputs of every layer, that a config can ask for as well as a call."""


class Trunk:
    """The hidden states of texts above a decoder's first layers.

    Args:
        backbone: the base model.
        store: keeps them.
    """

    def __init__(self, backbone: Backbone, store: Store) -> None:
        self.backbone = backbone
        self.store = store
        self.hits = self.misses = 0
        """Rows whose trunk was kept, and rows that it was computed for."""
        self._depths: set[int] = set()

    def depth(self, call: Call, prompts: Sequence[Prompt]) -> int:
        """How many layers a call can leave out; 0 where they may make of its texts what another call does not.

        Raises:
            UnsupportedModelError: layers pass on more than hidden states, or are trained.
        """
        depth = untouched(prompts)
        if not (depth and torch.is_grad_enabled()) or torch.compiler.is_compiling() or not self._is_plain(call):
            return 0
        self.check(depth)
        return depth

    def _is_plain(self, call: Call) -> bool:
        """Whether a call's ids say all of its layers' input, and only the last layer's output is asked for."""
        stack = self.backbone.stacks[0]
        given = {name: value for name, value in call.items() if value is not None}
        asked = {name: getattr(stack.module.config, name, False) for name in OUTPUTS} | given
        others = (value for name, value in given.items() if name not in ("input_ids", "attention_mask"))
        return (
            "input_ids" in given
            and not any(isinstance(value, Tensor) and value.dim() > 1 for value in others)
            and not any(value is not False for name, value in asked.items() if name.startswith("output_"))
            and not stack.is_random
        )

    def check(self, depth: int) -> None:
        """Raise UnsupportedModelError where the layers below ``depth`` cannot be left out."""
        stack = self.backbone.stacks[0]
        if depth not in self._depths and not self.backbone.starts_at(depth):
            raise UnsupportedModelError(
                f"{type(self.backbone.model).__name__} has no trunk to cache: that takes a decoder whose layers attend "
                "through the attention interface and pass on nothing but hidden states"
            )
        self._depths.add(depth)
        modules = [stack.module.get_input_embeddings(), *stack.layers[:depth]]
        if any(p.requires_grad for module in modules for p in module.parameters()):
            raise UnsupportedModelError(
                "layers below the prefix are trained, so that their outputs change: freeze them or drop the trunk cache"
            )

    def states(self, call: Call, pack: Pack, depth: int) -> Tensor:
        """[1, N, D] what the first ``depth`` layers make of a pack's tokens.

        Args:
            call: has the rows' ids and positions [B, T].
            pack: the arrangement of their tokens.
            depth: see ``depth``.
        """
        ids, positions = call["input_ids"], call["position_ids"]
        keys = self._keys(ids, positions, pack, depth)
        kept = {key: self.store.get(key) for key in {*keys}}
        found = {key: states.to(ids.device) for key, states in kept.items() if states is not None}
        missing = torch.tensor([i for i, key in enumerate(keys) if key not in found], device=ids.device)
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        if len(missing):
            rows = self._compute(ids[missing], positions[missing], pack.mask[missing], depth)
            computed = dict(zip([keys[i] for i in missing.tolist()], rows, strict=True))
            for key, states in computed.items():
                self.store.put(key, states)
            found |= computed
        own = [found[key][common:] for key, common in zip(keys, pack.common.tolist(), strict=True)]
        return torch.cat(own)[None]

    def _keys(self, ids: Tensor, positions: Tensor, pack: Pack, depth: int) -> list[Hashable]:
        """What each row's states depend on."""
        kind = ids.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        firsts = _firsts(positions, pack.mask).tolist()
        texts = [row[real].numpy().tobytes() for row, real in zip(ids.cpu(), pack.mask.cpu(), strict=True)]
        return [(depth, dtype, first, text) for first, text in zip(firsts, texts, strict=True)]

    def _compute(self, ids: Tensor, positions: Tensor, mask: Tensor, depth: int) -> list[Tensor]:
        """Each row's states, without gradients."""
        stack = self.backbone.stacks[0]
        pack = Pack(mask, ids + _firsts(positions, mask)[:, None] * (int(ids.max()) + 1))
        call: dict[str, Any] = {"input_ids": ids, "position_ids": positions}
        pack.fill(call)
        call["attention_mask"] = stack.causal_masks(int(pack.lengths.max()))
        call[WRAPPER] = PackedAttention(pack, [None] * len(pack.groups))
        states = stack.run_below(depth, **call)[0]
        return [states[places[:n]] for places, n in zip(pack.places, pack.lengths.tolist(), strict=True)]


def untouched(prompts: Sequence[Prompt]) -> int:
    """How many of a decoder's first layers none of a batch's prompts reaches."""
    if any(p.vectors is not None or p.after_text for p in prompts):
        return 0
    return min((index for p in prompts for _, index in p.prefixes), default=0)


def _firsts(positions: Tensor, mask: Tensor) -> Tensor:
    """[B] the position of each row's first token."""
    return positions.gather(1, row_starts(mask, len(mask), mask.device)[:, None])[:, 0]
