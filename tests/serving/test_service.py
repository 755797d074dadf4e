"""Requests from coroutines to one base model: right answers, named refusals, and no lease that is left behind."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from softtune import PeftModel
from softtune.errors import (
    AdapterError,
    CheckpointError,
    ClosedError,
    ConfigError,
    FullError,
    RequestError,
    TooLongError,
    UnsupportedModelError,
)
from softtune.serving.engine_config import EngineConfig
from softtune.serving.registry import Version
from softtune.serving.requests import LoglikelihoodRequest
from softtune.serving.sampling import SamplingParams
from softtune.serving.service import Service, TokenDelta, asks_for
from tests.families import SEQ_2_SEQ_LM, SEQ_CLS, P, adapted
from tests.serving.test_tasks import LABELLED, ROWS, trained
from tests.training.test_recipe_task import recipe

TEXT = "the sky is"
WAITING = 30
"""Seconds to wait for what happens at once."""


@pytest.fixture(scope="module")
def service(llama: str, adapters: Path) -> Iterator[Service]:
    """A service at work, with a few adapters."""
    service = Service(llama, EngineConfig(num_kv_slots=200))
    for name in ("prefix", "prompt"):
        service.registry.add(name, adapters / name)
    service.start()
    yield service
    service.close(1)
    assert service.thread.is_idle
    assert not any(version.leases for version in service.registry.versions)


@pytest.fixture
def idle(llama: str, adapters: Path) -> Service:
    """A service whose thread is not started, with places for two requests and an adapter."""
    service = Service(llama, EngineConfig(num_kv_slots=200, max_num_seqs=1, max_num_waiting=1))
    service.registry.add("prefix", adapters / "prefix")
    return service


def write(service: Service, name: str | None, input_ids: list[int], **params: Any) -> list[TokenDelta]:
    """A whole generation."""

    async def collect() -> list[TokenDelta]:
        version = None if name is None else service.registry.lease(name)
        try:
            return [piece async for piece in service.generate(version, input_ids, SamplingParams(**params))]
        finally:
            if version is not None:
                service.registry.release(version)

    return asyncio.run(asyncio.wait_for(collect(), WAITING))


def alone(llama: str, folder: Path | None, text: str, tokens: int) -> list[int]:
    """What ``generate`` writes."""
    base, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    model = base if folder is None else PeftModel.from_pretrained(base, folder)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", [None, "prefix", "prompt"])
def test_a_generation_is_that_of_the_adapter_alone(
    service: Service, llama: str, adapters: Path, name: str | None
) -> None:
    pieces = write(service, name, service.tokenize(TEXT), max_tokens=7)
    expected = alone(llama, name and adapters / name, TEXT, 7)
    assert [piece.choice.token for piece in pieces] == expected
    assert [bool(piece.reason) for piece in pieces] == [False] * (len(expected) - 1) + [True]
    assert "".join(piece.text for piece in pieces) == service.tokenizer.decode(expected, skip_special_tokens=True)


def test_special_tokens_among_the_stop_strings_end_a_text(service: Service) -> None:
    assert service._ends(()) == {1}
    assert service._ends(("red", "<unk>")) == {1, 2}  # text shows the first one


def test_scores_come_back_to_who_asked(service: Service) -> None:
    text = service.tokenize(TEXT)

    async def score(version: Version) -> Any:
        return await service.result_of(
            service.engine, version, lambda tell: LoglikelihoodRequest(text, [[3], [4]], tell)
        )

    with service.lease("prefix") as version:
        first, second = asyncio.run(score(version))
    logprobs = {}
    for piece in write(service, "prefix", text, max_tokens=1, logprobs=17):
        logprobs = piece.choice.likeliest
    assert (first, second) == (pytest.approx(logprobs[3], abs=1e-5), pytest.approx(logprobs[4], abs=1e-5))


def test_an_error_reaches_who_asked(service: Service) -> None:
    async def ask(version: Version) -> Any:
        return await service.result_of(service.engine, version, lambda tell: LoglikelihoodRequest([3], [[10**6]], tell))

    with service.lease("prefix") as version, pytest.raises(IndexError):
        asyncio.run(ask(version))
    assert write(service, None, [3, 4], max_tokens=3)  # in later steps
    assert version.leases == 0


def test_a_version_lasts_until_its_request_has_ended(idle: Service) -> None:
    async def begin_and_leave(version: Version) -> None:
        first = asyncio.ensure_future(anext(idle.generate(version, [3, 4], SamplingParams(max_tokens=50))))
        while not len(idle.engine.batch.queue):
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)

    with idle.lease("prefix") as version:
        asyncio.run(begin_and_leave(version))
        assert version.leases == 2  # its own, and the request's
        idle.engine.step()
        assert version.leases == 1
    assert version.leases == 0


def test_what_cannot_be_submitted_leaves_no_lease(idle: Service) -> None:
    with pytest.raises(RequestError, match="the text is empty: write some words"):
        write(idle, "prefix", [])
    with pytest.raises(TooLongError):
        write(idle, "prefix", [3], max_tokens=100)
    version = idle.registry.versions[0]
    for _ in range(2):
        idle.engine.batch.queue.add(SimpleNamespace(version=version))  # type: ignore[arg-type]
    with pytest.raises(FullError):
        write(idle, "prefix", [3])
    idle.engine.batch.queue.is_closed = True
    with pytest.raises(ClosedError):
        write(idle, "prefix", [3])
    assert version.leases == 0


def test_a_lease_ends_with_its_block(idle: Service) -> None:
    with idle.lease("prefix") as version:
        assert (version.name, version.leases) == ("prefix", 1)
    assert version.leases == 0
    with pytest.raises(ValueError, match="inside"), idle.lease("prefix"):
        raise ValueError("inside")
    assert version.leases == 0
    with pytest.raises(AdapterError), idle.lease("nobody"):
        pass


def test_token_ids_outside_the_vocabulary_are_refused(idle: Service) -> None:
    assert idle.check_token_ids([0, 16]) == [0, 16]
    assert idle.check_token_ids([]) == []
    with pytest.raises(RequestError, match="17 is no token: they go from 0 to 16"):
        idle.check_token_ids([0, 17])


def test_texts_are_encoded_one_at_a_time(llama: str) -> None:
    service = Service(llama)
    words = ["red", "sky"] * 20

    def cut(_: int) -> int:
        return service.with_tokenizer(
            lambda own: len(own(words, is_split_into_words=True, truncation=True, max_length=8)["input_ids"])
        )

    with ThreadPoolExecutor(6) as threads:
        found = threads.map(lambda i: cut(i) if i % 2 else len(service.tokenize(" ".join(words))), range(2000))
    assert {*found} == {8, len(service.tokenize(" ".join(words)))}


def test_a_text_may_fill_what_the_adapter_leaves(idle: Service) -> None:
    version = idle.registry.versions[0]
    assert idle.max_new_tokens(None, [3] * 10) == 54
    assert idle.max_new_tokens(version, [3] * 10) == 54 - P
    assert idle.max_new_tokens(version, [3] * 100) == 1


def test_the_space_at_a_templates_end_is_the_answers(idle: Service) -> None:
    spaced: Any = SimpleNamespace(info=SimpleNamespace(separator=" "))
    plain: Any = SimpleNamespace(info=SimpleNamespace(separator=""))
    for version, text, expected in [
        (spaced, "red ", "red"),
        (spaced, "red  ", "red "),
        (spaced, "red", "red"),
        (plain, "red ", "red "),
        (None, "red ", "red "),
    ]:
        assert idle.tokenize_prompt(version, text) == idle.tokenize(expected)


def test_conversations_need_a_template_that_takes_them(idle: Service) -> None:
    messages = [{"role": "user", "content": "red"}]
    with pytest.raises(RequestError, match="knows no conversations: use /v1/completions"):
        idle.tokenize_chat(messages)
    idle.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} text{% endif %}"
    )
    assert idle.tokenize_chat(messages) == idle.tokenize("red text")
    idle.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match=r"do not fit the model's template \(roles must alternate\): change their"):
        idle.tokenize_chat(messages)


def test_a_base_model_that_writes_nothing_is_served_for_its_heads(base_models: dict[str, str], tmp_path: Path) -> None:
    service = Service(base_models["bert"])
    with pytest.raises(UnsupportedModelError, match="is no decoder and goes on from no text"):
        _ = service.engine
    with pytest.raises(UnsupportedModelError, match="is no decoder and goes on from no text"):
        service.check_writes(None)
    labels = recipe(
        tmp_path, base_models["bert"], ROWS, **{**LABELLED, "task": SEQ_CLS, "method": "BITFIT"}, options={}
    )
    folder = trained(tmp_path / "adapters", {"labels": labels})
    service.registry.add("labels", folder / "labels")
    with service.lease("labels") as version, pytest.raises(RequestError) as refusal:
        service.check_writes(version)
    assert str(refusal.value) == "labels has a head and writes no texts: ask it for labels"
    assert len(service.thread.engines) == 1
    (folder / "labels" / "recipe.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"there is no recipe.yaml, which names the labels: copy"):
        service.registry.add("labels", folder / "labels")


def test_virtual_tokens_within_a_text_write_nothing(idle: Service) -> None:
    version: Any = SimpleNamespace(name="within", info=SimpleNamespace(engine=None, has_places_within=True))
    with pytest.raises(RequestError, match="within has virtual tokens within its text: ask it for labels, by records"):
        idle.check_writes(version)


def test_adapters_that_no_engine_runs_are_refused(idle: Service, tmp_path: Path) -> None:
    adapted("t5", SEQ_2_SEQ_LM, "prefix").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="adapters for SEQ_2_SEQ_LM are not served: use a decoder's"):
        idle.registry.add("translates", tmp_path)


def test_a_base_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Service(str(tmp_path / "nowhere"))


def test_a_closed_service_leaves_no_files(llama: str, adapters: Path, tmp_path: Path) -> None:
    service = Service(llama, EngineConfig(num_kv_slots=64))
    shutil.copytree(adapters / "prefix", tmp_path / "one")
    folder = service.registry.add("one", tmp_path / "one").folder
    assert not service.is_alive
    service.start()
    assert service.is_alive
    service.close(0)
    assert not service.is_alive
    assert not folder.parent.exists()


def test_an_adapter_without_a_task_is_asked_for_texts() -> None:
    task: Any = SimpleNamespace(asks_for="labels")
    assert (asks_for(None), asks_for(task)) == ("texts", "labels")
