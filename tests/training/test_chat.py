"""Recipes for chat models: conversations, pairs and templates in the user's turn, from a file to a server's answers."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests.cli.test_cli import run
from tests.serving.test_http import serving
from tests.tiny import CHATML, MARKED, save_chat_model
from transformers import AutoTokenizer

from softtune import ConfigError, DataError, PeftModel, UnsupportedModelError
from softtune.cli.loading import Trained, load_trained
from softtune.data.encoding import IGNORED
from softtune.evaluation.answers import answer, judge
from softtune.experiments.cases import Case
from softtune.experiments.prompting import answer_alone
from softtune.serving.service import Service
from softtune.tasks import ConversationTask
from softtune.tasks.requests import Loglikelihood
from softtune.training.recipe import Recipe
from softtune.training.run import train

FACTS = [("red", "warm"), ("blue", "cold"), ("green", "good")]
CONVERSATIONS = [
    [
        {"role": "user", "content": f"the {one[0]} sky"},
        {"role": "assistant", "content": one[1]},
        {"role": "user", "content": f"{other[0]} text"},
        {"role": "assistant", "content": other[1]},
    ]
    for one in FACTS
    for other in FACTS
]
OTHER_TEMPLATE = "was trained with another chat template than the tokenizer's: expect other outputs"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: save_chat_model(folder / name, template)
        for name, template in {"plain": CHATML, "marked": MARKED, "none": None}.items()
    }


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(file)


def recipe(folder: Path, model: str, rows: list[dict[str, Any]], **fields: Any) -> Recipe:
    shared = {"model": model, "train": write(folder / "rows.jsonl", rows), "output": str(folder / "runs" / "talk")}
    options = {"options": {"num_virtual_tokens": 8}, "test_size": 0, "max_length": 60, "batch_size": 3}
    steps = {"method": "P_TUNING_V2", "epochs": 12, "learning_rate": 0.3, "warmup_steps": 0}
    return Recipe.from_fields({**shared, **options, **steps, **fields})


TALKS = [{"messages": messages} for messages in CONVERSATIONS]
PAIRS = [{"prompt": talk[:3], "completion": talk[3:]} for talk in CONVERSATIONS]
TEXTS = [{"prompt": f"{name} text", "completion": word} for name, word in FACTS] * 3
LABELLED = [{"x": f"{name} text", "y": word} for name, word in FACTS] * 3
CHOOSING = [{**row, "options": [word for _, word in FACTS]} for row in LABELLED]
KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "messages": (TALKS, {"messages": "messages", "max_new_tokens": 8}),
    "pairs": (PAIRS, {"messages": ["prompt", "completion"], "max_new_tokens": 8}),
    "texts": (TEXTS, {"messages": ["prompt", "completion"], "max_new_tokens": 8, "system": "text"}),
    "template": (LABELLED, {"chat": True, "template": "the {x} label", "label_column": "y", "max_new_tokens": 8}),
    "labels": (
        LABELLED,
        {"chat": True, "template": "the {x} label", "label_column": "y", "labels": [word for _, word in FACTS]},
    ),
    "choices": (CHOOSING, {"chat": True, "template": "{x}", "label_column": "y", "choices": "options"}),
}


def conversation(kind: str, row: dict[str, Any], fields: dict[str, Any]) -> list[dict[str, str]]:
    """A record's conversation, as a client would send it."""
    if kind in ("messages", "pairs"):
        return row["messages"] if kind == "messages" else [*row["prompt"], *row["completion"]]
    text = row["prompt"] if kind == "texts" else fields["template"].format(**row)
    system = [{"role": "system", "content": fields["system"]}] if "system" in fields else []
    reply = {"role": "assistant", "content": row["completion" if kind == "texts" else "y"]}
    return [*system, {"role": "user", "content": text}, reply]


