"""Which tokens a step runs, who waits for room, and who gives it back; no model runs here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from softtune import PeftModel, UnsupportedModelError
from softtune.backbone import Backbone
from softtune.methods.prompt import KeyValue, Prompt
from softtune.serving.engine_config import EngineConfig
from softtune.serving.prompt_export import PROMPT_NAME, save_prompt
from softtune.serving.registry import Version
from softtune.serving.request_queue import RequestHandle
from softtune.serving.requests import GenerationRequest
from softtune.serving.sampling import SamplingParams
from softtune.serving.scheduler import Scheduler
from tests.families import CAUSAL_LM, base_model

H, K, LAYERS = 2, 6, 2
TOKEN_BYTES = LAYERS * 2 * H * K * 4


@pytest.fixture
def backbone(llama: str) -> Backbone:
    return PeftModel(AutoModelForCausalLM.from_pretrained(llama).eval()).backbone


class Scheduled:
    """A scheduler, whose plans are carried out without a model: every request goes on with the same token."""

    def __init__(self, backbone: Backbone, folder: Path, **config: int) -> None:
        self.backbone = backbone
        self.folder = folder
        self.scheduler = Scheduler(backbone, EngineConfig(**config))
        self.names: dict[RequestHandle[Any], str] = {}
        self.failures: list[str] = []

    def version(self, name: str, virtual: int) -> Version:
        """An adapter with a prefix."""
        (self.folder / name).mkdir()
        part = torch.zeros(H, virtual, K)
        prefixes = {layer.place: KeyValue(part, part) for layer in self.backbone.attention_layers}
        prompt = Prompt(num_virtual_tokens=virtual, prefixes=prefixes)
        save_prompt(prompt, self.backbone, self.folder / name)
        info: Any = SimpleNamespace(num_virtual_tokens=virtual)
        return Version(name, 1, info, self.folder / name)

    def add(self, name: str, tokens: int, max_tokens: int, version: Version | None = None) -> RequestHandle[Any]:
        """A generation from a text of some tokens."""
        silent: Any = SimpleNamespace(append=lambda token: ("", False), flush=str)
        request = GenerationRequest(
            [5] * tokens, SamplingParams(max_tokens=max_tokens), silent, frozenset(), lambda *piece: None
        )
        handle = RequestHandle(version, request, lambda error: self.failures.append(name))
        self.names[handle] = name
        self.scheduler.batch.queue.add(handle)
        return handle

    def step(self) -> dict[str, int]:
        """Carry out a plan; the number of tokens of each request, in the plan's order."""
        plan = self.scheduler.schedule()
        for _, chunks in plan:
            for chunk in chunks:
                slots = self.scheduler.pool.allocate(chunk.count)
                chunk.sequence.slots = torch.cat([chunk.sequence.slots, slots])
        for handle, chunks in plan:
            logits = [torch.eye(9)[3].repeat(chunk.keep, 1) for chunk in chunks]
            self.scheduler.batch.process(handle, handle.request.process_logits, logits)
        return {self.names[handle]: sum(chunk.count for chunk in chunks) for handle, chunks in plan}

    @property
    def running(self) -> list[str]:
        return [self.names[handle] for handle in self.scheduler.batch.running]

    @property
    def waiting(self) -> list[str]:
        return [self.names[handle] for handle in self.scheduler.batch.queue]

    @property
    def num_free(self) -> int:
        return self.scheduler.pool.num_free

    def finish(self) -> None:
        """Run all to their end, after which the pool is empty."""
        for _ in range(200):
            self.step()
        assert self.scheduler.batch.is_idle
        self.scheduler.batch.adapter_cache.shrink(0)
        assert self.num_free == self.scheduler.config.num_kv_slots
        assert all(len(handle.request.output_ids) == handle.request.params.max_tokens for handle in self.names)


def test_texts_are_read_in_parts_beside_tokens_that_are_written(backbone: Backbone, tmp_path: Path) -> None:
    own = Scheduled(backbone, tmp_path, max_num_batched_tokens=16)
    for name in "abc":
        own.add(name, tokens=10, max_tokens=4)
    assert own.step() == {"a": 10, "b": 6}
    assert own.step() == {"a": 1, "b": 4, "c": 10}
    assert list(own.step().items()) == [("a", 1), ("b", 1), ("c", 1)]
    own.finish()


