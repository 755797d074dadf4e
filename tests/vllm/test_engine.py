"""What vLLM writes with adapters is what ``generate`` writes alone, whoever else is served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import vllm
from vllm import sampling_params
from vllm.inputs.engine import tokens_input
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.exceptions import EngineDeadError

from softtune.errors import AdapterError, TooLongError, UnsupportedModelError
from softtune.serving import prompt_export
from softtune.serving.engine_config import EngineConfig
from softtune.serving.request_queue import RequestHandle
from softtune.serving.requests import GenerationRequest, LoglikelihoodRequest
from softtune.serving.sampling import IncrementalDetokenizer, SamplingParams
from softtune.serving.transformers_engine import TransformersEngine
from softtune.serving.vllm.engine import VllmEngine
from tests.families import CAUSAL_LM, METHODS, save_adapter
from tests.serving.stepping import Served

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]  # vLLM itself warns

TEXTS = ["the sky is blue", "red", "cold warm " * 9 + "the green sky label : is"]
ANSWERS = ["warm", "cold", "bad text", "the sky is", "bad text is"]
LIMITS = {
    "all at once": {"num_kv_slots": 8192},
    "texts in parts": {"max_num_batched_tokens": 16, "max_num_seqs": 12},
    "few places": {"max_num_seqs": 3},
    "few blocks": {"num_kv_slots": 512, "max_num_seqs": 24},
}


class InVllm(Served):
    """vLLM's engine."""

    def __init__(self, model: str, folder: Path, spool: Path, gpus: int = 1, **config: Any) -> None:
        super().__init__(model, folder, spool, partial(VllmEngine, model, gpus=gpus), **config)

    def finish(self) -> None:
        super().finish()
        assert not self.engine._parts


@pytest.fixture(params=LIMITS)
def served(request: pytest.FixtureRequest, model: str, adapters: Path, tmp_path: Path) -> Iterator[InVllm]:
    """An engine for each model and each of some limits; a process has room for one engine at a time."""
    served = InVllm(model, adapters, tmp_path, **LIMITS[request.param])
    yield served
    served.engine.close()


def test_texts_are_those_of_generate_alone(served: InVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    preempted = []
    preempt = Scheduler._preempt_request
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda *a, **k: preempted.append(a) or preempt(*a, **k))
    asked = [(name, text, 5 + 9 * number) for number, text in enumerate(TEXTS) for name in served.names]
    jobs = [served.write(name, text, max_tokens=tokens) for name, text, tokens in asked]
    served.finish()
    for (name, text, tokens), (job, _, failures) in zip(asked, jobs, strict=True):
        assert not failures
        assert job.output_ids == served.expected(name, text, tokens), (name, text)
    assert bool(preempted) == (served.engine.config.num_kv_slots == 512)


def test_several_prefixes_in_front_of_a_text(model: str, adapters: Path, tmp_path: Path) -> None:
    served = InVllm(model, adapters, tmp_path, num_kv_slots=8192)
    names = ["prefix_31+prefix_1", "prefix_32+prefix_33", "prefix_70+prompt+p_tuning_v2", "prefix_1+prefix_31", None]
    asked = [(name, text) for name in [*names, "prefix_31", "prompt_suffix"] for text in TEXTS] * 2
    jobs = [served.write(name, text, max_tokens=12) for name, text in asked]
    served.finish()
    served.engine.close()
    for (name, text), (job, _, failures) in zip(asked, jobs, strict=True):
        assert not failures
        assert job.output_ids == served.expected(name, text, 12), (name, text)
    with pytest.raises(AdapterError, match="its virtual tokens are behind the text"):
        served.registry.lease("prefix_31+prompt_suffix")


