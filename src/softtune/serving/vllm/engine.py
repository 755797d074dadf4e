"""Requests of many adapters in vLLM's running batch, as ``serving.engine`` has them in its own.

Places go to those that wait by turns of their adapters; what a step reads is vLLM's choice. Leading virtual tokens come
as keys and values by the connector, others as vectors among the words.
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
from softtune.methods.base import Prompt
from softtune.serving import baking
from softtune.serving.jobs import Scoring, Writing, check_length
from softtune.serving.limits import Limits
from softtune.serving.loop import drop_cancelled, fail
from softtune.serving.registry import Hot, Version
from softtune.serving.texts import VIRTUAL, Held, Text
from softtune.serving.vllm import connector
from softtune.serving.vllm.asking import Part, may_begin, parts_of
from softtune.serving.vllm.fitting import check
from softtune.serving.waiting import Ticket, Waiting

BLOCK = 32
"""Tokens of a block: what the kernels of CPUs want, and those of GPUs take."""
PLACEHOLDER = 0
"""Stands for a virtual token; nothing reads it."""

Job = Writing | Scoring


class HeldVectors:
    """What the engine itself has of an adapter: vectors that come among the words.

    Args:
        prompt: the baked prompt.
    """

    def __init__(self, prompt: Prompt) -> None:
        self.held = Held(
            slots=torch.zeros(0, dtype=torch.long),
            places=frozenset(),
            shift=0,
            vectors=prompt.vectors,
            after_text=prompt.after_text,
            additions=(),
        )
        self.bytes = 0 if prompt.vectors is None else prompt.vectors.nbytes

    def release(self) -> None:
        """Nothing but this object holds them."""


class VllmEngine:
    """The running batch.

    Args:
        source: the folder or hub name of the base model.
        backbone: the base model, a decoder, by which adapters are baked.
        limits: how much is done at once.
        folder: where inference forms of adapters are kept.
        gpus: how many share each layer.

    Raises:
        ConfigError: vLLM does not run the model, or not with these limits.
    """

    def __init__(self, source: str, backbone: Backbone, limits: Limits, folder: Path, *, gpus: int = 1) -> None:
        self.backbone = backbone
        self.limits = limits
        self.hot: Hot[HeldVectors] = Hot(self._load)
        self.running: list[Ticket[Job]] = []
        self.waiting: Waiting[Job] = Waiting(limits, self.running)
        self._parts: dict[str, tuple[Ticket[Job], Part]] = {}
        self._numbers = itertools.count()
        try:
            self._llm: Any = LLMEngine.from_engine_args(self._arguments(source, folder, gpus))
        except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"vLLM does not start with {source} ({reason}): use the engine transformers") from error
        _watch(self._llm.engine_core)

    def _arguments(self, source: str, folder: Path, gpus: int) -> EngineArgs:
        limits, own = self.limits, connector.PromptConnector
        return EngineArgs(
            model=source,
            skip_tokenizer_init=True,
            dtype="float32" if current_platform.is_cpu() else "auto",
            max_model_len=self.longest,
            max_num_seqs=limits.rows,
            max_num_batched_tokens=max(limits.tokens, limits.rows),
            tensor_parallel_size=gpus,
            block_size=BLOCK,
            num_gpu_blocks_override=limits.slots // BLOCK + 1,  # vLLM keeps one for itself
            kv_cache_memory_bytes=1,  # else vLLM measures the memory, although the number of blocks is given
            enable_prompt_embeds=True,
            disable_log_stats=True,
            kv_transfer_config=KVTransferConfig(
                kv_connector=own.__name__,
                kv_connector_module_path=own.__module__,
                kv_role="kv_both",
                kv_connector_extra_config={"folder": str(folder), "hot": limits.hot},
            ),
        )

    def keep(self, adapter: Adapter, folder: Path, *, ahead: bool) -> None:
        """See ``Lane``."""
        prompt = baking.bake(self.backbone, adapter, ahead=ahead)
        check(prompt, self.backbone)
        baking.save(prompt, self.backbone, folder)

    @property
    def longest(self) -> int:
        """Tokens that a text may have together with virtual ones."""
        whole = self.limits.slots // BLOCK * BLOCK
        return min(self.backbone.max_positions or whole, whole)

    def submit(self, ticket: Ticket[Job]) -> None:
        """See ``Lane``."""
        spare = isinstance(ticket.job, Scoring)  # vLLM wants room for a token behind each text
        check_length(ticket.job, ticket.virtual, self.longest - spare)
        self.waiting.add(ticket)

    def step(self) -> None:
        """Let vLLM do a step of all that run."""
        drop_cancelled(self)
        self.hot.shrink(self.limits.hot)
        while len(self.running) < self.limits.rows and (first := self.waiting.first) is not None:
            if not may_begin(first.job, self._asked):
                break  # nor may others, which might keep it waiting for ever
            self._begin(self.waiting.pop())
        if self.running:
            for output in self._llm.step():
                self._take(output)

    @property
    def _asked(self) -> list[Part]:
        """All that vLLM is asked at present."""
        return [part for _, part in self._parts.values()]

    def _begin(self, ticket: Ticket[Job]) -> None:
        """Ask vLLM for all that a request wants."""
        try:
            held = None if ticket.version is None else self.hot.use(ticket.version).held
            self.running.append(ticket)
            adapter = None if ticket.version is None or _comes_as_vectors(held) else _name(ticket.version)
            for part in parts_of(ticket.job, adapter, self._asked):
                number = str(next(self._numbers))
                self._parts[number] = (ticket, part)
                self._llm.add_request(number, _input(ticket, held, part), part.params)
        except Exception as error:
            fail(self, [ticket], error)

    def _take(self, output: Any) -> None:
        """Hand on what vLLM has written."""
        ticket, part = self._parts.get(output.request_id, (None, None))
        if ticket is None or part is None:  # it was given up on
            return
        [written] = output.outputs
        if written.finish_reason not in (None, "stop", "length"):
            fail(self, [ticket], RuntimeError(f"vLLM ended a request by itself: {written.finish_reason}"))
            return
        try:
            part.take(written)
        except Exception as error:  # of this request alone
            fail(self, [ticket], error)
            return
        if output.finished:
            del self._parts[output.request_id]
        if ticket.job.is_done:
            self.leave(ticket)
            ticket.end()

    def leave(self, ticket: Ticket[Job]) -> None:
        """See ``Lane``."""
        self.running.remove(ticket)
        left = [number for number, (other, _) in self._parts.items() if other is ticket]
        for number in left:
            del self._parts[number]
        with suppress(EngineDeadError):  # who waits for the request hears of that all the same
            self._llm.abort_request(left)
        if ticket.version is not None:
            self.hot.done(ticket.version)

    @property
    def is_alive(self) -> bool:
        """See ``TextLane``."""
        resources = getattr(self._llm.engine_core, "resources", None)
        return resources is None or not resources.engine_dead  # without, it runs in this process

    def close(self) -> None:
        """End vLLM's processes."""
        self._llm.engine_core.shutdown(timeout=30.0)

    def _load(self, version: Version) -> HeldVectors:
        return HeldVectors(baking.read(version.folder, self.backbone, with_prefix=False))