def test_what_is_being_written_comes_before_texts(backbone: Backbone, tmp_path: Path) -> None:
    own = Scheduled(backbone, tmp_path, max_num_batched_tokens=4)
    own.add("long", tokens=9, max_tokens=1)
    own.add("short", tokens=1, max_tokens=3)  # whose only token is as good as one that is written
    for left in (3, 3, 3):
        assert list(own.step().items()) == [("short", 1), ("long", left)]
    assert own.running == []


def test_no_step_has_more_tokens_than_its_budget(backbone: Backbone, tmp_path: Path) -> None:
    own = Scheduled(backbone, tmp_path, max_num_batched_tokens=2)
    for name in "abc":
        own.add(name, tokens=1, max_tokens=3)
    assert own.step() == {"a": 1, "b": 1}
    assert own.step() == {"a": 1, "b": 1}
    assert own.step() == {"a": 1, "b": 1}
    assert own.step() == {"c": 1}
    own.finish()


def test_a_text_waits_until_the_pool_has_room_for_it(backbone: Backbone, tmp_path: Path) -> None:
    own = Scheduled(backbone, tmp_path, num_kv_slots=30)
    own.add("first", tokens=20, max_tokens=3)
    own.add("long", tokens=15, max_tokens=1)
    own.add("short", tokens=1, max_tokens=1)
    assert own.step() == {"first": 20}
    assert (own.running, own.waiting) == (["first"], ["long", "short"])  # which does not overtake
    own.step()
    own.step()
    assert (own.running, own.waiting, own.num_free) == ([], ["long", "short"], 30)
    assert own.step() == {"long": 15, "short": 1}
    own.finish()


def test_tokens_that_are_still_to_be_read_need_room_too(backbone: Backbone, tmp_path: Path) -> None:
    own = Scheduled(backbone, tmp_path, num_kv_slots=30, max_num_batched_tokens=5)
    own.add("first", tokens=20, max_tokens=1)
    own.add("next", tokens=11, max_tokens=1)
    own.add("last", tokens=10, max_tokens=1)
    assert own.step() == {"first": 5}
    assert own.running == ["first"]  # 15 and 11 tokens do not go into 25 slots
    own.finish()
    roomy = Scheduled(backbone, tmp_path, num_kv_slots=31, max_num_batched_tokens=5)
    roomy.add("first", tokens=20, max_tokens=1)
    roomy.add("next", tokens=11, max_tokens=1)
    roomy.step()
    assert roomy.running == ["first", "next"]
    roomy.finish()


def test_virtual_tokens_need_room_as_well(backbone: Backbone, tmp_path: Path) -> None:
    own = Scheduled(backbone, tmp_path, num_kv_slots=30)
    adapter = own.version("x", virtual=6)
    own.add("first", tokens=20, max_tokens=2)
    own.add("adapted", tokens=5, max_tokens=1, version=adapter)
    own.step()
    assert own.running == ["first"]
    own.finish()


def test_the_youngest_request_gives_its_slots_back(backbone: Backbone, tmp_path: Path) -> None:
    own = Scheduled(backbone, tmp_path, num_kv_slots=24)
    old, young = own.add("old", tokens=10, max_tokens=12), own.add("young", tokens=10, max_tokens=6)
    assert own.step() == {"old": 10, "young": 10}
    assert own.step() == {"old": 1, "young": 1}
    assert own.step() == {"old": 1, "young": 1}
    assert own.num_free == 0
    own.add("waits", tokens=1, max_tokens=1)
    assert own.step() == {"old": 1}
    assert (own.running, own.waiting) == (["old"], ["young", "waits"])
    assert (own.num_free, len(young.request.output_ids)) == (11, 3)
    assert own.step() == {"old": 1}  # there is no room for 13 tokens
    while not old.request.is_done:
        own.step()
    assert own.step() == {"young": 13, "waits": 1}  # what it has written is read, not written again
    own.finish()


def test_a_full_pool_takes_from_the_youngest_of_several(backbone: Backbone, tmp_path: Path) -> None:
    own = Scheduled(backbone, tmp_path, num_kv_slots=14)
    for name in "abc":
        own.add(name, tokens=4, max_tokens=6)
    assert own.step() == {"a": 4, "b": 4, "c": 4}
    assert own.step() == {"a": 1, "b": 1}  # which leaves c no slot
    assert own.running == ["a", "b", "c"]
    assert own.step() == {"a": 1, "b": 1}  # for which c has given back its four
    assert (own.running, own.waiting, own.num_free) == (["a", "b"], ["c"], 2)
    own.finish()


