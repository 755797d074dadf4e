"""Labels, choices, tags and answers over HTTP are those that the adapters give alone, many asked at once."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from softtune.cli.loading import load_trained
from softtune.data import Example
from softtune.data.encoding import IGNORED
from softtune.errors import RequestError
from softtune.evaluation.answers import Answers, answer
from softtune.serving.registry import Version
from softtune.serving.tasks import TaskRunner
from softtune.tasks.requests import Classify, ClassifyTokens, Generate, LocateSpan, Loglikelihood
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


class Asked:
    """A task that makes what requests it is told to, and a service that answers them from a list."""

    endpoint = "/v1/classify"
    asks_for = "labels"
    columns = ("x", "y")
    baseline_record: Any = None

    def __init__(self, requests: list[Any], results: list[Any]) -> None:
        self._requests = requests
        self._results = iter(results)
        self.engine = "decoder"
        self.made: list[Any] = []
        self.noted: list[tuple[str, int]] = []
        info: Any = SimpleNamespace(task=self, engine="head")
        self.version: Any = Version("one", 1, info, Path("one"))
        service: Any = self
        self.runner = TaskRunner(service, lambda name, tokens: self.noted.append((name, tokens)))

    def num_choices(self, record: Any) -> int:
        return len(record["y"])

    def requests(self, record: Any, tokenizer: Any) -> list[Any]:
        return self._requests

    def process(self, record: Any, requests: Any, results: list[Any], baseline: Any) -> Any:
        assert requests is self._requests
        return record, results, baseline

    def as_json(self, processed: Any) -> Any:
        return processed

    def with_tokenizer(self, encode: Any) -> Any:
        return encode(None)

    async def result_of(self, engine: Any, version: Any, request: Any) -> Any:
        assert version is self.version
        self.made.append((engine, request(print)))
        return next(self._results)

    def run(self, record: Any, endpoint: str = "/v1/classify") -> Any:
        return asyncio.run(self.runner.run(endpoint, self.version, record))


def continued(text: list[int], answer: list[int], places: list[int] | None = None) -> Example:
    labels = [IGNORED] * len(text) + answer
    return Example(input_ids=[*text, *answer], labels=labels, prompt_positions=places)


RECORD = {"x": "red", "y": "ab"}


def test_answers_to_one_text_are_scored_together() -> None:
    examples = [continued([5, 6], answer, [1]) for answer in ([7, 8], [9], [7, 9, 9])]
    own = Asked([Loglikelihood(examples)], [[-1.0, -2.0, -3.0]])
    record, [scores], baseline = own.run(RECORD)
    assert (record, scores.tolist(), baseline) == (RECORD, [-1, -2, -3], None)
    [(engine, request)] = own.made
    assert (engine, request.input_ids, request.places) == ("decoder", [5, 6], [1])
    assert request.answers == [[7, 8], [9], [7, 9, 9]]
    assert own.noted == [("one", 2 + 1 + 0 + 2)]  # the last token of an answer is not read


def test_examples_for_a_head_are_run_together() -> None:
    examples = [continued([5] * length, []) for length in (2, 3, 4)]
    requests = [Classify(examples[0]), LocateSpan(examples[1]), ClassifyTokens(examples[2])]
    own = Asked(requests, [[("scores",), ("start", "end"), ("tags",)]])
    assert own.run(RECORD) == (RECORD, ["scores", ("start", "end"), "tags"], None)
    [(engine, request)] = own.made
    assert (engine, request.examples) == ("head", examples)
    assert own.noted == [("one", 9)]


def test_the_baseline_is_asked_for_once() -> None:
    own = Asked([Classify(continued([5], []))], [[(number,)] for number in range(9)])
    own.baseline_record = {"x": "", "y": ""}
    assert [own.run(RECORD)[1:] for _ in range(3)] == [([0], [1]), ([2], [1]), ([3], [1])]


@pytest.mark.parametrize(
    ("record", "endpoint", "message"),
    [
        (RECORD, "/v1/tag", "one was not trained for that: ask it for labels"),
        ({"x": "red"}, "/v1/classify", "the record lacks 'y': one reads x, y"),
        ({"x": "red", "y": "a" * 65}, "/v1/classify", "the record has 65 choices: give 64 at most"),
    ],
)
def test_records_that_do_not_fit_are_refused(record: Any, endpoint: str, message: str) -> None:
    own = Asked([], [])
    with pytest.raises(RequestError) as refusal:
        own.run(record, endpoint)
    assert str(refusal.value) == message
    assert own.run({"x": "red", "y": "a" * 64})


def test_an_adapter_without_a_task_takes_no_records() -> None:
    own = Asked([], [])
    own.version.info.task = None
    with pytest.raises(RequestError, match="one was not trained for that: ask it for texts"):
        own.run(RECORD)
    with pytest.raises(RequestError, match="one reads no records: send an object with these"):
        own.runner.record(own.version, "red")


def test_what_has_no_words_or_is_to_be_written_is_refused() -> None:
    with pytest.raises(RequestError, match="the record has no words: write some"):
        Asked([Loglikelihood([continued([], [7])])], []).run(RECORD)
    with pytest.raises(RequestError, match="one generates texts: ask for them at /v1/completions"):
        Asked([Generate(continued([5], []), 3)], []).run(RECORD)


def test_a_plain_text_is_the_only_column() -> None:
    own = Asked([], [])
    assert own.runner.record(own.version, {"x": 1}) == {"x": 1}
    with pytest.raises(RequestError, match="one reads x, y: send an object with these"):
        own.runner.record(own.version, "red")
    with pytest.raises(RequestError, match="one does not read 'a': it reads x, y"):
        own.runner.record(own.version, {"x": 1, "z": 2, "a": 3})
    own.columns = ("x",)
    assert own.runner.record(own.version, "red") == {"x": "red"}
