"""A vLLM of one's own, with nothing of softtune but the connector and what ``softtune bake`` has written."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from softtune.cli import load
from softtune.serving.vllm.connector import PromptConnector
from tests.families import CAUSAL_LM, METHODS, save_adapter
from tests.serving.processes import STARTING, wait_for
from tests.serving.test_http import generated

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]  # vLLM itself warns

TEXTS = ["the sky is", "cold warm " * 12 + "is"]


@pytest.fixture(scope="module")
def folder(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, kind in enumerate(("prefix", "prompt")):
        save_adapter(llama, folder / kind, METHODS[kind](task_type=CAUSAL_LM), seed)
    return folder


def bake(*arguments: str) -> int:
    """The exit code of ``softtune bake``."""
    try:
        load("bake").main(list(arguments), standalone_mode=False)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def client(llama: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """vLLM's own server."""
    baked = tmp_path_factory.mktemp("baked")
    assert bake(str(folder / "prefix"), str(folder / "prompt"), "--model", llama, "--to", str(baked)) == 0
    config = {
        "kv_connector": PromptConnector.__name__,
        "kv_connector_module_path": PromptConnector.__module__,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"folder": str(baked)},
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", llama, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--kv-transfer-config", json.dumps(config), "--dtype", "float32"]
    command += ["--block-size", "32", "--num-gpu-blocks-override", "64", "--kv-cache-memory-bytes", "1"]
    process = subprocess.Popen(command, env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        wait_for(lambda: client.get("/health").is_success, STARTING)
        yield client
    process.terminate()
    process.wait(60)


def test_texts_are_those_of_generate(client: httpx.Client, llama: str, folder: Path) -> None:
    for text in TEXTS:
        ids = AutoTokenizer.from_pretrained(llama)(text)["input_ids"]
        for name in (None, "prefix", "prompt"):
            found = ask(client, llama, name, ids).json()["choices"][0]["text"]
            # vLLM puts another number of spaces between the words of this tokenizer.
            assert found.split() == generated(llama, name and folder / name, text, 12).split()


def test_what_cannot_be_served_is_an_error_and_no_end(client: httpx.Client, llama: str) -> None:
    ids = [4, 5, 6]
    assert ask(client, llama, "nobody", ids).status_code == 500
    assert ask(client, llama, "prefix", ids, cache_salt="mine").status_code == 500
    assert ask(client, llama, "prefix", ids, cache_salt=None).status_code == 500
    assert ask(client, llama, "../baked/prefix", ids).status_code == 400
    assert ask(client, llama, "prefix", []).status_code == 500
    assert ask(client, llama, "prefix", ids, prompt_logprobs=1).status_code == 500
    assert ask(client, llama, "prefix", ids).status_code == 200


def test_what_has_been_baked_stays(llama: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "prefix").mkdir()
    assert bake(str(folder / "prefix"), "--model", llama, "--to", str(tmp_path)) == 2
    assert "is there already: give the adapter's folder another name" in capsys.readouterr().err


def ask(client: httpx.Client, model: str, name: str | None, ids: list[int], **more: Any) -> httpx.Response:
    """Have a text gone on with, as the page on serving says."""
    body: dict[str, Any] = {"model": model, "prompt": ids, "max_tokens": 12, "temperature": 0}
    if name is not None:
        adapter = {"cache_salt": name, "kv_transfer_params": {"adapter": name}}
        body |= {"prompt": [0] * 5 + ids, **adapter, **more}
    return client.post("/v1/completions", json={key: value for key, value in body.items() if value is not None})