def test_each_token_of_a_step_finds_a_slot(backbone: Backbone, tmp_path: Path) -> None:
    own = Scheduled(backbone, tmp_path, num_kv_slots=10)
    for name, tokens in [("a", 4), ("b", 4), ("c", 1)]:
        own.add(name, tokens=tokens, max_tokens=3)
    own.step()
    assert own.num_free == 1
    assert own.step() == {"a": 1, "b": 1}  # the second slot is that of c
    assert (own.running, own.waiting) == (["a", "b"], ["c"])
    own.finish()


def test_an_adapters_prefix_is_there_once(backbone: Backbone, tmp_path: Path) -> None:
    own = Scheduled(backbone, tmp_path, num_kv_slots=100)
    adapter = own.version("x", virtual=7)
    for name in "ab":
        own.add(name, tokens=3, max_tokens=2, version=adapter)
    own.step()
    assert own.num_free == 100 - 7 - 2 * 3
    assert own.scheduler.batch.adapter_cache.nbytes == 7 * TOKEN_BYTES
    own.step()
    assert (own.num_free, own.scheduler.batch.is_idle) == (93, True)
    own.finish()


def test_idle_prefixes_make_room_before_any_request_does(backbone: Backbone, tmp_path: Path) -> None:
    own = Scheduled(backbone, tmp_path, num_kv_slots=24)
    adapter = own.version("x", virtual=8)
    own.add("adapted", tokens=1, max_tokens=1, version=adapter)
    own.step()
    assert own.num_free == 16
    for name in "ab":  # which have room, since the adapter is idle
        own.add(name, tokens=10, max_tokens=3)
    assert own.step() == {"a": 10, "b": 6}
    assert (own.num_free, own.scheduler.batch.adapter_cache.nbytes) == (0, 8 * TOKEN_BYTES)
    assert own.step() == {"a": 1, "b": 4}
    assert (own.num_free, own.scheduler.batch.adapter_cache.nbytes) == (3, 0)
    assert own.running == ["a", "b"]
    own.finish()


def test_a_prefix_takes_the_place_of_an_idle_one(backbone: Backbone, tmp_path: Path) -> None:
    own = Scheduled(backbone, tmp_path, num_kv_slots=24)
    for name, virtual, tokens in [("x", 8, 1), ("y", 18, 4)]:
        own.add(name, tokens=tokens, max_tokens=1, version=own.version(name, virtual=virtual))
        assert own.step() == {name: tokens}
        assert own.scheduler.batch.adapter_cache.nbytes == virtual * TOKEN_BYTES
    own.finish()


def test_nothing_makes_room_for_what_the_budget_leaves_out(backbone: Backbone, tmp_path: Path) -> None:
    own = Scheduled(backbone, tmp_path, num_kv_slots=10, max_num_batched_tokens=2)
    own.add("adapted", tokens=1, max_tokens=1, version=own.version("x", virtual=8))
    own.step()
    for name in "abc":
        own.add(name, tokens=1, max_tokens=1)
    assert own.step() == {"a": 1, "b": 1}
    assert own.scheduler.batch.adapter_cache.nbytes == 8 * TOKEN_BYTES
    own.finish()


def test_idle_prefixes_are_kept_up_to_the_configured_size(backbone: Backbone, tmp_path: Path) -> None:
    own = Scheduled(backbone, tmp_path, adapter_cache_bytes=12 * TOKEN_BYTES)
    for name in "xyz":
        own.add(name, tokens=1, max_tokens=1, version=own.version(name, virtual=5))
    own.step()
    assert own.scheduler.batch.adapter_cache.nbytes == 15 * TOKEN_BYTES
    own.step()
    assert own.scheduler.batch.adapter_cache.nbytes == 10 * TOKEN_BYTES
    own.finish()


def test_an_adapter_whose_file_is_gone_fails_its_own_requests(backbone: Backbone, tmp_path: Path) -> None:
    own = Scheduled(backbone, tmp_path, num_kv_slots=64)
    adapter = own.version("x", virtual=5)
    (adapter.folder / PROMPT_NAME).unlink()
    broken = own.add("broken", tokens=3, max_tokens=2, version=adapter)
    own.add("good", tokens=3, max_tokens=2)
    assert own.step() == {"good": 3}
    assert own.failures == ["broken"]
    del own.names[broken]
    own.finish()


def test_a_model_that_is_no_decoder_of_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="cannot read several texts without padding"):
        Scheduler(PeftModel(base_model("mamba", CAUSAL_LM)).backbone, EngineConfig())
