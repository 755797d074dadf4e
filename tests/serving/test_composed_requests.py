"""Requests to several adapters at once: what ``generate`` writes with both prefixes, and their versions' ends."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from softtune import PeftModel, compose_cartridge_adapters
from softtune.serving.engine_config import EngineConfig
from softtune.training.recipe import Recipe
from tests.families import CAUSAL_LM, METHODS, P, save_adapter
from tests.serving.test_http import ADMIN, complete, serving
from tests.serving.test_tasks import LABELLED, ROWS, alone, records, trained
from tests.training.test_recipe_task import models, recipe  # noqa: F401

TEXTS = ["the sky is", "red good"]
NAMES = ("prefix+prompt", "prompt+prefix", "prefix", "prefix+p_tuning_lstm+prompt", "prompt+prompt")


@pytest.fixture(scope="module")
def client(llama: str, adapters: Path) -> Iterator[httpx.Client]:
    """A server of all kinds of adapters."""
    with serving(llama, adapters, EngineConfig(max_num_seqs=4, num_kv_slots=300)) as client:
        yield client


@pytest.fixture(scope="module")
def expected(llama: str, adapters: Path) -> Callable[[str, str], str]:
    """What ``generate`` writes with the adapters of a name."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = PeftModel(AutoModelForCausalLM.from_pretrained(llama).eval())
    for name in ("prefix", "prompt", "p_tuning_lstm"):
        model.load_adapter(adapters / name, name)
    model.eval()

    def write(name: str, text: str) -> str:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
        written = model.generate(ids, adapter_names=[name], **options)[0, ids.shape[1] :]
        return str(tokenizer.decode(written, skip_special_tokens=True))

    return write


def test_texts_are_those_of_generate(client: httpx.Client, expected: Callable[[str, str], str]) -> None:
    asked = [(name, text) for name in NAMES for text in TEXTS] * 2
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda one: complete(client, model=one[0], prompt=one[1], max_tokens=9), asked))
    assert [answer.status_code for answer in found] == [200] * len(asked)
    assert [answer.json()["choices"][0]["text"] for answer in found] == [expected(*one) for one in asked]
    assert len({expected(name, TEXTS[0]) for name in ("prefix+prompt", "prefix", "prompt", "prompt+prompt")}) == 4


def test_a_composed_version_is_told_but_not_listed(client: httpx.Client) -> None:
    answer = complete(client, model="prefix+prompt", max_tokens=3).json()
    told = client.get("/v1/models/prefix+prompt").json()
    assert (told["id"], told["method"]) == ("prefix+prompt", "PREFIX_TUNING")
    assert answer["system_fingerprint"] == f"prefix+prompt@{told['version']}"
    assert (
        complete(client, model="prefix+prompt", max_tokens=3)
        .json()["system_fingerprint"]
        .endswith(f"@{told['version']}")
    )
    assert "prefix+prompt" not in [model["id"] for model in client.get("/v1/models").json()["data"]]
    text = client.get("/metrics").text
    assert 'softtune_requests_total{adapter="prefix+prompt",path="/v1/completions",status="200"}' in text
    assert 'softtune_tokens_total{adapter="prefix+prompt",kind="written"}' in text


def test_virtual_tokens_of_all_parts_count(client: httpx.Client) -> None:
    positions = 64  # those of the tiny model
    room = positions - 2 * P - 5
    for name, tokens, status in (("prefix+prompt", room, 200), ("prefix+prompt", room + 1, 400)):
        found = complete(client, model=name, max_tokens=tokens)
        assert found.status_code == status, found.text
    assert f"{2 * P} virtual ones are more than the {positions}" in found.text


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("prefix+nobody", 404, "no adapter is named 'nobody': among those that are served are"),
        ("nobody+prefix", 404, "no adapter is named 'nobody'"),
        ("prefix+", 404, "no adapter is named ''"),
        ("prefix+../prefix", 404, "no adapter is named '../prefix'"),
        ("prefix+bitfit_added", 400, "it has trained biases (adapter 2 of 2): only prefixes in front of the text"),
        ("ia3+prefix", 400, "it has trained factors (adapter 1 of 2): only prefixes"),
        ("prefix+prompt_suffix", 400, "its virtual tokens are behind the text (adapter 2 of 2)"),
        ("prefix+infix", 400, "its virtual tokens are behind the text (adapter 2 of 2)"),
        ("prefix+combined", 400, "it has trained"),
        ("prefix+prefix_last", 400, "the prefixes are for different layers or positions: compose those of one kind"),
        ("+".join(["prefix"] * 30), 400, f"{30 * P} virtual tokens leave no place for a text among 64 tokens"),
    ],
)
def test_what_cannot_be_composed(client: httpx.Client, name: str, status: int, message: str) -> None:
    found = complete(client, model=name)
    assert (found.status_code, message in found.json()["error"]["message"]) == (status, True), found.text
    assert "\n" not in found.json()["error"]["message"]
    assert client.get(f"/v1/models/{name}").status_code == status
    assert f'adapter="{name}"' not in client.get("/metrics").text


