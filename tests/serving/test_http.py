"""The HTTP server: OpenAI's client, labels and tags, keys, adapters that come and go, and what is refused."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from transformers import AutoModelForCausalLM, AutoTokenizer

from softtune import PeftModel
from softtune.serving.engine_config import EngineConfig
from softtune.serving.folder import AdapterFolder
from softtune.serving.http.app import Settings, create_app
from softtune.serving.registry import Registry
from softtune.serving.service import Service

ADMIN = {"Authorization": "Bearer boss"}
CHAT = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}text :{% endif %}"
)


@contextmanager
def serving(
    model: str, folder: Path | None, config: EngineConfig | None = None, **settings: Any
) -> Iterator[httpx.Client]:
    """A server in a thread, and a client for it."""
    service, adapters = (
        Service(model, config or EngineConfig(num_kv_slots=600)),
        AdapterFolder(*([] if folder is None else [str(folder)])),
    )
    adapters.follow(service.registry)
    app = create_app(
        service, adapters, Settings(**{"admin_keys": ("boss",), "seconds": 20.0, "grace": 1.0, **settings})
    )
    # Its own log_config closes all handlers, and that of absl, which rouge-score brings, would close the test's stderr.
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
    assert service.thread.is_idle
    assert not any(version.leases for version in service.registry.versions)


@pytest.fixture(scope="module")
def client(llama: str, adapters: Path) -> Iterator[httpx.Client]:
    """A server of all kinds of adapters."""
    with serving(llama, adapters, EngineConfig(max_num_seqs=4, num_kv_slots=600)) as client:
        yield client


def generated(llama: str, folder: Path | None, text: str, tokens: int) -> str:
    """What ``generate`` writes alone."""
    base, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    model = base if folder is None else PeftModel.from_pretrained(base, folder)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    written = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def complete(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"model": "prefix", "prompt": "the sky is", "temperature": 0, **body})


def test_models_are_listed(client: httpx.Client, llama: str) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed][:5] == [llama, "bitfit_added", "combined", "ia3", "infix"]
    assert client.get("/v1/models/prefix").json()["method"] == "PREFIX_TUNING"
    assert client.get("/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize("name", [None, "prefix", "prompt_suffix", "bitfit_added", "combined", "ia3"])
def test_completions_are_those_of_generate(client: httpx.Client, llama: str, adapters: Path, name: str | None) -> None:
    texts = ["the sky is", "red good"]
    found = complete(client, model=name or llama, prompt=texts, max_tokens=9)
    assert found.status_code == 200, found.text
    written = [choice["text"] for choice in found.json()["choices"]]
    assert written == [generated(llama, name and adapters / name, text, 9) for text in texts]


def test_the_official_client_works_unchanged(client: httpx.Client, llama: str, adapters: Path) -> None:
    asking = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none")
    [model] = [model for model in asking.models.list() if model.id == "prefix"]
    whole = asking.completions.create(model="prefix", prompt="the sky is", max_tokens=9, temperature=0, logprobs=2)
    assert whole.choices[0].text == generated(llama, adapters / "prefix", "the sky is", 9)
    assert whole.usage is not None
    assert whole.system_fingerprint == f"prefix@{model.version}"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, len(whole.choices[0].logprobs.tokens))
    likeliest = [max(top.values()) for top in whole.choices[0].logprobs.top_logprobs]
    assert likeliest == whole.choices[0].logprobs.token_logprobs
    parts = asking.completions.create(
        model="prefix",
        prompt="the sky is",
        max_tokens=9,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    events = list(parts)
    assert "".join(event.choices[0].text for event in events[:-1]) == whole.choices[0].text
    assert events[-1].usage == whole.usage
    with pytest.raises(openai.NotFoundError, match="no adapter is named 'nobody': among those that are served are"):
        asking.completions.create(model="nobody", prompt="red")


@pytest.fixture(scope="module")
def talking(llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model that knows conversations."""
    model = shutil.copytree(llama, tmp_path_factory.mktemp("models") / "talking")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    return str(model)


@pytest.fixture(scope="module")
def chat(talking: str, adapters: Path) -> Iterator[httpx.Client]:
    with serving(talking, adapters) as client:
        yield client


