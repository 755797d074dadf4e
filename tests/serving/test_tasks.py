"""Labels, choices, tags and answers over HTTP are those that the adapters give alone, many asked at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from softtune.cli.loading import load_trained
from softtune.evaluation.answers import Answers, answer
from softtune.serving.service import Service
from softtune.training.recipe import Recipe
from softtune.training.run import train
from tests.serving.test_http import serving
from tests.training.test_recipe_task import QUESTIONS, SENTENCES, models, reading, recipe, tagging  # noqa: F401

METHODS: dict[str, dict[str, Any]] = {
    "deep": {"method": "P_TUNING_V2"},
    "longer": {"method": "PROMPT_TUNING", "options": {"num_virtual_tokens": 5}},
    "biases": {"method": "BITFIT", "options": {}},
}
PLACED: dict[str, dict[str, Any]] = {
    "in front": {"template": "{prompt:3}{x} label : ", "method": "PROMPT_TUNING", "options": {}},
    "within": {"template": "{x} {prompt:2}label : ", "method": "P_TUNING", "options": {}},
}
ROWS = [{"x": "red sky", "y": "warm"}, {"x": "blue", "y": "cold"}, {"x": "the green text is good", "y": "cold"}] * 4
LABELLED = {"template": "{x} label : ", "label_column": "y", "labels": ["warm", "cold"], "test_size": 0}


def trained(folder: Path, kinds: dict[str, Recipe]) -> Path:
    """Adapters by name."""
    for name, own in kinds.items():
        train(
            own.model_copy(update={"output": str(folder / name), "epochs": 1.0, "test_size": 0, "learning_rate": 0.1})
        )
    return folder


def alone(folder: Path, rows: list[dict[str, Any]]) -> Answers:
    """What an adapter answers alone."""
    one = load_trained(folder, None)
    return answer(one.model, one.tokenizer, one.task, Dataset.from_list(rows))


def asked(folder: Path, model: str, endpoint: str, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What each adapter in a folder answers over HTTP, all asked at once, a record at a time."""
    names = sorted(path.name for path in folder.iterdir())
    with serving(model, folder) as client, ThreadPoolExecutor(8) as threads:
        pairs = [(name, row) for row in rows for name in names]
        found = list(threads.map(lambda pair: client.post(endpoint, json={"model": pair[0], "input": pair[1]}), pairs))
    assert [one.status_code for one in found] == [200] * len(found), found[0].text
    results = [one.json()["data"][0] for one in found]
    return {name: results[i :: len(names)] for i, name in enumerate(names)}


def records(rows: list[dict[str, Any]], label: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != label} for row in rows]


@pytest.mark.parametrize("kind", ["head", "words", "long words", "calibrated words"])
def test_labels(tmp_path: Path, models: dict[str, str], kind: str) -> None:  # noqa: F811
    fields = {
        "head": {"model": models["bert"], "task": "SEQ_CLS"},
        "words": {},
        "long words": {"labels": {"warm": "the sky is warm", "cold": "cold"}},
        "calibrated words": {"calibrate": True},
    }[kind]
    model = str(fields.pop("model", models["llama"]))
    kinds = {}
    for name, own in (METHODS | PLACED).items():
        added = {"options": {"add_missing": True}} if name == "biases" and model == models["llama"] else {}
        kinds[name] = recipe(tmp_path, model, ROWS, **{**LABELLED, **fields, **own, **added})
    folder = trained(tmp_path / "adapters", kinds)
    for name, results in asked(folder, model, "/v1/classify", records(ROWS[:3], "y")).items():
        expected = alone(folder / name, ROWS[:3])
        assert expected.scores is not None
        assert [result["label"] for result in results] == expected.texts
        assert not any(result["truncated"] for result in results)
        for result, scores in zip(results, expected.scores.softmax(1).tolist(), strict=True):
            assert list(result["scores"].values()) == pytest.approx(scores, abs=1e-4)


def test_texts_with_virtual_tokens_within_are_refused(tmp_path: Path, models: dict[str, str]) -> None:  # noqa: F811
    fields: dict[str, Any] = {**LABELLED, **PLACED["within"]}
    kinds = {"labels": recipe(tmp_path, models["llama"], ROWS, **fields)}
    kinds["texts"] = recipe(tmp_path, models["llama"], ROWS, **{**fields, "labels": None, "max_new_tokens": 8})
    with serving(models["llama"], trained(tmp_path / "adapters", kinds)) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [models["llama"], "labels"]
        refused = client.post("/v1/completions", json={"model": "labels", "prompt": "red"})
        assert (refused.status_code, "ask it for labels, by records" in refused.text) == (400, True)


def test_a_space_at_the_end_is_the_answers(tmp_path: Path, models: dict[str, str]) -> None:  # noqa: F811
    own = recipe(tmp_path, models["llama"], ROWS, template="{x} text : ", label_column="y", max_new_tokens=8)
    folder = trained(tmp_path / "adapters", {"texts": own})
    with serving(models["llama"], folder) as client:
        for row, expected in zip(ROWS[:3], alone(folder / "texts", ROWS[:3]).texts, strict=True):
            body = {"model": "texts", "prompt": f"{row['x']} text : ", "max_tokens": 8, "temperature": 0}
            assert client.post("/v1/completions", json=body).json()["choices"][0]["text"].strip() == expected