@pytest.fixture
def few(llama: str, tmp_path: Path) -> Iterator[InVllm]:
    """An engine with two places, and three adapters."""
    for seed, kind in enumerate(("prefix", "prompt", "prompt_suffix")):
        save_adapter(llama, tmp_path / "adapters" / kind, METHODS[kind](task_type=CAUSAL_LM), seed)
    (tmp_path / "spool").mkdir()
    served = InVllm(llama, tmp_path / "adapters", tmp_path / "spool", max_num_seqs=2, max_num_waiting=40)
    yield served
    served.engine.close()


def ask(served: InVllm, name: str | None, text: str, tell: Callable[[list[float]], None]) -> list[Exception]:
    """Ask for the scores of ANSWERS; gives what it fails by."""
    return served.submit(
        name, LoglikelihoodRequest(served.ids(text), [served.ids(answer) for answer in ANSWERS], tell)
    )[1]


@pytest.mark.parametrize("logprobs", [None, 3])
def test_scores_are_those_of_a_forward_alone(few: InVllm, logprobs: int | None) -> None:
    company, *_ = few.write("prefix", "red", max_tokens=200, logprobs=logprobs)
    few.engine.step()
    found: dict[tuple[str | None, str], list[float]] = {}
    for name in few.names:
        for text in TEXTS:
            ask(few, name, text, lambda x, at=(name, text): found.update({at: x}))
    few.finish()
    assert len(company.output_ids) == 200  # there all the time
    assert len(found) == len(TEXTS) * len(few.names)
    for (name, text), scores in found.items():
        for answer, score in zip(ANSWERS, scores, strict=True):
            words, own = few.ids(text), few.ids(answer)
            labels = torch.tensor([[-100] * len(words) + own])
            acting = {"adapter_names": [name or "__base__"]}
            with torch.no_grad():
                logits = few.model(torch.tensor([words + own]), labels=labels, **acting).logits[0]
            expected = logits[len(words) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(own)[:, None]).sum()
            assert score == pytest.approx(float(expected), abs=1e-4), (name, text, answer)


def test_likeliest_tokens_are_the_same_beside_scores(few: InVllm) -> None:
    def write() -> GenerationRequest:
        return few.write("prefix", TEXTS[1], max_tokens=24, logprobs=3)[0]

    scores: list[list[float]] = []
    alone = write()
    few.finish()
    ask(few, "prompt", TEXTS[2], scores.append)
    after = write()
    for _ in range(40):  # more of them come all the time
        ask(few, "prompt", TEXTS[0], scores.append)
        few.engine.step()
    assert after.is_done
    few.finish()
    before = write()
    few.engine.step()
    scores.clear()
    ask(few, "prompt", TEXTS[0], scores.append)
    while not scores:
        few.engine.step()
    assert not before.is_done
    few.finish()
    for job in (after, before):
        assert job.output_ids == alone.output_ids
        for (choice, *_), (wanted, *_) in zip(few.told[job], few.told[alone], strict=True):
            assert choice.logprob == pytest.approx(wanted.logprob, abs=1e-4)
            assert choice.likeliest == pytest.approx(wanted.likeliest, abs=1e-4)


def test_more_tokens_than_vllm_takes_at_once_are_scored(few: InVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_params, "MAX_LOGPROB_TOKEN_IDS", 3)
    scores: list[list[float]] = []
    failures = few.submit(
        "prefix", LoglikelihoodRequest(few.ids("red"), [[token] for token in range(8)], scores.append)
    )[1]
    few.finish()
    assert not failures
    ids = torch.tensor([few.ids("red")])
    with torch.no_grad():
        logits = few.model(ids, adapter_names=["prefix"]).logits[0, -1]
    assert scores == [pytest.approx(logits.log_softmax(-1)[:8].tolist(), abs=1e-4)]


def test_who_cannot_be_told_fails_alone(few: InVllm) -> None:
    def tell(scores: list[float]) -> None:
        raise ValueError("nobody listens")

    good, *_ = few.write("prefix", TEXTS[0], max_tokens=8)
    failures = ask(few, "prompt", TEXTS[0], tell)
    few.finish()
    assert [str(error) for error in failures] == ["nobody listens"]
    assert good.output_ids == few.expected("prefix", TEXTS[0], 8)


