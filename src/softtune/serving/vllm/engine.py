"""The vLLM engine: requests of many adapters in vLLM's running batch; the alternative to ``TransformersEngine``.

Waiting requests are admitted round-robin by adapter; vLLM chooses the tokens of a step. Leading virtual tokens are
loaded as keys and values by the connector, others are passed as vectors among the input embeddings.
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from vllm import EngineArgs
from vllm.config import KVTransferConfig
from vllm.inputs.engine import embeds_input, tokens_input
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine

from softtune.adapter import Adapter
from softtune.backbone import Backbone
from softtune.errors import ConfigError
from softtune.methods.prompt import Prompt
from softtune.serving import prompt_export
from softtune.serving.engine_config import EngineConfig
from softtune.serving.registry import Version
from softtune.serving.request_queue import RequestHandle
from softtune.serving.requests import GenerationRequest, LoglikelihoodRequest, check_length
from softtune.serving.running_batch import RunningBatch
from softtune.serving.sequence import VIRTUAL, LoadedPrompt, TokenSequence
from softtune.serving.vllm import connector
from softtune.serving.vllm.compatibility import check
from softtune.serving.vllm.requests import VllmRequest, may_begin, vllm_requests

BLOCK = 32
"""Tokens of a KV cache block: the size that CPU kernels require and GPU kernels support."""
PLACEHOLDER = 0
"""Token id in place of a virtual token; its value has no effect."""

TextRequest = GenerationRequest | LoglikelihoodRequest


class CachedVectors:
    """The part of an adapter that the engine keeps itself: virtual tokens to pass as input embeddings.

    Args:
        prompt: the exported prompt.
    """

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = LoadedPrompt(
            slots=torch.zeros(0, dtype=torch.long),
            places=frozenset(),
            shift=0,
            vectors=prompt.vectors,
            after_text=prompt.after_text,
            additions=(),
        )
        self.nbytes = 0 if prompt.vectors is None else prompt.vectors.nbytes

    def release(self) -> None:
        """Do nothing: only this object refers to the vectors."""


class VllmEngine:
    """An engine that runs requests in vLLM; see ``TextEngine``.

    Args:
        source: the folder or hub name of the base model.
        backbone: the base model, a decoder, with which adapters are exported.
        config: the sizes of the batch and the caches.
        folder: the folder of exported adapters.
        gpus: the tensor parallel size.

    Raises:
        ConfigError: vLLM does not run the model, or not with this config.
    """

    def __init__(self, source: str, backbone: Backbone, config: EngineConfig, folder: Path, *, gpus: int = 1) -> None:
        self.backbone = backbone
        self.config = config
        self.batch: RunningBatch[TextRequest, CachedVectors] = RunningBatch(config, self._load, self._start, self._free)
        self._parts: dict[str, tuple[RequestHandle[TextRequest], VllmRequest]] = {}
        self._numbers = itertools.count()
        try:
            self._llm: Any = LLMEngine.from_engine_args(self._arguments(source, folder, gpus))
        except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"vLLM does not start with {source} ({reason})", "use the engine transformers") from error
        _watch(self._llm.engine_core)

    def _arguments(self, source: str, folder: Path, gpus: int) -> EngineArgs:
        config, connector_class = self.config, connector.PromptConnector
        return EngineArgs(
            model=source,
            skip_tokenizer_init=True,
            dtype="float32" if current_platform.is_cpu() else "auto",
            max_model_len=self.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max(config.max_num_batched_tokens, config.max_num_seqs),
            tensor_parallel_size=gpus,
            block_size=BLOCK,
            num_gpu_blocks_override=config.num_kv_slots // BLOCK + 1,  # vLLM reserves one
            kv_cache_memory_bytes=1,  # else vLLM profiles the memory, although the number of blocks is given
            enable_prompt_embeds=True,
            disable_log_stats=True,
            kv_transfer_config=KVTransferConfig(
                kv_connector=connector_class.__name__,
                kv_connector_module_path=connector_class.__module__,
                kv_role="kv_both",
                kv_connector_extra_config={"folder": str(folder), "hot": config.adapter_cache_bytes},
            ),
        )

    def export_adapter(self, adapter: Adapter, folder: Path, *, as_kv: bool) -> None:
        """See ``Engine``."""
        prompt = prompt_export.export_prompt(self.backbone, adapter, as_kv=as_kv)
        check(prompt, self.backbone)
        prompt_export.save_prompt(prompt, self.backbone, folder)

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of a sequence, virtual ones included."""
        whole = self.config.num_kv_slots // BLOCK * BLOCK
        return min(self.backbone.max_positions or whole, whole)

    def submit(self, handle: RequestHandle[TextRequest]) -> None:
        """See ``Engine``."""
        spare = isinstance(handle.request, LoglikelihoodRequest)  # vLLM needs room for a token after each text
        check_length(handle.request, handle.num_virtual_tokens, self.max_model_len - spare)
        self.batch.queue.add(handle)

    def step(self) -> None:
        """Admit waiting requests and run one step of vLLM."""
        self.batch.abort_cancelled()
        self.batch.evict_idle_adapters()
        self.batch.admit(lambda handle: may_begin(handle.request, self._active_requests))
        if self.batch.running:
            for output in self._llm.step():
                self._take(output)

    @property
    def _active_requests(self) -> list[VllmRequest]:
        """The requests to vLLM that are running."""
        return [part for _, part in self._parts.values()]

    def _start(self, handle: RequestHandle[TextRequest], adapter: CachedVectors | None) -> None:
        """Add the vLLM requests of an admitted request."""
        prompt = None if adapter is None else adapter.prompt
        name = None if handle.version is None or _comes_as_vectors(prompt) else _name(handle.version)
        for part in vllm_requests(handle.request, name, self._active_requests):
            number = str(next(self._numbers))
            self._parts[number] = (handle, part)
            self._llm.add_request(number, _input(handle, prompt, part), part.params)

    def _take(self, output: Any) -> None:
        """Pass an output of vLLM on to its request."""
        handle, part = self._parts.get(output.request_id, (None, None))
        if handle is None or part is None:  # it was aborted
            return
        [written] = output.outputs
        if written.finish_reason not in (None, "stop", "length"):
            self.batch.abort([handle], RuntimeError(f"vLLM ended a request by itself: {written.finish_reason}"))
            return
        if output.finished:
            del self._parts[output.request_id]
        self.batch.process(handle, part.take, written)

    def _free(self, handle: RequestHandle[TextRequest]) -> None:
        """Abort the vLLM requests that are left of a request."""
        left = [number for number, (other, _) in self._parts.items() if other is handle]
        for number in left:
            del self._parts[number]
        with suppress(EngineDeadError):  # the request's client gets the error in any case
            self._llm.abort_request(left)

    @property
    def is_alive(self) -> bool:
        """See ``TextEngine``."""
        resources = getattr(self._llm.engine_core, "resources", None)
        return resources is None or not resources.engine_dead  # None where the engine core runs in this process

    def close(self) -> None:
        """Shut down vLLM's processes."""
        self._llm.engine_core.shutdown(timeout=30.0)

    def _load(self, version: Version) -> CachedVectors:
        return CachedVectors(prompt_export.load_prompt(version.folder, self.backbone, with_prefix=False))


