"""The connector writes each adapter's keys and values where vLLM has made room for them, and refuses in time."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from softtune.serving.prompt_export import PROMPT_NAME
from softtune.serving.vllm import connector as connector_file
from softtune.serving.vllm.connector import Load, Loads, PromptConnector
from tests.serving.vllm.test_prompts import H, K, L, write

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]  # vLLM itself warns

SIZE = 4
"""Tokens of a block."""
BLOCKS = 20
P = 10


class Layer:
    """A layer's cache, and how vLLM writes into it."""

    def __init__(self, heads: int) -> None:
        self.kv_cache = torch.zeros(2, BLOCKS * SIZE, heads, K)
        self.impl = self

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        assert layer is self
        assert key.is_contiguous()
        assert value.is_contiguous()
        cache[0, slots], cache[1, slots] = key, value


class Connected:
    """The connector of vLLM's scheduler, and that of one of its workers."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int = 0, workers: int = 1) -> None:
        monkeypatch.setattr(connector_file, "get_tensor_model_parallel_rank", lambda: rank)
        model = SimpleNamespace(
            dtype=torch.float32,
            get_total_num_kv_heads=lambda: H,
            get_total_num_hidden_layers=lambda: L,
            get_head_size=lambda: K,
            get_num_kv_heads=lambda parallel: H // parallel.tensor_parallel_size,
        )
        config = SimpleNamespace(
            model_config=model,
            kv_transfer_config=SimpleNamespace(kv_connector_extra_config={"folder": str(folder)}),
            cache_config=SimpleNamespace(block_size=SIZE),
            parallel_config=SimpleNamespace(tensor_parallel_size=workers),
            device_config=SimpleNamespace(device_type="cpu"),
        )
        self.scheduler = PromptConnector(config, KVConnectorRole.SCHEDULER, None)
        self.worker = PromptConnector(config, KVConnectorRole.WORKER, None)
        self.layers = [Layer(H // workers) for _ in range(L)]
        self.context = SimpleNamespace(
            no_compile_layers={
                **{f"model.layers.{number}.self_attn.attn": layer for number, layer in enumerate(self.layers)},
                "model.layers.0.mlp": SimpleNamespace(kv_cache=None),
            }
        )

    def schedule(self, request: Any, blocks: list[int], computed: int = 0) -> int:
        """The number of tokens that vLLM leaves to the connector, for which it has blocks."""
        count, is_later = self.scheduler.get_num_new_matched_tokens(request, computed)
        assert not is_later
        own = SimpleNamespace(get_block_ids=lambda: (blocks,))
        self.scheduler.update_state_after_alloc(request, own, count)
        return count

    def load(self) -> set[int]:
        """Let the worker load what is scheduled; the blocks that it could not write."""
        self.worker.bind_connector_metadata(self.scheduler.build_connector_meta(None))
        self.worker.start_load_kv(self.context)
        return self.worker.get_block_ids_with_load_errors()

    def expected(self, *written: tuple[Tensor, int, list[int]], heads: slice = slice(None)) -> list[Tensor]:
        """Each layer's cache after writing prompts from a token on, one number at a time."""
        caches = [torch.zeros_like(layer.kv_cache) for layer in self.layers]
        for prompt, first, blocks in written:
            for token in range(first, len(prompt)):
                slot = blocks[token // SIZE] * SIZE + token % SIZE
                for number, cache in enumerate(caches):
                    for part in range(2):
                        cache[part, slot] = prompt[token, number, part, heads]
        return caches

    def assert_written(self, *written: tuple[Tensor, int, list[int]], heads: slice = slice(None)) -> None:
        for layer, cache in zip(self.layers, self.expected(*written, heads=heads), strict=True):
            assert torch.equal(layer.kv_cache, cache)


def request_of(adapter: str | None = "one", **fields: Any) -> Any:
    own: dict[str, Any] = {
        "kv_transfer_params": None if adapter is None else {"adapter": adapter},
        "cache_salt": adapter,
        "sampling_params": SimpleNamespace(prompt_logprobs=None),
        "num_tokens": P + 7,
        "num_prompt_tokens": P + 7,
        "skip_reading_prefix_cache": None,
    }
    return SimpleNamespace(**{**own, **fields})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "one", P)
    write(tmp_path, "two", 3)
    return tmp_path


def test_prompts_are_written_into_their_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Connected(folder, monkeypatch)
    assert own.schedule(request_of("one"), [7, 2, 9, 4, 11]) == P
    assert own.schedule(request_of("two"), [3, 5, 6]) == 3
    assert own.schedule(request_of(None), [8]) == 0
    assert own.load() == set()
    one, two = (own.worker._prompts.read(name) for name in ("one", "two"))
    own.assert_written((one, 0, [7, 2, 9]), (two, 0, [3]))


@pytest.mark.parametrize("computed", [4, 6, 8])
def test_what_vllm_has_already_is_not_written_again(
    folder: Path, computed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Connected(folder, monkeypatch)
    assert own.schedule(request_of(), [7, 2, 9, 4, 11], computed) == P - computed
    assert own.load() == set()
    own.assert_written((own.worker._prompts.read("one"), computed, [7, 2, 9]))


def test_nothing_is_left_to_load_where_vllm_has_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Connected(folder, monkeypatch)
    request = request_of()
    assert own.schedule(request, [7, 2, 9, 4, 11], 12) == 0
    assert own.scheduler.build_connector_meta(None) == Loads([])
    assert request.skip_reading_prefix_cache is False


def test_a_load_is_of_one_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Connected(folder, monkeypatch)
    own.schedule(request_of("two"), [3, 5, 6])
    assert own.scheduler.build_connector_meta(None) == Loads([Load("two", 0, 3, [3])])
    assert own.scheduler.build_connector_meta(None) == Loads([])


@pytest.mark.parametrize("rank", [0, 1])
def test_each_worker_has_its_heads(folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Connected(folder, monkeypatch, rank, workers=2)
    own.schedule(request_of(), [7, 2, 9])
    assert own.load() == set()
    heads = slice(rank * H // 2, (rank + 1) * H // 2)
    own.assert_written((own.worker._prompts.read("one"), 0, [7, 2, 9]), heads=heads)


BAD: dict[str, dict[str, Any]] = {
    "unknown": {"adapter": "nobody"},
    "a path": {"adapter": "../one"},
    "another salt": {"cache_salt": "two"},
    "no salt": {"cache_salt": None},
    "placeholders alone": {"num_prompt_tokens": P},
    "prompt_logprobs": {"sampling_params": SimpleNamespace(prompt_logprobs=1)},
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_served_fails_with_its_blocks(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Connected(folder, monkeypatch)
    assert own.schedule(request_of(**BAD[kind]), [7, 2, 9, 4, 11]) == P + 6  # all tokens but one
    own.schedule(request_of("two"), [3])
    assert own.load() == {7, 2, 9, 4}
    assert own.worker.get_block_ids_with_load_errors() == set()  # which is told once
    own.assert_written((own.worker._prompts.read("two"), 0, [3]))


def test_a_file_that_is_gone_fails_its_own_requests(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = Connected(folder, monkeypatch)
    own.schedule(request_of("one"), [7, 2, 9])
    own.schedule(request_of("two"), [3])
    (folder / "one" / PROMPT_NAME).unlink()
    with caplog.at_level(logging.WARNING):
        assert own.load() == {7, 2, 9}
    assert "cannot read the adapter one" in caplog.text
    own.assert_written((own.worker._prompts.read("two"), 0, [3]))
