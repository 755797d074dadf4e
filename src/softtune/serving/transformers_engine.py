"""A decoder's engine on transformers: a step runs the scheduler's plan, many adapters' requests in one forward pass."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from softtune.adapter import Adapter
from softtune.backbone import Backbone
from softtune.backbone.prepacked_weights import prepacked_weights
from softtune.errors import TooLongError
from softtune.serving import prompt_export
from softtune.serving.engine_config import EngineConfig
from softtune.serving.request_queue import RequestHandle
from softtune.serving.requests import EngineRequest, check_length
from softtune.serving.scheduler import Scheduler
from softtune.serving.sequence import run_chunks


class TransformersEngine:
    """Runs a decoder's requests with transformers, see ``TextEngine``.

    Args:
        backbone: the base model, a decoder in evaluation mode.
        config: limits of the batch, the queue and memory.

    Raises:
        UnsupportedModelError: the model's layers do not take tokens of several sequences in one row.
    """

    def __init__(self, backbone: Backbone, config: EngineConfig) -> None:
        self.backbone = backbone
        self.config = config
        self.scheduler = Scheduler(backbone, config)
        self.batch = self.scheduler.batch
        self._prepacked = ExitStack()
        if config.prepack_weights:
            self._prepacked.enter_context(prepacked_weights(backbone.model))

    def export_adapter(self, adapter: Adapter, folder: Path, *, as_kv: bool) -> None:
        """See ``Engine``."""
        prompt = prompt_export.export_prompt(self.backbone, adapter, as_kv=as_kv)
        prompt_export.save_prompt(prompt, self.backbone, folder)

    @property
    def max_model_len(self) -> int:
        """See ``TextEngine``."""
        return min(self.backbone.max_positions or self.config.num_kv_slots, self.config.num_kv_slots)

    def submit(self, handle: RequestHandle[EngineRequest]) -> None:
        """See ``Engine``."""
        check_length(handle.request, handle.num_virtual_tokens, self.max_model_len)
        if handle.num_virtual_tokens + handle.request.max_kv_tokens > self.config.num_kv_slots:
            raise TooLongError(
                f"the answers to choose from have {handle.request.max_kv_tokens} tokens with the text, more than "
                f"the {self.config.num_kv_slots} that there is room for",
                "ask for fewer",
            )
        self.batch.queue.add(handle)

    def step(self) -> None:
        """See ``Engine``: run the scheduled chunks of all requests."""
        self.batch.abort_cancelled()
        plan = self.scheduler.schedule()
        if not plan:
            return
        scheduled = [chunk for _, chunks in plan for chunk in chunks]
        logits = iter(run_chunks(self.backbone, self.scheduler.pool, scheduled))
        for handle, chunks in plan:
            self.batch.process(handle, handle.request.process_logits, [next(logits) for _ in chunks])

    @property
    def is_alive(self) -> bool:
        """See ``TextEngine``: the engine has no process of its own that could end."""
        return True

    def close(self) -> None:
        """See ``TextEngine``."""
        self._prepacked.close()
