"""The server answers by vLLM as it does by its own engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from softtune import PeftModel
from softtune.serving.engine_config import EngineConfig
from softtune.serving.service import Service
from softtune.serving.vllm.engine import VllmEngine
from tests.families import CAUSAL_LM, METHODS, save_adapter
from tests.serving import test_http
from tests.serving.test_http import ADMIN, complete, generated, serving

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]  # vLLM itself warns

TEXTS = ["the sky is", "red good", "cold warm " * 12 + "is"]


@pytest.fixture(scope="module")
def folder(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters, one of which vLLM does not take."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, kind in enumerate(("prefix", "prompt", "prompt_suffix", "infix")):
        save_adapter(llama, folder / kind, METHODS[kind](task_type=CAUSAL_LM), seed)
    return folder


@pytest.fixture(scope="module")
def client(llama: str, folder: Path) -> Iterator[httpx.Client]:
    """A server on vLLM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_http, "Service", partial(Service, engine=partial(VllmEngine, llama)))
        with serving(llama, folder, EngineConfig(max_num_seqs=8, num_kv_slots=1024)) as client:
            yield client


def test_many_at_once_get_what_generate_writes_alone(client: httpx.Client, llama: str, folder: Path) -> None:
    asking = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none")
    names = [None, "prefix", "prompt", "prompt_suffix"]

    def ask(name: str | None, text: str) -> str:
        return asking.completions.create(model=name or llama, prompt=text, max_tokens=20, temperature=0).choices[0].text

    asked = [(name, text) for text in TEXTS for name in names] * 3
    with ThreadPoolExecutor(len(asked)) as threads:
        found = list(threads.map(lambda one: ask(*one), asked))
    assert found == [generated(llama, name and folder / name, text, 20) for name, text in asked]


def test_several_adapters_in_one_request(client: httpx.Client, llama: str, folder: Path) -> None:
    model = PeftModel(AutoModelForCausalLM.from_pretrained(llama))
    for name in ("prefix", "prompt"):
        model.load_adapter(folder / name, name)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        written = model.eval().generate(ids, adapter_names=["prefix+prompt"], **options)[0, ids.shape[1] :]
        found = complete(client, model="prefix+prompt", prompt=text, max_tokens=12)
        assert found.json()["choices"][0]["text"] == tokenizer.decode(written, skip_special_tokens=True)
    refused = complete(client, model="prefix+prompt_suffix")
    assert (refused.status_code, "only prefixes in front of the text" in refused.text) == (400, True)


def test_streams_and_stops(client: httpx.Client, llama: str, folder: Path) -> None:
    asking = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none")
    asked = {"model": "prefix", "prompt": TEXTS[0], "max_tokens": 9, "temperature": 0, "logprobs": 2}
    parts = list(asking.completions.create(**asked, stream=True))
    whole = "".join(part.choices[0].text for part in parts)
    assert whole == generated(llama, folder / "prefix", TEXTS[0], 9)
    assert max(parts[0].choices[0].logprobs.top_logprobs[0].values()) == parts[0].choices[0].logprobs.token_logprobs[0]
    stopped = asking.completions.create(**asked, stop=[whole.split()[-1]]).choices[0]
    assert (stopped.finish_reason, whole.startswith(stopped.text)) == ("stop", True)


def test_who_hangs_up_leaves_a_place(client: httpx.Client) -> None:
    body = {"model": "prefix", "prompt": "red", "max_tokens": 200, "stream": True}
    for _ in range(12):
        with client.stream("POST", "/v1/completions", json=body) as stream:
            next(stream.iter_lines())
    assert complete(client, max_tokens=3).status_code == 200


def test_what_vllm_must_not_see_is_refused(client: httpx.Client) -> None:
    assert complete(client, model="nobody").status_code == 404
    assert complete(client, model="infix").status_code == 404
    found = complete(client, prompt_logprobs=1)
    assert (found.status_code, found.json()["error"]["message"]) == (
        400,
        "prompt_logprobs: Extra inputs are not permitted",
    )
    assert complete(client, cache_salt="mine").status_code == 400
    assert complete(client, kv_transfer_params={"adapter": "2"}).status_code == 400
    assert "are more than the 256" in complete(client, prompt="red " * 200, max_tokens=3).text


def test_a_replaced_adapter_answers_at_once(client: httpx.Client, llama: str, folder: Path) -> None:
    shutil.copytree(folder / "prefix", folder / "changing")
    assert client.post("/v1/adapters", json={"name": "changing"}, headers=ADMIN).status_code == 200
    before = complete(client, model="changing", prompt=TEXTS[2], max_tokens=9).json()["choices"][0]["text"]
    shutil.rmtree(folder / "changing")
    shutil.copytree(folder / "prompt", folder / "changing")
    assert client.post("/v1/adapters", json={"name": "changing"}, headers=ADMIN).status_code == 200
    after = complete(client, model="changing", prompt=TEXTS[2], max_tokens=9).json()["choices"][0]["text"]
    assert before == generated(llama, folder / "prefix", TEXTS[2], 9)
    assert after == generated(llama, folder / "prompt", TEXTS[2], 9)
    assert before != after