def test_keys_and_values_are_left_to_the_connector(few: InVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, names = prompt_export.safe_open, []

    @contextmanager
    def watched(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with opened(*args, **kwargs) as file:
            yield Mock(wraps=file, get_tensor=lambda name: names.append(name) or file.get_tensor(name))

    monkeypatch.setattr(prompt_export, "safe_open", watched)
    for name in few.names:
        few.write(name, TEXTS[0], max_tokens=2)
    few.finish()
    assert names == ["vectors"]  # those of prompt_suffix


def test_tokens_are_told_as_the_other_engine_tells_them(few: InVllm) -> None:
    other = TransformersEngine(few.model.backbone, EngineConfig())
    asked: dict[str, Any] = {"max_tokens": 12, "logprobs": 3, "stop": ("is",)}
    ours, handle, _ = few.write("prefix", TEXTS[1], **asked)
    expected: list[Any] = []
    writer, ends = IncrementalDetokenizer(few.tokenizer, asked["stop"]), handle.request.ends
    job = GenerationRequest(
        few.ids(TEXTS[1]), SamplingParams(**asked), writer, ends, lambda *piece: expected.append(piece)
    )
    other.submit(RequestHandle(handle.version, job, lambda error: None))
    while not job.is_done:
        other.step()
    few.finish()
    assert [piece[1:] for piece in few.told[ours]] == [piece[1:] for piece in expected]
    for (choice, *_), (wanted, *_) in zip(few.told[ours], expected, strict=True):
        assert choice.token == wanted.token
        assert choice.logprob == pytest.approx(wanted.logprob, abs=1e-4)
        assert choice.likeliest == pytest.approx(wanted.likeliest, abs=1e-4)


def test_a_seed_draws_the_same_tokens_in_any_company(few: InVllm) -> None:
    asked = {"max_tokens": 12, "temperature": 1.5, "top_p": 0.9, "seed": 5}
    alone, *_ = few.write("prefix", TEXTS[0], **asked)
    few.finish()
    again, *_ = few.write("prefix", TEXTS[0], **asked)
    few.write("prompt", TEXTS[2], max_tokens=9, temperature=1.0)
    other, *_ = few.write("prefix", TEXTS[0], **{**asked, "seed": 6})
    few.finish()
    assert again.output_ids == alone.output_ids
    assert other.output_ids != alone.output_ids


def test_who_gives_up_leaves_a_place(few: InVllm) -> None:
    first, handle, *_ = few.write("prefix", TEXTS[0], max_tokens=200)
    second, other, *_ = few.write("prompt", TEXTS[0], max_tokens=200)
    last, *_ = few.write(None, TEXTS[2], max_tokens=4)
    few.engine.step()
    handle.is_cancelled = other.is_cancelled = True
    few.finish()
    assert len(first.output_ids) + len(second.output_ids) < 20
    assert last.output_ids == few.expected(None, TEXTS[2], 4)


def test_a_version_lasts_as_long_as_its_requests(few: InVllm) -> None:
    folder = few.registry._folder.parent / "adapters"
    old, *_ = few.write("prefix", TEXTS[0], max_tokens=8)
    few.engine.step()
    few.registry.add("prefix", folder / "prompt")
    new, *_ = few.write("prefix", TEXTS[0], max_tokens=8)
    few.finish()
    assert old.output_ids == few.expected("prefix", TEXTS[0], 8)
    assert new.output_ids == few.expected("prompt", TEXTS[0], 8)
    assert old.output_ids != new.output_ids


def test_what_does_not_fit_is_refused(few: InVllm) -> None:
    with pytest.raises(TooLongError, match=r"3 tokens of text, 250 to write and 5 virtual ones are more than the 256"):
        few.write("prefix", "the sky", max_tokens=250)
    longest, *_, failures = few.write("prefix", "the sky", max_tokens=248, stop=("nothing",))
    scores: list[list[float]] = []
    few.submit("prefix", LoglikelihoodRequest([3] * 249, [[4, 5]], scores.append))
    with pytest.raises(TooLongError, match="250 tokens of text, 1 to write and 5 virtual ones are more than the 255"):
        few.submit("prefix", LoglikelihoodRequest([3] * 250, [[4, 5]], scores.append))
    few.finish()
    assert not failures
    assert longest.is_done
    assert len(scores) == 1


REFUSED = {
    "infix": "a prefix behind the text",
    "prefix_last": "a prefix in some layers alone",
    "bitfit_added": "trained biases",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_vllm_cannot_take_are_refused(few: InVllm, kind: str, tmp_path: Path) -> None:
    save_adapter(few.model.backbone.model.name_or_path, tmp_path / kind, METHODS[kind](task_type=CAUSAL_LM), 1)
    with pytest.raises(UnsupportedModelError) as refusal:
        few.registry.add(kind, tmp_path / kind)
    assert str(refusal.value) == f"vLLM takes no adapter with {REFUSED[kind]}: serve it by the engine transformers"


def test_requests_that_the_connector_cannot_serve_end_alone(few: InVllm, llama: str, tmp_path: Path) -> None:
    name = few.registry.versions[0].folder.name
    bad = {
        "unknown": ("nobody", "nobody", [0] * 40),
        "a path": ("../spool/" + name, "../spool/" + name, [0] * 40),
        "another salt": (name, "mine", [0] * 40),
        "no salt": (name, None, [0] * 40),
        "placeholders alone": (name, name, [0] * 5),
        "prompt_logprobs": (name, name, [0] * 40),
    }
    good, *_ = few.write("prefix", TEXTS[0], max_tokens=20)
    few.engine.step()
    llm = few.engine._llm
    for number, (adapter, salt, ids) in bad.items():
        params = vllm.SamplingParams(detokenize=False, extra_args={"kv_transfer_params": {"adapter": adapter}})
        params.prompt_logprobs = 1 if number == "prompt_logprobs" else None
        llm.add_request(number, tokens_input(ids, cache_salt=salt), params)
    reasons = {}
    while llm.has_unfinished_requests():
        for output in llm.step():
            few.engine._take(output)
            reasons[output.request_id] = output.outputs[0].finish_reason
    assert {reasons[number] for number in bad} == {"error"}
    assert good.output_ids == few.expected("prefix", TEXTS[0], 20)
    few.finish()


@pytest.fixture
def shared(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InVllm]:
    """An engine with a process for the scheduler, and two more that share each layer."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    for seed, kind in enumerate(("prefix", "prompt_suffix")):
        save_adapter(llama, tmp_path / "adapters" / kind, METHODS[kind](task_type=CAUSAL_LM), seed)
    (tmp_path / "spool").mkdir()
    served = InVllm(llama, tmp_path / "adapters", tmp_path / "spool", gpus=2)
    yield served
    served.engine.close()


def test_processes_that_share_layers_write_the_same(shared: InVllm) -> None:
    jobs = [(name, text, shared.write(name, text, max_tokens=12)) for text in TEXTS for name in shared.names]
    shared.finish()
    for name, text, (job, *_) in jobs:
        assert job.output_ids == shared.expected(name, text, 12), (name, text)


def test_everyone_hears_of_processes_that_die(shared: InVllm) -> None:
    asked = [shared.write(name, text, max_tokens=100) for text in TEXTS for name in shared.names]
    shared.engine.step()
    assert shared.engine.is_alive
    for process in shared.engine._llm.engine_core.resources.engine_manager.processes:
        process.kill()
    with pytest.raises(EngineDeadError) as death:
        shared.finish()
    assert not shared.engine.is_alive
    shared.engine.batch.abort([*shared.engine.batch.running], death.value)
    assert all(job.is_done or failures == [death.value] for job, _, failures in asked)
    late = shared.write("prefix", TEXTS[0])
    shared.finish()
    assert isinstance(late[2][0], EngineDeadError)
