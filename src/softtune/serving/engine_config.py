"""Limits of an engine's batch, queue and memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much an engine does at once; higher limits also raise the latency of each request."""

    max_num_seqs: int = 64
    """Maximum number of requests in the running batch."""
    max_num_waiting: int = 256
    """Maximum number of requests that wait for a place in it."""
    max_num_batched_tokens: int = 256
    """Maximum number of tokens in a step; a larger value raises the time between two tokens of a generation."""
    num_kv_slots: int = 16384
    """Tokens in the KV pool: those of all running requests and the virtual tokens of the adapters in memory."""
    adapter_cache_bytes: int = 64 * 2**20
    """Bytes of adapters to keep in memory."""
    prepack_weights: bool = True
    """Whether a base model on a CPU computes from copies of its weights that suit the CPU's kernels: they take as much
    memory again, and write texts faster."""
    threads: int | None = None
    """Threads of a CPU that compute a step; 0 for as many as half a second's try finds fastest, None for torch's own
    number."""
