"""A KV connector for vLLM: loads an adapter's prefix into the KV cache, in place of a text's first P tokens.

A request names its adapter twice: as ``kv_transfer_params={"adapter": name}``, and as ``cache_salt``, which keeps its
blocks apart from those of other adapters in vLLM's prefix cache. Its text begins with P placeholders, which can be any
token ids. A request ends with an error if its adapter is unknown or differs from its salt, if it has only placeholders,
or if it sets ``prompt_logprobs``. Knows nothing about how prompts are exported into the folder.

Letters: P virtual tokens, N of them to write, H key/value heads, K size of a key or value.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index

from softtune.serving.vllm.prompts import CachedPrompts, Prompts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Load:
    """Virtual tokens of one request to write into the KV cache."""

    adapter: str | None
    """The adapter's name; None for a request that is rejected."""
    first: int
    """Index of the first of them."""
    count: int
    """N"""
    blocks: list[int]
    """Ids of the blocks to write into."""


@dataclass
class Loads(KVConnectorMetadata):  # type: ignore[misc]  # vllm is no dependency of the checks
    """The loads of one step, which are written before its first layer runs."""

    loads: list[Load] = field(default_factory=list)


class PromptConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Loads exported prompts into vLLM's KV cache; see ``KVConnectorBase_V1``.

    Its ``kv_connector_extra_config`` has the ``folder`` of exported prompts, and as ``hot`` how many bytes of them to
    keep in memory (1 GiB by default).
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        model, extra = vllm_config.model_config, vllm_config.kv_transfer_config.kv_connector_extra_config
        heads = model.get_total_num_kv_heads()
        sizes = (model.get_total_num_hidden_layers(), heads, model.get_head_size())
        self._prompts = Prompts(Path(extra["folder"]), *sizes)
        self._block_size: int = vllm_config.cache_config.block_size
        self._loads = Loads()
        self._failed: set[int] = set()
        if role == KVConnectorRole.WORKER:
            parallel = vllm_config.parallel_config
            first = get_tensor_model_parallel_rank() * heads // parallel.tensor_parallel_size
            local_heads = slice(first, first + model.get_num_kv_heads(parallel))
            device = torch.device(vllm_config.device_config.device_type)
            self._cached = CachedPrompts(self._prompts, local_heads, model.dtype, device, int(extra.get("hot", 2**30)))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """The number of virtual tokens to load after the computed ones, and that this is done within the step."""
        adapter = _adapter(request)
        if adapter is None:
            return 0, False
        request.skip_reading_prefix_cache = False  # else vLLM computes the placeholders, whatever is returned
        return max(0, self._virtual(request, adapter) - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Schedule the load of a request whose blocks were allocated, also after a preemption."""
        adapter = _adapter(request)
        if adapter is None or not num_external_tokens:
            return
        fits = self._fitting(request, adapter)
        end = self._virtual(request, adapter)
        first, size = end - num_external_tokens, self._block_size
        block_ids = blocks.get_block_ids()[0][first // size : -(-end // size)]
        self._loads.loads.append(Load(adapter if fits else None, first, num_external_tokens, block_ids))

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """The loads of the scheduled step."""
        loads, self._loads = self._loads, Loads()
        return loads

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write a step's virtual tokens into the KV cache of all layers of this worker."""
        layers = {
            extract_layer_index(name): layer
            for name, layer in forward_context.no_compile_layers.items()
            if getattr(layer, "kv_cache", None) is not None
        }
        for load in self._get_connector_metadata().loads:
            if load.adapter is None:
                self._failed.update(load.blocks)
                continue
            try:
                prompt = self._cached.get(load.adapter)[load.first : load.first + load.count]
            except Exception as error:  # whatever it is, the other requests of the batch must go on
                logger.warning("cannot read the adapter %s: %s", load.adapter, error)
                self._failed.update(load.blocks)
                continue
            slots = self._slots(load).to(prompt.device)
            for number, layer in layers.items():
                key, value = prompt[:, number].unbind(1)
                layer.impl.do_kv_cache_update(layer, key.contiguous(), value.contiguous(), layer.kv_cache, slots)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks whose virtual tokens could not be written; their requests end with an error."""
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: all is written before the first layer."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: computed keys and values are not saved."""

    def wait_for_save(self) -> None:
        """See ``save_kv_layer``."""

    def _slots(self, load: Load) -> Tensor:
        """[N] KV cache slots of a load's tokens."""
        size = self._block_size
        starts = torch.tensor(load.blocks) * size
        slots = (starts[:, None] + torch.arange(size)).flatten()
        return slots[load.first % size :][: load.count]

    def _virtual(self, request: Any, adapter: str) -> int:
        """P of a request; for a rejected one all tokens but the last, which vLLM computes in any case."""
        return self._prompts.length(adapter) if self._fitting(request, adapter) else int(request.num_tokens) - 1

    def _fitting(self, request: Any, adapter: str) -> bool:
        """Whether a request meets the conditions in the module's docstring."""
        if request.cache_salt != adapter or request.sampling_params.prompt_logprobs is not None:
            return False
        try:
            return self._prompts.length(adapter) < int(request.num_prompt_tokens)
        except Exception as error:  # raised in the scheduler, it would end the whole engine
            logger.warning("cannot serve the adapter %s: %s", adapter, error)
            return False


def _adapter(request: Any) -> str | None:
    """The name of a request's adapter."""
    name = (request.kv_transfer_params or {}).get("adapter")
    return None if name is None else str(name)