def test_texts_are_encoded_one_at_a_time(models: dict[str, str]) -> None:  # noqa: F811
    service = Service(models["llama"])
    words = ["red", "sky"] * 20

    def cut(_: int) -> int:
        return service.with_tokenizer(
            lambda own: len(own(words, is_split_into_words=True, truncation=True, max_length=8)["input_ids"])
        )

    with ThreadPoolExecutor(6) as threads:
        found = threads.map(lambda i: cut(i) if i % 2 else len(service.tokenize(" ".join(words))), range(2000))
    assert {*found} == {8, len(service.tokenize(" ".join(words)))}


def test_choices(tmp_path: Path, models: dict[str, str]) -> None:  # noqa: F811
    rows = [
        {"x": "red", "options": ["warm", "cold"], "y": "warm"},
        {"x": "blue", "options": ["the sky", "bad", "is"], "y": "bad"},
    ]
    own = recipe(tmp_path, models["llama"], rows * 4, template="{x} : ", label_column="y", choices="options")
    folder = trained(tmp_path / "adapters", {"one": own})
    [results] = asked(folder, models["llama"], "/v1/classify", records(rows, "y")).values()
    assert [result["label"] for result in results] == alone(folder / "one", rows).texts


def test_tags(tmp_path: Path, models: dict[str, str]) -> None:  # noqa: F811
    folder = trained(tmp_path / "adapters", {name: tagging(tmp_path, models, **own) for name, own in METHODS.items()})
    rows = [{"tokens": words, "tags": tags} for words, tags in SENTENCES[:2]]
    for name, results in asked(folder, models["bert"], "/v1/tag", records(rows, "tags")).items():
        assert [tuple(result["tags"]) for result in results] == alone(folder / name, rows).texts


def test_answers(tmp_path: Path, models: dict[str, str]) -> None:  # noqa: F811
    own = {name: METHODS[name] for name in ("deep", "biases")}
    folder = trained(tmp_path / "adapters", {name: reading(tmp_path, models, **more) for name, more in own.items()})
    for name, results in asked(folder, models["reader"], "/v1/answer", records(QUESTIONS[:3], "answers")).items():
        assert [result["answer"] for result in results] == alone(folder / name, QUESTIONS[:3]).texts


def test_what_an_adapter_is_not_for(tmp_path: Path, models: dict[str, str]) -> None:  # noqa: F811
    (tmp_path / "labels").mkdir()
    kinds = {
        "labels": recipe(tmp_path / "labels", models["bert"], ROWS, **{**LABELLED, "task": "SEQ_CLS"}),
        "tags": tagging(tmp_path, models),
    }
    with serving(models["bert"], trained(tmp_path / "adapters", kinds)) as client:
        found = {
            "/v1/tag": ({"model": "labels", "input": "red"}, "labels was not trained for that: ask it for labels"),
            "/v1/classify": ({"model": "tags", "input": {"tokens": ["red"]}}, "ask it for tags"),
            "/v1/completions": ({"model": "labels", "prompt": "red"}, "has a head and writes no texts"),
        }
        for endpoint, (body, message) in found.items():
            refused = client.post(endpoint, json=body)
            assert (refused.status_code, message in refused.text) == (400, True), refused.text
        wrong = client.post("/v1/classify", json={"model": "labels", "input": {}})
        assert "the record lacks 'x': labels reads x" in wrong.text
        assert "holds no list of texts" in client.post("/v1/tag", json={"model": "tags", "input": {"tokens": 3}}).text
        assert client.post("/v1/classify", json={"model": "labels", "input": "red"}).json()["data"][0]["truncated"] == 0
        long = client.post("/v1/classify", json={"model": "labels", "input": "red " * 60}).json()["data"][0]
        assert long["truncated"] > 30
        tagged = client.post("/v1/tag", json={"model": "tags", "input": {"tokens": ["red"] * 60}}).json()["data"][0]
        assert (len(tagged["tags"]), tagged["tags"][-1], tagged["truncated"] > 30) == (60, "O", True)
        assert 'softtune_tokens_total{adapter="labels",kind="read"}' in client.get("/metrics").text
        unknown = client.post("/v1/classify", json={"model": "labels", "input": {"x": "red", "why": "not"}})
        assert "labels does not read 'why': it reads x" in unknown.text
        for depth in (300, 900):
            deep = '{"model": "labels", "input": {"x": ' + depth * "[" + depth * "]" + "}}"
            headers = {"Content-Type": "application/json"}
            assert client.post("/v1/classify", content=deep, headers=headers).status_code == 400
        base = client.post("/v1/classify", json={"model": models["bert"], "input": "red"})
        assert "is the base model: ask an adapter" in base.text