def test_conversations(chat: httpx.Client, talking: str, adapters: Path) -> None:
    asking = openai.OpenAI(base_url=f"{chat.base_url}/v1", api_key="none")
    messages: Any = [{"role": "user", "content": "is the sky blue"}]
    whole = asking.chat.completions.create(
        model="prompt", messages=messages, temperature=0, max_tokens=7, logprobs=True, top_logprobs=1
    )
    parts = asking.chat.completions.create(model="prompt", messages=messages, temperature=0, max_tokens=7, stream=True)
    expected = generated(talking, adapters / "prompt", "u is the sky blue text :", 7)
    assert whole.choices[0].message.content == expected
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected
    assert all(token.top_logprobs[0].logprob == token.logprob for token in whole.choices[0].logprobs.content)
    open_end = asking.chat.completions.create(model="prompt", messages=messages, temperature=0)
    assert open_end.usage.total_tokens <= 64


def test_a_model_without_a_template_has_no_conversations(client: httpx.Client) -> None:
    found = client.post(
        "/v1/chat/completions", json={"model": "prefix", "messages": [{"role": "user", "content": "red"}]}
    )
    assert found.status_code == 400
    assert "knows no conversations: use /v1/completions" in found.json()["error"]["message"]


def test_several_answers_from_seeds_and_stops(client: httpx.Client) -> None:
    found = complete(client, temperature=1.5, n=3, seed=4, max_tokens=12).json()["choices"]
    again = complete(client, temperature=1.5, n=3, seed=4, max_tokens=12).json()["choices"]
    assert found == again
    assert len({choice["text"] for choice in found}) > 1
    whole = complete(client, max_tokens=12).json()["choices"][0]["text"]
    stop = whole.strip().split()[2]
    stopped = complete(client, max_tokens=12, stop=[stop, "nothing"]).json()["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == whole[: whole.index(stop)]


def test_special_tokens_stop_although_no_text_shows_them(client: httpx.Client) -> None:
    asked = {"temperature": 2, "seed": 3, "max_tokens": 40, "logprobs": 0}
    tokens = complete(client, **asked).json()["choices"][0]["logprobs"]["tokens"]
    stopped = complete(client, **asked, stop=["<unk>"]).json()["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["logprobs"]["tokens"] == tokens[: tokens.index("<unk>") + 1]


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "nobody"}, 404, "no adapter is named 'nobody'"),
    ({"prompt": ""}, 400, "the text is empty"),
    ({"prompt": [[1, 999]]}, 400, "999 is no token: they go from 0 to 16"),
    ({"prompt": "red " * 60}, 400, "are more than the 64 that there is room for: shorten the text"),
    ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
    ({"temperature": 3}, 400, "temperature: Input should be less than or equal to 2"),
    ({"top_p": 0}, 400, "top_p: Input should be greater than 0"),
    ({"n": 8, "prompt": ["red"] * 5}, 400, "the request asks for 40 texts: ask for 32 at most"),
    ({"best_of": 3}, 400, "best_of: Input should be 1"),
    ({"stop": ["red"] * 5}, 400, "stop: List should have at most 4 items"),
    ({"prompt": []}, 400, "prompt: Value should have at least 1 item"),
    ({"frequency_penalty": 1}, 400, "frequency_penalty: Input should be 0"),
    ({"colour": "red"}, 400, "colour: Extra inputs are not permitted"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options needs stream"),
    ({"prompt": "red " * 2000}, 413, "the request has more than 5000 bytes: send less"),
]


@pytest.fixture(scope="module")
def strict(llama: str, adapters: Path) -> Iterator[httpx.Client]:
    """A server with a small limit, which only wants requests with a key."""
    with serving(llama, adapters, body_limit=5000, keys=("mine", "yours")) as client:
        yield client


@pytest.mark.parametrize(("body", "status", "message"), REFUSED)
def test_what_does_not_fit_is_refused(strict: httpx.Client, body: dict[str, Any], status: int, message: str) -> None:
    strict.headers["Authorization"] = "Bearer yours"
    found = complete(strict, **body)
    assert (found.status_code, message in found.json()["error"]["message"]) == (status, True), found.text


def test_keys(strict: httpx.Client) -> None:
    strict.headers.pop("Authorization", None)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer mine2"}, ADMIN):
        assert strict.get("/v1/models", headers=headers).status_code == 401
    assert strict.get("/v1/models", headers={"Authorization": "Bearer mine"}).status_code == 200
    refused = strict.get("/v1/adapters", headers={"Authorization": "Bearer mine"})
    assert (refused.status_code, "admin key, one of SOFTTUNE_ADMIN_KEYS" in refused.text) == (401, True)
    assert strict.get("/v1/adapters", headers=ADMIN).status_code == 200
    assert strict.get("/healthz").status_code == 200


