"""An engine that is stepped by hand, beside ``generate`` for what it should write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from softtune import PeftModel, PrefixTuningConfig
from softtune.backbone import Backbone
from softtune.errors import RequestError
from softtune.serving import prompt_export
from softtune.serving.engine_config import EngineConfig
from softtune.serving.registry import AdapterInfo, Registry, Version
from softtune.serving.request_queue import RequestHandle
from softtune.serving.requests import GenerationRequest
from softtune.serving.sampling import IncrementalDetokenizer, SamplingParams
from softtune.serving.transformers_engine import TransformersEngine


class Served:
    """An engine with the adapters of a folder.

    Args:
        model: the base model's folder.
        folder: the adapters'.
        spool: where inference forms are kept.
        engine: makes the engine, of the base model, the config and the spool.
        device: where the base model computes.
        config: see ``EngineConfig``.
    """

    def __init__(
        self,
        model: str,
        folder: Path,
        spool: Path,
        engine: Callable[[Backbone, EngineConfig, Path], Any] = lambda backbone, config, _: TransformersEngine(
            backbone, config
        ),
        device: torch.device | str = "cpu",
        **config: Any,
    ) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = PeftModel(AutoModelForCausalLM.from_pretrained(model).eval().to(device))
        self.engine = engine(self.model.backbone, EngineConfig(**config), spool)
        self.registry = Registry(self._bake, spool, lambda version: None, model, self._compose)
        self.told: dict[GenerationRequest, list[Any]] = {}
        """What was told of each text."""
        for path in sorted(folder.iterdir()):
            self.registry.add(path.name, path)
            self.model.load_adapter(path, path.name)
        self.model.eval()

    def _bake(self, folder: Path, own: Path) -> AdapterInfo:
        adapter = prompt_export.load_adapter(self.model.backbone, folder)
        self.engine.export_adapter(adapter, own, as_kv=True)
        return AdapterInfo(adapter.config, None, self.engine)

    def _compose(self, parts: Sequence[Version], own: Path) -> AdapterInfo:
        prompt_export.compose_prompts([part.folder for part in parts], self.model.backbone, own)
        total = sum(part.info.num_virtual_tokens for part in parts)
        return AdapterInfo(PrefixTuningConfig(num_virtual_tokens=total), None, self.engine)

    @property
    def names(self) -> list[str | None]:
        """All adapters, and nothing for the base model."""
        return [*(version.name for version in self.registry.versions), None]

    def write(
        self, name: str | None, text: str, **asked: Any
    ) -> tuple[GenerationRequest, RequestHandle, list[Exception]]:
        """Ask for a text."""
        told: list[Any] = []
        ends = frozenset([self.tokenizer.eos_token_id])
        writer = IncrementalDetokenizer(self.tokenizer, ())
        job = GenerationRequest(
            self.ids(text), SamplingParams(**asked), writer, ends, lambda *piece: told.append(piece)
        )
        self.told[job] = told
        return job, *self.submit(name, job)

    def submit(self, name: str | None, job: Any) -> tuple[RequestHandle, list[Exception]]:
        """Ask for anything; gives what it fails by, too."""
        failures: list[Exception] = []
        version = None if name is None else self.registry.lease(name)
        handle = RequestHandle(version, job, failures.append, lambda: version and self.registry.release(version))
        try:
            self.engine.submit(handle)
        except RequestError:
            handle.end()
            raise
        return handle, failures

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def expected(self, name: str | None, text: str, tokens: int) -> list[int]:
        """What ``generate`` writes alone."""
        ids = torch.tensor([self.ids(text)], device=self.model.device)
        options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        if name is None:
            with self.model.disable_adapter():
                return self.model.generate(ids, **options)[0, ids.shape[1] :].tolist()
        return self.model.generate(ids, adapter_names=[name], **options)[0, ids.shape[1] :].tolist()

    def finish(self) -> None:
        """Step until nothing is left to do, and nothing is left behind."""
        while not self.engine.batch.is_idle:
            self.engine.step()
        assert not any(version.leases for version in self.registry.versions)