def _watch(client: Any) -> None:
    """Make the next step fail if vLLM's process is killed; otherwise it would wait for an output for ever."""
    manager = getattr(getattr(client, "resources", None), "engine_manager", None)
    if manager is None:  # the engine core runs in this process
        return

    def wait_for_end() -> None:
        wait([process.sentinel for process in manager.processes])
        client.resources.engine_dead = True
        client.outputs_queue.put(EngineDeadError())

    Thread(target=wait_for_end, name="softtune-vllm", daemon=True).start()


def _name(version: Version) -> str:
    """The connector's name for an adapter version; it is never reused for another."""
    return version.folder.name


def _comes_as_vectors(prompt: LoadedPrompt | None) -> bool:
    return prompt is not None and prompt.vectors is not None


def _input(handle: RequestHandle[TextRequest], prompt: LoadedPrompt | None, part: VllmRequest) -> Any:
    """The vLLM input of a request, with the virtual tokens of its adapter."""
    request = handle.request
    if handle.version is None or prompt is None:
        return tokens_input([*request.input_ids, *part.tail])
    name = _name(handle.version)
    if prompt.vectors is None:
        return tokens_input(
            [PLACEHOLDER] * handle.num_virtual_tokens + [*request.input_ids, *part.tail], cache_salt=name
        )
    places = request.places if isinstance(request, LoglikelihoodRequest) else None
    tokens = torch.tensor([*TokenSequence.from_input_ids(prompt, request.input_ids, places).tokens, *part.tail])
    is_text_token = tokens > VIRTUAL
    vectors = torch.zeros(len(tokens), prompt.vectors.shape[1], dtype=prompt.vectors.dtype)
    vectors[~is_text_token] = prompt.vectors.cpu()[VIRTUAL - tokens[~is_text_token]]
    ids = tokens.clamp(min=PLACEHOLDER).tolist()
    return embeds_input(vectors, cache_salt=name, prompt_token_ids=ids, is_token_ids=is_text_token.tolist())