def trained_by(folder: Path, kind: str, model: str, **changes: Any) -> tuple[Trained, list[dict[str, Any]]]:
    rows, fields = KINDS[kind]
    train(recipe(folder, model, rows, **fields, **changes))
    return load_trained(folder / "runs" / "talk", None), rows


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_is_served_as_generate_writes(
    kind: str, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, rows = trained_by(tmp_path, kind, models["plain"])
    records = Dataset.from_list(rows)
    answers = answer(trained.model, trained.tokenizer, trained.task, records)
    assert judge(trained.task, records, answers).metrics
    steps = json.loads((tmp_path / "runs" / "talk" / "history.json").read_text())["default"]
    assert steps[-1]["loss"] < steps[0]["loss"] / 3
    fields = KINDS[kind][1]
    talks = [conversation(kind, row, fields)[:-1] for row in rows[:3]]
    written = [generated(trained, talk) for talk in talks]
    assert all(written)
    if kind not in ("labels", "choices"):
        assert answers.texts[:3] == written
        capsys.readouterr()
        assert run("generate", str(tmp_path / "runs" / "talk"), str(tmp_path / "rows.jsonl")) == 0
        assert capsys.readouterr().out.splitlines()[:3] == written
    with serving(models["plain"], tmp_path / "runs") as client:
        for talk, text in zip(talks, written, strict=True):
            asked = {"model": "talk", "messages": talk, "temperature": 0, "max_tokens": 8}
            served = client.post("/v1/chat/completions", json=asked).json()
            assert served["choices"][0]["message"]["content"] == text
            assert served["choices"][0]["finish_reason"] == "stop"
        if trained.task.endpoint:
            served = client.post(
                trained.task.endpoint,
                json={"model": "talk", "input": [{c: row[c] for c in trained.task.columns} for row in rows[:3]]},
            ).json()
            assert [one["label"] for one in served["data"]] == answers.texts[:3]
            assert client.get("/v1/models/talk").json()["chat"] is True


def generated(trained: Trained, talk: list[dict[str, str]]) -> str:
    """What ``generate`` writes after a conversation through the tokenizer's own chat template."""
    inputs = trained.tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt")
    ids = trained.model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return str(trained.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("kind", ["messages", "texts", "template"])
@pytest.mark.parametrize("model", ["plain", "marked"])
def test_perplexity_is_of_the_last_turn_with_its_end(
    kind: str, model: str, models: dict[str, str], tmp_path: Path
) -> None:
    trained, rows = trained_by(tmp_path, kind, models[model], epochs=1)
    records = Dataset.from_list(rows)
    found = judge(trained.task, records, answer(trained.model, trained.tokenizer, trained.task, records)).metrics
    total, count = 0.0, 0
    for row in rows:
        talk = conversation(kind, row, KINDS[kind][1])
        ids = trained.tokenizer.apply_chat_template(talk)["input_ids"][:-1]  # without the newline behind the end
        start = len(trained.tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True)["input_ids"])
        with torch.no_grad():
            logprobs = trained.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids)))
        count += len(ids) - start
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_a_run_on_conversations_steps_by_the_loss_on_the_assistants_turns(
    models: dict[str, str], tmp_path: Path
) -> None:
    """As computed from the base model, the adapter's start and the template's own marks."""
    changes = {"epochs": 1, "batch_size": len(TALKS), "learning_rate": 1e-9}
    trained, _ = trained_by(tmp_path, "messages", models["plain"], **changes)
    marked = AutoTokenizer.from_pretrained(models["marked"])
    total, count = 0.0, 0
    for talk in CONVERSATIONS:
        encoded = marked.apply_chat_template(talk, return_assistant_tokens_mask=True, return_dict=True)
        ids, mask = torch.tensor([encoded["input_ids"]]), torch.tensor([encoded["assistant_masks"]]).bool()
        labels = ids.masked_fill(~mask, IGNORED)
        with torch.no_grad():
            total += float(trained.model(ids, labels=labels).loss) * int(mask.sum())
        count += int(mask.sum())
    [step] = json.loads((tmp_path / "runs" / "talk" / "history.json").read_text())["default"]
    assert step["loss"] == pytest.approx(total / count, rel=1e-4)


