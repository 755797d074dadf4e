"""What vLLM writes with adapters is what ``generate`` writes alone, whoever else is served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import CAUSAL_LM, METHODS
from tests.vllm.conftest import save_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.v1.core.sched.scheduler import Scheduler

from softtune import PeftModel
from softtune.errors import RequestError, TooLongError, UnsupportedModelError
from softtune.serving import baking
from softtune.serving.jobs import Scoring, Writing
from softtune.serving.limits import Limits
from softtune.serving.registry import Facts, Registry
from softtune.serving.sampling import Choice, Sampling, Writer
from softtune.serving.vllm.engine import VllmEngine
from softtune.serving.waiting import Ticket

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]  # vLLM itself warns

TEXTS = ["the sky is blue", "red", "cold warm " * 9 + "the green sky label : is"]
LIMITS = {
    "all at once": {"slots": 8192},
    "texts in parts": {"tokens": 16, "rows": 12},
    "few places": {"rows": 3},
    "few blocks": {"slots": 512, "rows": 24},
}


class Served:
    """An engine that is stepped by hand, with the adapters of a folder."""

    def __init__(self, model: str, folder: Path, spool: Path, **limits: Any) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = PeftModel(AutoModelForCausalLM.from_pretrained(model).eval())
        self.engine = VllmEngine(model, self.model.backbone, Limits(**limits), spool)
        self.registry = Registry(self._bake, spool, lambda version: None)
        for path in sorted(folder.iterdir()):
            self.registry.add(path.name, path)
            self.model.load_adapter(path, path.name)
        self.model.eval()

    def _bake(self, folder: Path, own: Path) -> Facts:
        adapter = baking.load(self.model.backbone, folder)
        self.engine.keep(adapter, own)
        return Facts(adapter.config, None, self.engine)

    @property
    def names(self) -> list[str | None]:
        """All adapters, and nothing for the base model."""
        return [*(version.name for version in self.registry.versions), None]

    def write(self, name: str | None, text: str, **asked: Any) -> tuple[Writing, Ticket, list[Any], list[Exception]]:
        """Ask for a text."""
        told: list[Any] = []
        ends = frozenset([self.tokenizer.eos_token_id])
        job = Writing(
            self.ids(text), Sampling(**asked), Writer(self.tokenizer, ()), ends, lambda *piece: told.append(piece)
        )
        ticket, failures = self.submit(name, job)
        return job, ticket, told, failures

    def submit(self, name: str | None, job: Any) -> tuple[Ticket, list[Exception]]:
        failures: list[Exception] = []
        version = None if name is None else self.registry.lease(name)
        ticket = Ticket(version, job, failures.append, lambda: version and self.registry.release(version))
        try:
            self.engine.submit(ticket)
        except RequestError:
            ticket.end()
            raise
        return ticket, failures

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def expected(self, name: str | None, text: str, tokens: int) -> list[int]:
        """What ``generate`` writes alone."""
        ids = torch.tensor([self.ids(text)])
        options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        if name is None:
            with self.model.disable_adapter():
                return self.model.generate(ids, **options)[0, ids.shape[1] :].tolist()
        return self.model.generate(ids, adapter_names=[name], **options)[0, ids.shape[1] :].tolist()

    def finish(self) -> None:
        """Step until nothing is left to do, and nothing is left behind."""
        while self.engine.running or len(self.engine.waiting):
            self.engine.step()
        assert not self.engine._parts
        assert not any(version.leases for version in self.registry.versions)


@pytest.fixture(scope="module", params=LIMITS)
def served(
    request: pytest.FixtureRequest, model: str, adapters: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """An engine for each model and each of some limits."""
    served = Served(model, adapters, tmp_path_factory.mktemp("spool"), **LIMITS[request.param])
    yield served
    served.engine.close()


def test_texts_are_those_of_generate_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    preempted = []
    preempt = Scheduler._preempt_request
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda *a, **k: preempted.append(a) or preempt(*a, **k))
    asked = [(name, text, 5 + 9 * number) for number, text in enumerate(TEXTS) for name in served.names]
    jobs = [served.write(name, text, max_tokens=tokens) for name, text, tokens in asked]
    served.finish()
    for (name, text, tokens), (job, _, _, failures) in zip(asked, jobs, strict=True):
        assert not failures
        assert job.written == served.expected(name, text, tokens), (name, text)
    assert bool(preempted) == (served.engine.limits.slots == 512)
