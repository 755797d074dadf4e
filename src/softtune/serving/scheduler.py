"""Continuous batching for a decoder: which requests are in the batch, and which of their tokens each step runs.

A request joins the batch as soon as another leaves it; long texts are prefilled in chunks, beside the tokens that other
requests generate. Where the KV pool is full, the youngest request is preempted: it frees its slots, and is prefilled
again later. Runs no model.
"""

from __future__ import annotations

from collections.abc import Sequence

from softtune.backbone import Backbone
from softtune.injection.kv_pool import KVPool
from softtune.methods.prompt import Prompt
from softtune.serving import prompt_export
from softtune.serving.engine_config import EngineConfig
from softtune.serving.registry import Version
from softtune.serving.request_queue import RequestHandle
from softtune.serving.requests import EngineRequest
from softtune.serving.running_batch import RunningBatch
from softtune.serving.sequence import LoadedPrompt, ScheduledChunk

Plan = list[tuple[RequestHandle[EngineRequest], list[ScheduledChunk]]]
"""The chunks of each request in one step."""


class CachedPrompt:
    """An adapter's prompt in memory, with its prefix in the KV pool.

    Args:
        pool: the pool, with room for the prefix.
        prompt: the prompt.
    """

    def __init__(self, pool: KVPool, prompt: Prompt) -> None:
        self._pool = pool
        self.loaded = LoadedPrompt.from_prompt(pool, prompt)
        tensors = [tensor for _, tensor in (*prompt.additions, *prompt.scalings)]
        tensors += [tensor for term in self.loaded.terms.values() for tensor in term.tensors]
        tensors += [] if prompt.vectors is None else [prompt.vectors]
        self.nbytes = len(self.loaded.slots) * pool.token_bytes + sum(tensor.nbytes for tensor in tensors)

    def release(self) -> None:
        """Free the prefix's slots."""
        self._pool.free(self.loaded.slots)


class Scheduler:
    """The running batch with its KV pool.

    Args:
        backbone: the base model, a decoder in evaluation mode.
        config: limits of the batch, the queue and memory.

    Raises:
        UnsupportedModelError: the model's layers do not take tokens of several sequences in one row.
    """

    def __init__(self, backbone: Backbone, config: EngineConfig) -> None:
        self._backbone = backbone
        self.config = config
        self.pool = KVPool(backbone, config.num_kv_slots)
        self.batch: RunningBatch[EngineRequest, CachedPrompt] = RunningBatch(
            config, self._load, self._start, self._free
        )
        self._no_prompt = LoadedPrompt.from_prompt(self.pool, Prompt())

    def schedule(self) -> Plan:
        """Plan the next step: first the requests that generate, then prefills in the order of their admission."""
        self.batch.evict_idle_adapters()
        self.batch.admit(self._has_room)
        plan: Plan = []
        left = self.config.max_num_batched_tokens
        for handle in sorted(self.batch.running, key=lambda handle: handle.request.num_pending_tokens > 1):
            if handle not in self.batch.running or not left:
                continue  # preempted for a request that the plan already has
            planned = sum(chunk.count for _, chunks in plan for chunk in chunks)
            self._make_room(planned + 1, keep=[*(other for other, _ in plan), handle])
            if (room := min(left, self.pool.num_free - planned)) < 1:
                continue
            chunks = handle.request.schedule(room)
            left -= sum(chunk.count for chunk in chunks)
            plan.append((handle, chunks))
        return plan

    def _has_room(self, handle: RequestHandle[EngineRequest]) -> bool:
        """Whether the KV pool has room for a request's prefill, beside the pending tokens of the running requests."""
        needed = handle.request.num_tokens + handle.num_virtual_tokens
        needed += sum(other.request.num_pending_tokens for other in self.batch.running)
        return not self.batch.running or needed <= self.pool.num_free + self._num_idle_slots

    def _start(self, handle: RequestHandle[EngineRequest], adapter: CachedPrompt | None) -> None:
        handle.request.start(self._no_prompt if adapter is None else adapter.loaded)

    def _free(self, handle: RequestHandle[EngineRequest]) -> None:
        self.pool.free(handle.request.slots)

    @property
    def _num_idle_slots(self) -> int:
        """KV slots of adapters that no request uses."""
        return sum(len(prompt.loaded.slots) for prompt in self.batch.adapter_cache.idle)

    def _make_room(self, slots: int, keep: Sequence[RequestHandle[EngineRequest]]) -> None:
        """Make ``slots`` KV slots free: drop idle adapters, then preempt the youngest requests not in ``keep``."""
        while self.pool.num_free < slots and self.batch.adapter_cache.drop_one():
            pass
        for handle in reversed(self.batch.running):
            if self.pool.num_free >= slots:
                return
            if handle not in keep:
                self.batch.preempt(handle)

    def _load(self, version: Version) -> CachedPrompt:
        prompt = prompt_export.load_prompt(version.folder, self._backbone)
        self._make_room(prompt.prefix_length, keep=[])
        return CachedPrompt(self.pool, prompt)
