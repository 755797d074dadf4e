"""A KV connector for vLLM: what an adapter's virtual tokens hold is written where a text's first tokens would be.

A request names its adapter twice: as ``kv_transfer_params={"adapter": name}``, and as ``cache_salt``, which keeps its
blocks apart from those of others in vLLM's prefix cache. Its text begins with P placeholders, any token ids. A request
whose adapter is unknown or not its salt, that has placeholders alone or asks for ``prompt_logprobs``, ends with an
error. Knows nothing about how prompts come into the folder.

Letters: P virtual tokens, N of them that are written, H key/value heads, K size of a key or value.
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

from softtune.serving.vllm.prompts import HeldPrompts, Prompts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Load:
    """Virtual tokens of one request that are to be written."""

    adapter: str | None
    """Whose; None for a request that is refused."""
    first: int
    """The first one's number."""
    count: int
    """N"""
    blocks: list[int]
    """That they are written into."""


@dataclass
class Loads(KVConnectorMetadata):  # type: ignore[misc]  # vllm is no dependency of the checks
    """What a step writes before its layers read."""

    loads: list[Load] = field(default_factory=list)


class PromptConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """See vLLM's ``KVConnectorBase_V1``. Its ``kv_connector_extra_config`` has the ``folder`` of baked prompts, and as
    ``hot`` how many bytes of them to keep in memory."""

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
            own = slice(first, first + model.get_num_kv_heads(parallel))
            device = torch.device(vllm_config.device_config.device_type)
            self._held = HeldPrompts(self._prompts, own, model.dtype, device, int(extra.get("hot", 2**30)))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens behind those that are known already will be written, and that it is done in the same step."""
        adapter = _adapter(request)
        if adapter is None:
            return 0, False
        request.skip_reading_prefix_cache = False  # else vLLM reads the placeholders as words, whatever is returned
        return max(0, self._virtual(request, adapter) - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """A request has got its blocks, anew too where it had to give them back."""
        adapter = _adapter(request)
        if adapter is None or not num_external_tokens:
            return
        fits = self._fitting(request, adapter)
        end = self._virtual(request, adapter)
        first, size = end - num_external_tokens, self._block_size
        own = blocks.get_block_ids()[0][first // size : -(-end // size)]
        self._loads.loads.append(Load(adapter if fits else None, first, num_external_tokens, own))

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """What the step of this output writes."""
        loads, self._loads = self._loads, Loads()
        return loads

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write a step's virtual tokens, into all layers of this worker."""
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
                prompt = self._held.get(load.adapter)[load.first : load.first + load.count]
            except Exception as error:  # whatever it is, the other requests of the batch go on
                logger.warning("cannot read the adapter %s: %s", load.adapter, error)
                self._failed.update(load.blocks)
                continue
            slots = self._slots(load).to(prompt.device)
            for number, layer in layers.items():
                key, value = prompt[:, number].unbind(1)
                layer.impl.do_kv_cache_update(layer, key.contiguous(), value.contiguous(), layer.kv_cache, slots)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of requests that end with an error, since their virtual tokens could not be written."""
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All is written before the first layer."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is kept of what layers compute."""

    def wait_for_save(self) -> None:
        """See ``save_kv_layer``."""

    def _slots(self, load: Load) -> Tensor:
        """[N] where the cache has a load's tokens."""
        size = self._block_size
        starts = torch.tensor(load.blocks) * size
        slots = (starts[:, None] + torch.arange(size)).flatten()
        return slots[load.first % size :][: load.count]

    def _virtual(self, request: Any, adapter: str) -> int:
        """P of a request; of one that is refused all tokens but the last, which is read in any case."""
        return self._prompts.length(adapter) if self._fitting(request, adapter) else int(request.num_tokens) - 1

    def _fitting(self, request: Any, adapter: str) -> bool:
        """Whether a request is as it must be."""
        if request.cache_salt != adapter or request.sampling_params.prompt_logprobs is not None:
            return False
        try:
            return self._prompts.length(adapter) < int(request.num_prompt_tokens)
        except Exception as error:  # one that leaves the scheduler would end the whole engine
            logger.warning("cannot serve the adapter %s: %s", adapter, error)
            return False


def _adapter(request: Any) -> str | None:
    """The adapter that a request names."""
    name = (request.kv_transfer_params or {}).get("adapter")
    return None if name is None else str(name)