def test_who_has_no_key_is_refused_before_the_body_is_read(strict: httpx.Client) -> None:
    broken = {"content": b'{"model": ', "headers": {"Content-Type": "application/json", "Authorization": "Bearer no"}}
    assert strict.post("/v1/completions", **broken).status_code == 401
    assert strict.post("/v1/adapters", **broken).status_code == 401


def test_fields_that_are_null_or_say_nothing_are_taken(client: httpx.Client) -> None:
    plain = complete(client, max_tokens=4).json()
    nulls = dict.fromkeys(("top_p", "n", "stream", "seed", "stop", "logprobs", "echo", "frequency_penalty", "user"))
    silent = {"suffix": "", "store": False, "logit_bias": {}, "best_of": 1}
    found = complete(client, max_tokens=4, **nulls, **silent).json()
    assert found["choices"] == plain["choices"]
    assert complete(client, max_tokens=4, n=3, temperature=0.5).json()["usage"]["prompt_tokens"] == 5


def test_an_answer_is_sent_back_as_it_came(chat: httpx.Client) -> None:
    """Clients keep a message whole, nulls and all: OpenAI's own, and what is built on it."""
    first, last = {"role": "user", "content": "red is"}, {"role": "user", "content": "cold is"}

    def ask(*messages: dict[str, Any]) -> Any:
        found = chat.post(
            "/v1/chat/completions",
            json={"model": "prefix", "messages": list(messages), "max_tokens": 4, "temperature": 0},
        )
        assert found.status_code == 200, found.text
        return found.json()["choices"][0]["message"]

    answer = ask(first)
    expected = ask(first, {"role": "assistant", "content": answer["content"]}, last)
    nulls = dict.fromkeys(("refusal", "tool_calls", "function_call", "annotations", "audio", "name"))
    for message in (answer, answer | nulls, answer | {"annotations": [], "tool_calls": []}):
        assert ask(first, message, last) == expected
    parts = {"role": "user", "content": [{"type": "text", "text": "cold is", "annotations": None}]}
    assert ask(first, answer, parts) == expected
    refused = {"model": "prefix", "messages": [first, answer | {"refusal": "no"}]}
    assert chat.post("/v1/chat/completions", json=refused).status_code == 400


def test_a_base_model_alone_is_served(llama: str) -> None:
    with serving(llama, None) as client:
        assert complete(client, model=llama, max_tokens=4).json()["usage"]["completion_tokens"] == 4


def test_malformed_bodies(client: httpx.Client) -> None:
    found = client.post("/v1/completions", content=b'{"model": ', headers={"Content-Type": "application/json"})
    assert (found.status_code, found.json()["error"]["message"]) == (400, "the body: JSON decode error")
    headers = {"Content-Type": "application/json"}
    half = client.post("/v1/completions", content=json.dumps({"prompt": "\ud800"}), headers=headers)
    assert (half.status_code, "half of a surrogate pair is no character" in half.text) == (400, True)
    for depth in (*range(900, 1000, 4), 5000):
        deep = '{"model": "prefix", "prompt": "red", "more": ' + depth * "[" + depth * "]" + "}"
        assert client.post("/v1/completions", content=deep, headers=headers).status_code == 400
    nothing = client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert "the body: send a JSON object, with Content-Type: application/json" in nothing.text
    many = client.post("/v1/classify", json={"model": "prefix", "input": ["red"] * 33})
    assert (many.status_code, "input: List should have at most 32 items" in many.text) == (400, True)
    chunks = (b"x" * 2**19 for _ in range(3))
    assert client.post("/v1/completions", content=chunks).status_code == 413
    assert client.get("/v1/nothing").status_code == 404


def test_too_many_wait(llama: str, adapters: Path) -> None:
    with serving(llama, adapters, EngineConfig(max_num_seqs=1, max_num_waiting=2, num_kv_slots=600)) as client:
        found = complete(client, prompt=["red"] * 8)
        assert found.status_code == 429
        assert found.headers["Retry-After"] == "1"
        assert "2 requests are waiting: try again later" in found.text