def test_a_changed_part_gives_another_answer(llama: str, adapters: Path, tmp_path: Path) -> None:
    for name, kind in (("one", "prefix"), ("two", "prompt")):
        shutil.copytree(adapters / kind, tmp_path / name)
    with serving(llama, tmp_path) as client:
        first = complete(client, model="one+two").json()
        shutil.rmtree(tmp_path / "two")
        shutil.copytree(adapters / "p_tuning_lstm", tmp_path / "two")
        assert complete(client, model="one+two").json()["choices"] == first["choices"]
        client.post("/v1/adapters", json={"name": "two"}, headers=ADMIN)
        second = complete(client, model="one+two").json()
        assert second["choices"] != first["choices"]
        assert second["system_fingerprint"] != first["system_fingerprint"]
        assert 'adapter="one+two"' in client.get("/metrics").text
        assert client.delete("/v1/adapters/two", headers=ADMIN).status_code == 200
        found = complete(client, model="one+two")
        assert (found.status_code, "no adapter is named 'two'" in found.text) == (404, True)
        assert 'adapter="one+two"' not in client.get("/metrics").text


def test_adapters_of_two_base_models_are_not_served_together(llama: str, adapters: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    other = type(AutoModelForCausalLM.from_pretrained(llama))(AutoConfig.from_pretrained(llama))
    other.save_pretrained(tmp_path / "other")
    shutil.copytree(adapters / "prefix", tmp_path / "adapters" / "one")
    with serving(llama, tmp_path / "adapters") as client:
        save_adapter(
            str(tmp_path / "other"), tmp_path / "adapters" / "two", METHODS["cartridge"](task_type=CAUSAL_LM), 1
        )
        found = client.post("/v1/adapters", json={"name": "two"}, headers=ADMIN)
        assert (found.status_code, "was trained on another base model" in found.text) == (400, True)
        assert complete(client, model="one+two").status_code == 404


def test_adapters_of_one_task_are_asked_for_labels_together(tmp_path: Path, models: dict[str, str]) -> None:  # noqa: F811
    def own(number: int, **fields: Any) -> Recipe:
        options = {"num_virtual_tokens": 2 + number}
        more = {**LABELLED, "method": "CARTRIDGE", "options": options, "seed": number, **fields}
        return recipe(tmp_path, models["llama"], ROWS, **more)

    kinds = {"one": own(1), "two": own(2), "other": own(3, template="{x} : "), "head": own(1, task="SEQ_CLS")}
    folder = trained(tmp_path / "adapters", kinds)
    both = shutil.copytree(folder / "one", tmp_path / "both")
    compose_cartridge_adapters([folder / "one", folder / "two"], output_path=tmp_path / "composed")
    shutil.copytree(tmp_path / "composed", both, dirs_exist_ok=True)
    expected = alone(both, ROWS[:3])
    assert expected.scores is not None
    with serving(models["llama"], folder) as client:
        body = {"model": "one+two", "input": records(ROWS[:3], "y")}
        found = client.post("/v1/classify", json=body).json()["data"]
        for result, scores in zip(found, expected.scores.softmax(1).tolist(), strict=True):
            assert list(result["scores"].values()) == pytest.approx(scores, abs=1e-4)
        assert "labels" in client.get("/v1/models/one+two").json()
        assert "labels" not in client.get("/v1/models/one+other").json()
        for name, message in (
            ("one+other", "one+other does not read 'x': it reads no records"),
            ("one+head", "head has a head and"),
        ):
            refused = client.post("/v1/classify", json={"model": name, "input": {"x": "red"}})
            assert (refused.status_code, message in refused.text) == (400, True), refused.text


def test_names_with_a_plus_are_served_as_they_are(llama: str, adapters: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base" / "lla+ma")
    for name, kind in (("one", "prefix"), ("two", "prompt")):
        shutil.copytree(adapters / kind, tmp_path / "adapters" / name)
    with serving(str(base), tmp_path / "adapters") as client:
        assert complete(client, model=str(base)).status_code == 200
        composed = complete(client, model="one+two").json()
        shutil.copytree(adapters / "p_tuning_lstm", tmp_path / "adapters" / "one+two")
        client.post("/v1/adapters", json={"name": "one+two"}, headers=ADMIN)
        own = complete(client, model="one+two").json()
        assert own["choices"] != composed["choices"]
        assert client.get("/v1/models/one+two").json()["method"] == "P_TUNING"