def _watch(client: Any) -> None:
    """Have the next step fail where vLLM's process is killed: by itself it would wait for an answer for ever."""
    manager = getattr(getattr(client, "resources", None), "engine_manager", None)
    if manager is None:  # it runs in this process
        return

    def wait_for_end() -> None:
        wait([process.sentinel for process in manager.processes])
        client.resources.engine_dead = True
        client.outputs_queue.put(EngineDeadError())

    Thread(target=wait_for_end, name="softtune-vllm", daemon=True).start()


def _name(version: Version) -> str:
    """What the connector calls a version: no other has it, before or after."""
    return version.folder.name


def _comes_as_vectors(held: Held | None) -> bool:
    return held is not None and held.vectors is not None


def _input(ticket: Ticket[Job], held: Held | None, part: Part) -> Any:
    """A text as vLLM reads it, with the virtual tokens of its adapter."""
    job = ticket.job
    if ticket.version is None or held is None:
        return tokens_input([*job.words, *part.tail])
    name = _name(ticket.version)
    if held.vectors is None:
        return tokens_input([PLACEHOLDER] * ticket.virtual + [*job.words, *part.tail], cache_salt=name)
    places = job.places if isinstance(job, Scoring) else None
    tokens = torch.tensor([*Text.of(held, job.words, places).tokens, *part.tail])
    is_word = tokens > VIRTUAL
    vectors = torch.zeros(len(tokens), held.vectors.shape[1], dtype=held.vectors.dtype)
    vectors[~is_word] = held.vectors.cpu()[VIRTUAL - tokens[~is_word]]
    ids = tokens.clamp(min=PLACEHOLDER).tolist()
    return embeds_input(vectors, cache_salt=name, prompt_token_ids=ids, is_token_ids=is_word.tolist())