def test_adapters_come_and_go(llama: str, adapters: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(adapters / "prefix", folder / "one")
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{}")
    with serving(llama, folder) as client:
        assert [v["name"] for v in client.get("/v1/adapters", headers=ADMIN).json()["served"]] == ["one"]
        before = complete(client, model="one").json()["choices"]
        shutil.copytree(adapters / "prompt", folder / "two")
        assert client.post("/v1/adapters", json={"name": "two"}, headers=ADMIN).json() == {"name": "two", "version": 3}
        assert complete(client, model="two").status_code == 200
        assert 'adapter="two"' in client.get("/metrics").text
        assert client.post("/v1/adapters", json={"name": "../one"}, headers=ADMIN).status_code == 404
        (folder / "one" / "adapter_model.safetensors").write_bytes(b"broken")
        assert client.post("/v1/adapters", json={"name": "one"}, headers=ADMIN).status_code == 400
        assert complete(client, model="one").json()["choices"] == before
        assert client.delete("/v1/adapters/two", headers=ADMIN).json() == {"removed": "two"}
        assert complete(client, model="two").status_code == 404
        assert 'adapter="two"' not in client.get("/metrics").text
        assert 'adapter="one"' in client.get("/metrics").text
        assert client.delete("/v1/adapters/two", headers=ADMIN).status_code == 404


def test_no_adapter_has_the_base_models_name(
    llama: str, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(llama).parent)
    for name in ("llama", "one"):
        shutil.copytree(adapters / "prefix", tmp_path / name)
    with serving("llama", tmp_path) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["llama", "one"]
        refused = client.post("/v1/adapters", json={"name": "llama"}, headers=ADMIN)
        assert refused.status_code == 400
        assert "llama is the base model's name: give the adapter's folder another one" in refused.text


def test_the_api_says_what_is_sent(strict: httpx.Client) -> None:
    api = strict.get("/openapi.json").json()
    assert [scheme["scheme"] for scheme in api["components"]["securitySchemes"].values()] == ["bearer"]
    for path, own in api["paths"].items():
        for operation in own.values():
            assert "422" not in operation["responses"]
            if path != "/healthz":
                assert operation["security"]
                assert {"400", "401", "404", "429"} <= operation["responses"].keys()
    error = strict.post("/v1/completions", headers={"Authorization": "Bearer wrong"}).json()
    assert error.keys() == api["components"]["schemas"]["Failure"]["properties"].keys()
    assert error["error"].keys() == api["components"]["schemas"]["Problem"]["properties"].keys()


def test_folders_are_not_waited_for(
    llama: str, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(adapters / "prefix", tmp_path / "adapters" / "one")
    looking: list[str] = []

    def note_loop(what: str) -> None:
        with suppress(RuntimeError):  # there is none in this thread
            asyncio.get_running_loop()
            looking.append(what)

    listing, remove, read = AdapterFolder.names, Registry.remove, Path.read_text
    monkeypatch.setattr(AdapterFolder, "names", property(lambda self: note_loop("names") or listing.fget(self)))
    monkeypatch.setattr(Registry, "remove", lambda self, name: note_loop("remove") or remove(self, name))
    monkeypatch.setattr(Path, "read_text", lambda self, **how: note_loop(self.name) or read(self, **how))
    with serving(llama, tmp_path / "adapters") as client:
        assert client.get("/v1/adapters", headers=ADMIN).json()["available"] == ["one"]
        assert client.delete("/v1/adapters/one", headers=ADMIN).status_code == 200
        assert "<title>softtune</title>" in client.get("/").text
    assert not looking


def test_who_hangs_up_leaves_a_place(llama: str, adapters: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(llama, adapters, EngineConfig(max_num_seqs=1, num_kv_slots=600)) as client:
        body = {"model": "prefix", "prompt": "red", "max_tokens": 55, "stream": True}
        for _ in range(3):
            with client.stream("POST", "/v1/completions", json=body) as stream:
                next(stream.iter_lines())
        assert complete(client, max_tokens=3).status_code == 200
    assert not [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


def test_metrics(client: httpx.Client) -> None:
    complete(client, max_tokens=4, prompt="red good bad")
    text = client.get("/metrics").text
    assert 'softtune_requests_total{adapter="prefix",path="/v1/completions",status="200"}' in text
    assert 'softtune_tokens_total{adapter="prefix",kind="written"}' in text
    assert 'softtune_first_token_seconds_bucket{adapter="prefix",le="10.0"}' in text
    assert "softtune_waiting 0.0" in text
    complete(client, model="somebody")
    assert "somebody" not in client.get("/metrics").text