def test_pairs_are_trained_on_their_completions_alone(models: dict[str, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models["plain"])
    pairs = ConversationTask(prompt_column="prompt", label_column="completion", max_length=60, max_new_tokens=8)
    whole = ConversationTask(prompt_column="messages", label_column="messages", max_length=60, max_new_tokens=8)
    [own], [all_turns] = pairs.examples(PAIRS[1], tokenizer), whole.examples(TALKS[1], tokenizer)
    assert own.input_ids == all_turns.input_ids
    kept = [label for label in own.labels if label != IGNORED]
    assert tokenizer.decode(kept) == "cold</s>"
    assert tokenizer.decode([label for label in all_turns.labels if label != IGNORED]) == "warm</s>cold</s>"


@pytest.mark.parametrize(
    ("method", "options"),
    [("PROMPT_TUNING", {"placement": "suffix"}), ("PREFIX_TUNING", {"placement": "infix"})],
)
def test_virtual_tokens_behind_the_text_stand_before_the_turn_that_is_trained(
    method: str, options: dict[str, Any], models: dict[str, str], tmp_path: Path
) -> None:
    """Each turn is then an example of its own, so that they stand where they do at inference."""
    changes = {"method": method, "options": {"num_virtual_tokens": 4, **options}, "epochs": 2}
    trained, _ = trained_by(tmp_path, "messages", models["plain"], **changes)
    examples = trained.task.examples(TALKS[1], trained.tokenizer)
    kept = [[label for label in example.labels if label != IGNORED] for example in examples]
    assert [trained.tokenizer.decode(labels) for labels in kept] == ["warm</s>", "cold</s>"]
    opening = trained.task.prompt(TALKS[1], trained.tokenizer)
    assert examples[1].input_ids[: len(opening.input_ids)] == opening.input_ids


def test_a_conversation_without_a_reference_is_answered(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_by(tmp_path, "messages", models["plain"])
    folder, open_ends = str(tmp_path / "runs" / "talk"), [{"messages": talk[:3]} for talk in CONVERSATIONS[:3]]
    assert run("predict", folder, write(tmp_path / "open.jsonl", open_ends)) == 0
    shown = capsys.readouterr().out
    assert "exact match" not in shown
    assert "the red sky" in shown
    assert run("predict", folder, str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out.jsonl")) == 0
    assert "exact match" in capsys.readouterr().out
    answered = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(row["answer"] for row in answered)
    assert [row["messages"] for row in answered] == CONVERSATIONS
    assert run("predict", folder, "--text", "red text") == 0
    assert "red text" in capsys.readouterr().out
    assert run("predict", folder, write(tmp_path / "both.jsonl", [TALKS[0], *open_ends])) == 2
    says = capsys.readouterr().err
    assert "row 2: the conversation in column 'messages' does not end with the assistant's turn; add it" in says


def test_a_folder_notes_the_chat_template_of_training(models: dict[str, str], tmp_path: Path) -> None:
    trained, _ = trained_by(tmp_path, "template", models["plain"], ensemble=2, epochs=1)
    folder = tmp_path / "runs" / "talk"
    notes = [json.loads((folder / name / "softtune_config.json").read_text()) for name in ("1", "2")]
    assert [note["chat_template"] for note in notes] == [CHATML] * 2
    trained.model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "1" / "softtune_config.json").read_text())["chat_template"] == CHATML
    with pytest.warns(UserWarning, match=OTHER_TEMPLATE) as told:
        load_trained(folder, models["marked"])
    assert [str(one.message).split(" was ")[0] for one in told] == [f"the adapter in {folder / n}" for n in ("1", "2")]
    with pytest.warns(UserWarning, match=OTHER_TEMPLATE):
        load_trained(folder, models["none"])
    service = Service(models["marked"])
    with pytest.warns(UserWarning, match=f"the adapter in {folder / '1'} {OTHER_TEMPLATE}"):
        service.registry.add("1", folder / "1")
    service.close(0)
    PeftModel.from_pretrained(trained.model.get_base_model(), folder / "1")  # nothing is known of a tokenizer


def test_an_adapter_that_was_trained_without_a_chat_template_says_none(models: dict[str, str], tmp_path: Path) -> None:
    fields = {"template": "{x} label : ", "label_column": "y", "labels": [word for _, word in FACTS], "epochs": 1}
    train(recipe(tmp_path, models["plain"], LABELLED, **fields))
    assert "chat_template" not in json.loads((tmp_path / "runs" / "talk" / "softtune_config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_trained(tmp_path / "runs" / "talk", models["marked"])


def test_shots_stand_in_the_users_turn(models: dict[str, str], tmp_path: Path) -> None:
    rows, fields = KINDS["labels"]
    asked = recipe(tmp_path, models["plain"], rows, **{**fields, "test_size": 3})
    case = Case(name="few-shot", number=0, entry="few-shot", recipe=asked, seeds=1)
    [found] = answer_alone(case, lambda *_: None)
    assert 0 <= found.metrics["accuracy"] <= 1
    rows, fields = KINDS["messages"]
    asked = recipe(tmp_path, models["plain"], rows, **{**fields, "test_size": 3})
    with pytest.raises(UnsupportedModelError, match="conversations have no template that rows could stand in: leave"):
        answer_alone(replace(case, recipe=asked), lambda *_: None)
    [found] = answer_alone(replace(case, recipe=asked, entry="zero-shot"), lambda *_: None)
    assert found.metrics["perplexity"] > 1


@pytest.mark.parametrize("kind", ["messages", "labels"])
def test_other_commands_take_such_adapters(
    kind: str, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(recipe(tmp_path, models["plain"], KINDS[kind][0], **KINDS[kind][1], epochs=1)).folder
    assert run("inspect", str(folder)) == 0
    assert run("report", str(folder)) == 0
    assert run("bake", str(folder), "--model", models["plain"], "--to", str(tmp_path / "baked")) == 0, (
        capsys.readouterr()
    )
    compared = ["--entries", "prefix-tuning,zero-shot", "--seeds", "1", "--test-size", "3", "--output", "compared"]
    (tmp_path / "recipe.yaml").write_text((folder / "recipe.yaml").read_text(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert run("compare", "recipe.yaml", *compared) == 0, capsys.readouterr()


@pytest.mark.parametrize("kind", ["labels", "choices"])
def test_every_label_follows_the_same_text(kind: str, models: dict[str, str]) -> None:
    """Also where the text is cut, to leave room for the longest."""
    words = ["warm", "good and bad and cold"]
    fields = {**KINDS[kind][1], **({"labels": words} if kind == "labels" else {}), "max_length": 26}
    task = Recipe.from_fields({**FIELDS, **fields}).definition
    record = {"x": " ".join(["red"] * 9), "y": "warm", "options": words}
    tokenizer = AutoTokenizer.from_pretrained(models["plain"])
    [request] = task.requests(record, tokenizer)
    assert isinstance(request, Loglikelihood)
    counts = [sum(label != IGNORED for label in example.labels) for example in request.examples]
    assert counts == [2, 10]
    texts = [example.input_ids[:-count] for example, count in zip(request.examples, counts, strict=True)]
    assert texts[0] == texts[1]
    assert max(len(example.input_ids) for example in request.examples) == 26
    assert all(example.truncated for example in request.examples)


Change = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "messages",
            lambda rows: [{"messages": rows[0]["messages"][:3]}],
            "row 1: .* does not end with the assistant's",
        ),
        (
            "messages",
            lambda rows: [{"messages": rows[0]["messages"][:1]}],
            "row 1: .* does not end with the assistant's",
        ),
        ("messages", lambda rows: [{"messages": [{"from": "user", "value": "x"}]}], "row 1: message 1 in column 'mess"),
        ("messages", lambda rows: [*rows, {"messages": None}], "row 10: column 'messages' holds no conversation"),
        (
            "messages",
            lambda rows: [{"talk": rows[0]["messages"]}],
            "no column 'messages' in the data, which has 'talk'; name one",
        ),
        (
            "texts",
            lambda rows: [{**rows[0], "completion": " "}],
            "row 1: the last turn in column 'completion' has no text",
        ),
    ],
)
def test_rows_that_do_not_fit_are_told(
    kind: str, change: Change, message: str, models: dict[str, str], tmp_path: Path
) -> None:
    rows, fields = KINDS[kind]
    with pytest.raises(DataError, match=message) as caught:
        train(recipe(tmp_path, models["plain"], change(rows), **fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_too_long_and_a_tokenizer_without_a_chat_template(
    kind: str, models: dict[str, str], tmp_path: Path
) -> None:
    rows, fields = KINDS[kind]
    with pytest.raises(DataError, match="the base model's tokenizer has no chat template: use a chat model"):
        train(recipe(tmp_path, models["none"], rows, **fields))
    with pytest.raises(DataError, match=r"row 1: .*, max_length is 5; raise it or shorten"):
        train(recipe(tmp_path, models["plain"], rows, **fields, max_length=5))
    if kind == "messages":
        report = train(recipe(tmp_path, models["plain"], rows, **fields, max_length=14, epochs=1))
        assert report.truncated == len(rows)


FIELDS: dict[str, Any] = {"model": "m", "train": "t.jsonl", "output": "o"}
TEMPLATED = {**FIELDS, "template": "{x}", "label_column": "y"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (FIELDS, "recipe: template is missing: add it, or messages$"),
        ({**FIELDS, "template": "{x}"}, "recipe: label_column is missing: add it, or messages$"),
        ({**FIELDS, "chat": True}, "template is missing"),
        ({**TEMPLATED, "messages": "m"}, "messages are whole conversations: drop template, or messages"),
        ({**FIELDS, "messages": "m", "labels": ["a"]}, "messages are whole conversations: drop labels, or messages"),
        ({**FIELDS, "messages": ["a"]}, r"messages is \['a'\]: name the column with conversations, or list those with"),
        ({**FIELDS, "messages": "m", "task": "SEQ_2_SEQ_LM"}, "messages are for a decoder: set task: CAUSAL_LM"),
        ({**FIELDS, "messages": "m", "chat": True}, "chat is for a template whose answer a decoder writes"),
        ({**TEMPLATED, "chat": True, "task": "SEQ_CLS", "labels": ["a"]}, "chat is for a template whose answer a dec"),
        ({**TEMPLATED, "system": "s"}, "system is for conversations: set chat or messages, or drop it"),
        (
            {**TEMPLATED, "chat": True, "template": "{prompt:3} {x}", "method": "P_TUNING"},
            "chat makes the template the user's turn, which has no places of virtual tokens: drop them",
        ),
    ],
)
def test_fields_that_do_not_fit_together_are_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe.from_fields(fields)
    assert "\n" not in str(caught.value)


def test_recipes_on_conversations_are_saved_and_read(tmp_path: Path) -> None:
    for fields in ({"messages": ["a", "b"], "system": "s"}, {"messages": "m"}):
        own = Recipe.from_fields({**FIELDS, **fields})
        own.save(tmp_path / "recipe.yaml")
        assert Recipe.from_adapter(tmp_path) == own
        assert isinstance(own.definition, ConversationTask)
