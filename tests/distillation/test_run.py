"""Distillations from end to end on tiny models: interrupted ones, refused ones, and what comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from softtune import AutoPeftModelForCausalLM, PeftModel
from softtune.distillation import Distillation, distill, run, self_study, teacher
from softtune.distillation import report as reports
from softtune.distillation.context import create_cartridge
from softtune.distillation.dialogue import Dialogue
from softtune.distillation.report import CARTRIDGE, FULL, NOTHING, RETRIEVED, SUMMARY
from softtune.errors import ConfigError, DataError
from softtune.load_options import LoadOptions
from softtune.serving.engine_config import EngineConfig
from softtune.serving.service import Service
from tests.cli.test_cli import interrupt_in_step
from tests.serving.test_service import write
from tests.tiny import chat_tokenizer, save_chat_model, save_models

TEXT = " ".join(["red sky is cold", "blue sky is warm", "the text is good", "green is bad"] * 5)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    models = save_models(folder, max_position_embeddings=512)
    chat = save_chat_model(folder / "chat", max_position_embeddings=512, attention_dropout=0.1)
    return {**models, "chat": chat, "gpt2": save_gpt2(folder / "gpt2", models["llama"])}


def save_gpt2(folder: Path, llama: str) -> str:
    """A model whose positions are learned, so that it fails beyond the last."""
    words = AutoTokenizer.from_pretrained(llama)
    sizes = {"vocab_size": len(words), "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 512}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0)).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and files of a few conversations, so that there are several."""
    monkeypatch.setattr(self_study, "BATCH", 3)
    monkeypatch.setattr(teacher, "SHARD", 4)


def settings(models: dict[str, str], output: Path, **changes: Any) -> Distillation:
    fields = {
        "model": models["chat"],
        "output": str(output),
        "text": TEXT,
        "tokens": 12,
        "num_questions": 10,
        "steps": 5,
        "batch_size": 3,
        "save_steps": 2,
        "chunk_tokens": 60,
        "max_answer_tokens": 6,
        **changes,
    }
    return Distillation(**fields)


def questions(folder: Path) -> str:
    file = folder / "questions.jsonl"
    rows = [{"question": "red sky is", "answer": "cold"}, {"question": "green is", "answer": "bad"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("kind", ["llama", "chat"])
def test_a_text_becomes_an_adapter_with_a_report(kind: str, models: dict[str, str], tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    chosen = settings(models, tmp_path / "out", model=models[kind], questions=questions(tmp_path), steps=12)
    report = distill(chosen, progress=lambda phase, done, total, notes: seen.update({str(phase): (done, total)}))
    assert {name: done == total for name, (done, total) in seen.items()} == dict.fromkeys(
        ["generating questions", "teacher log-probabilities", "training", "evaluating"], True
    )
    assert not (tmp_path / "out" / "unfinished").exists()
    assert report.chunks > 1
    assert report.last_loss < report.first_loss
    assert [result.name for result in report.results] == [CARTRIDGE, FULL, RETRIEVED, SUMMARY, NOTHING]
    by_name = {result.name: result for result in report.results}
    assert by_name[CARTRIDGE].tokens == 12
    assert by_name[CARTRIDGE].kv_bytes == 12 * 2 * 2 * 2 * 6 * 4  # layers, keys and values, heads, their size, fp32
    assert by_name[FULL].kv_bytes == by_name[FULL].tokens / 12 * by_name[CARTRIDGE].kv_bytes
    assert by_name[NOTHING].tokens == by_name[NOTHING].kv_bytes == by_name[NOTHING].reading == 0
    assert all(len(result.answers) == 2 and 0 <= result.accuracy <= 1 for result in report.results)
    saved = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert saved["is_known"] is True
    assert saved["results"][0]["f1"] == by_name[CARTRIDGE].f1

    loaded = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    words = AutoTokenizer.from_pretrained(models[kind])
    form = Dialogue(words)
    start = form.context_ids(TEXT)[:12]
    weight = loaded.adapter("default").module.weight
    first = create_cartridge(AutoModelForCausalLM.from_pretrained(models[kind]).eval(), start)
    begun = first.adapter("default").module.weight
    torch.testing.assert_close(weight[0], begun[0])
    assert (weight - begun)[1:].abs().amax(-1).min() > 0
    asked = form.request("red sky is").input_ids
    ids = loaded.generate(input_ids=torch.tensor([asked]), max_new_tokens=6, do_sample=False)
    assert words.decode(ids[0, len(asked) :], skip_special_tokens=True).strip() == by_name[CARTRIDGE].answers[0]


def test_a_server_answers_with_a_cartridge(models: dict[str, str], tmp_path: Path) -> None:
    distill(settings(models, tmp_path / "out"))
    service = Service(models["chat"], EngineConfig(num_kv_slots=200))
    service.registry.add("manual", tmp_path / "out")
    service.start()
    asked = Dialogue(chat_tokenizer()).request("red sky is").input_ids
    found = [piece.choice.token for piece in write(service, "manual", asked, max_tokens=6)]
    service.close(1)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models["chat"]), tmp_path / "out").eval()
    ids = loaded.generate(input_ids=torch.tensor([asked]), max_new_tokens=6, do_sample=False)
    assert found == ids[0, len(asked) :].tolist()


def interrupt_after(patch: pytest.MonkeyPatch, place: Any, name: str, calls: int) -> None:
    """Press Ctrl-C in the call of this number."""
    original, seen = getattr(place, name), list[int]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == calls:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    patch.setattr(place, name, counted)


Press = Callable[[pytest.MonkeyPatch], Any]
INTERRUPTS: dict[str, Press] = {
    "questions": lambda patch: interrupt_after(patch, self_study, "write_texts", 4),
    "teacher": lambda patch: interrupt_after(patch, teacher, "answer_logits", 2),
    "training": lambda patch: interrupt_in_step(patch, 3),
    "report": lambda patch: interrupt_after(patch, reports, "write_texts", 2),
}


def interrupted(chosen: Distillation, press: Press, *, is_trained: bool = False) -> None:
    """A distillation that Ctrl-C ends. The cartridge is there as soon as it is trained."""
    with pytest.MonkeyPatch.context() as patch:
        press(patch)
        with pytest.raises(KeyboardInterrupt, match=r"^stopped; what is done is kept in .*: the same command goes on$"):
            distill(chosen)
    assert (Path(chosen.output) / "unfinished").is_dir()
    assert (Path(chosen.output) / WEIGHTS).exists() is is_trained
    assert not (Path(chosen.output) / "distillation.json").exists()


@pytest.fixture(scope="module")
def unbroken(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_study, "BATCH", 3)
        patch.setattr(teacher, "SHARD", 4)
        folder = tmp_path_factory.mktemp("unbroken") / "out"
        distill(settings(models, folder))
    return folder


@pytest.mark.parametrize("phase", INTERRUPTS)
def test_an_interrupted_distillation_goes_on_as_if_it_had_not_been(
    phase: str, models: dict[str, str], unbroken: Path, tmp_path: Path
) -> None:
    chosen = settings(models, tmp_path / "out")
    interrupted(chosen, INTERRUPTS[phase], is_trained=phase == "report")
    torch.rand(7)  # other random numbers than those of one run
    report = distill(chosen)
    expected = json.loads((unbroken / "distillation.json").read_text())
    assert (tmp_path / "out" / "conversations.jsonl").read_text() == (unbroken / "conversations.jsonl").read_text()
    own, others = load_file(tmp_path / "out" / WEIGHTS), load_file(unbroken / WEIGHTS)
    assert own.keys() == others.keys()
    assert all(torch.equal(own[name], others[name]) for name in own)
    assert (report.steps, report.first_loss, report.last_loss) == tuple(
        expected[name] for name in ("steps", "first_loss", "last_loss")
    )


def test_conversations_may_be_edited_until_training_begins(models: dict[str, str], tmp_path: Path) -> None:
    chosen, file = settings(models, tmp_path / "out"), tmp_path / "out" / "conversations.jsonl"
    interrupted(chosen, INTERRUPTS["teacher"])
    lines = file.read_text().splitlines(keepends=True)
    edited = json.loads(lines[0]) | {"question": "the sky", "answer": "is red"}
    file.write_text(json.dumps(edited) + "\n" + "".join(lines[2:]))
    interrupted(chosen, INTERRUPTS["training"])
    file.write_text("".join(lines))
    kept = {shard.name: shard.read_bytes() for shard in (tmp_path / "out" / "unfinished" / "teacher").iterdir()}
    with pytest.raises(ConfigError, match=r"conversations.jsonl is not what the training began with: restore it, or"):
        distill(chosen)
    assert {s.name: s.read_bytes() for s in (tmp_path / "out" / "unfinished" / "teacher").iterdir()} == kept
    file.write_text('{"chunk": 99, "question": "a", "answer": "b"}\n')
    with pytest.raises(DataError, match=r"row 1 names chunk 99, there are \d: from 0 on$"):
        distill(chosen)
    file.write_text('{"chunk": 0, "question": "a", "answer": ""}\n')
    with pytest.raises(DataError, match=r"row 1 lacks a question or an answer: fill it in or drop the row$"):
        distill(chosen)


def test_other_settings_do_not_go_on(models: dict[str, str], tmp_path: Path) -> None:
    interrupted(settings(models, tmp_path / "out"), INTERRUPTS["questions"])
    with pytest.raises(ConfigError, match=r"^tokens is 13, and 12 in the interrupted distillation in .*: go on with"):
        distill(settings(models, tmp_path / "out", tokens=13))
    with pytest.raises(
        ConfigError, match=r"^the text or the seed prompts have changed since the interrupted .*: go on"
    ):
        distill(settings(models, tmp_path / "out", text=TEXT + " red"))
    with pytest.raises(ConfigError, match=r"^questions were given or dropped since the interrupted distillation in"):
        distill(settings(models, tmp_path / "out", questions=questions(tmp_path)))


def test_a_finished_one_is_left_alone(models: dict[str, str], unbroken: Path) -> None:
    with pytest.raises(ConfigError, match=r"has a finished adapter: choose another output or delete it$"):
        distill(settings(models, unbroken))


def test_what_does_not_fit_is_one_line(models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^tokens is 200, and the text has 154: set it to 154 at most"):
        distill(settings(models, tmp_path / "a", tokens=200))
    assert not (tmp_path / "a").exists()  # so that another number of tokens is no other setting
    with pytest.raises(ConfigError, match=r"take \d+ positions, the model has 512: lower tokens or max_answer_tokens$"):
        distill(settings(models, tmp_path / "b", tokens=500))
    with pytest.raises(ConfigError, match=r"^the teacher has another vocabulary: \d+ of 22 tokens have another id"):
        distill(settings(models, tmp_path / "c", teacher=models["llama"]))
    with pytest.raises(ConfigError, match=r"is no decoder"):
        distill(settings(models, tmp_path / "d", model=models["bert"]))
    with pytest.raises(ConfigError, match=r"is no model for CAUSAL_LM"):
        distill(settings(models, tmp_path / "e", model=models["t5"]))
    with pytest.raises(
        ConfigError, match=r"log-probabilities each take [\d.]+ k?B, cache_mb allows 10 B: raise cache_mb, or begin"
    ):
        distill(settings(models, tmp_path / "f", cache_mb=1e-5))
    with pytest.raises(ConfigError, match=r"^a distillation takes a corpus or a text: give one of the two$"):
        settings(models, tmp_path / "g", corpus="folder")
    with pytest.raises(ConfigError, match=r"^steps: Input should be greater than or equal to 1: correct this field"):
        settings(models, tmp_path / "h", steps=0)
    (tmp_path / "rows.jsonl").write_text('{"question": "red", "answer": null}\n{"question": "a", "answer": "b"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl: row 1: column 'answer' holds null"):
        distill(settings(models, tmp_path / "i", questions=str(tmp_path / "rows.jsonl")))
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(DataError, match=r"has no seed prompt: write one instruction a line$"):
        distill(settings(models, tmp_path / "j", seed_prompts=str(tmp_path / "prompts.txt")))


def test_a_text_that_does_not_fit_the_context_is_said(models: dict[str, str], tmp_path: Path) -> None:
    chosen = settings(models, tmp_path / "out", text=" ".join([TEXT] * 4), questions=questions(tmp_path))
    report = distill(chosen)
    full = next(result for result in report.results if result.name == FULL)
    assert full.note.startswith("needs 6")
    assert full.note.endswith("positions, the model has 512")
    assert report.chunks > 4


def test_conversations_of_another_distillation_are_refused(models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "conversations.jsonl").write_text('{"chunk": 0, "question": "red", "answer": "green"}\n')
    with pytest.raises(
        ConfigError, match=r"conversations.jsonl is of no interrupted distillation: choose another output"
    ):
        distill(settings(models, tmp_path / "out"))


def test_a_conversation_that_does_not_fit_is_named(models: dict[str, str], tmp_path: Path) -> None:
    chosen, file = settings(models, tmp_path / "out", questions=questions(tmp_path)), tmp_path / "out"
    interrupted(chosen, INTERRUPTS["teacher"])
    first, second, *rest = (file / "conversations.jsonl").read_text().splitlines(keepends=True)
    edited = json.dumps({**json.loads(second), "question": TEXT * 4}) + "\n"
    (file / "conversations.jsonl").write_text("".join([first, edited, *rest]))
    with pytest.raises(DataError, match=r"conversations.jsonl: row 2: .* tokens"):
        distill(chosen)


def test_a_question_that_does_not_fit_is_named_before_all(models: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "red", "answer": "b"}\n' + json.dumps({"question": TEXT * 4, "answer": "b"}) + "\n")
    with pytest.raises(DataError, match=r"questions.jsonl: row 2: .* tokens"):
        distill(settings(models, tmp_path / "out", questions=str(file)))
    assert not (tmp_path / "out").exists()


def test_the_output_may_be_in_the_folder_of_the_text(models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "manual.md").write_text(TEXT)
    chosen = settings(models, tmp_path / "runs", text=None, corpus=str(tmp_path))
    interrupted(chosen, INTERRUPTS["training"])
    distill(chosen)
    with pytest.raises(ConfigError, match=r"is the corpus: choose another output$"):
        distill(settings(models, tmp_path, text=None, corpus=str(tmp_path)))


@pytest.mark.parametrize("kind", ["chat", "gpt2"])
def test_a_long_summary_has_the_positions_that_are_left(kind: str, models: dict[str, str], tmp_path: Path) -> None:
    """The whole text, 307 tokens, and a summary of as many as the cartridge have more positions than the model."""
    changes = {"model": models[kind], "text": f"{TEXT} {TEXT}", "tokens": 290, "chunk_tokens": 400, "steps": 1}
    report = distill(settings(models, tmp_path / "out", **changes))
    assert report.chunks == 1
    summary = next(result for result in report.results if result.name == SUMMARY)
    assert summary.note == ""
    assert 0 < summary.tokens <= 290


def test_a_failed_report_leaves_the_cartridge(models: dict[str, str], tmp_path: Path) -> None:
    chosen = settings(models, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "bm25_scores", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distill(chosen)
    first = load_file(tmp_path / "out" / WEIGHTS)
    assert distill(chosen).steps == 5
    again = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(first[name], again[name]) for name in again)


def test_the_revision_is_the_base_models_alone(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Any]] = []
    original = run.load_base_model

    def noted(name: str, *, options: LoadOptions) -> Any:
        seen.append((Path(name).name, options.revision))
        return original(name, options=options)

    monkeypatch.setattr(run, "load_base_model", noted)
    other = save_chat_model(tmp_path / "other", max_position_embeddings=512)
    distill(settings(models, tmp_path / "out", teacher=other, load=LoadOptions(revision="v1"), steps=1))
    assert seen == [("chat", "v1"), ("other", None)]


def test_a_teacher_with_more_positions_than_the_student(models: dict[str, str], tmp_path: Path) -> None:
    other = save_chat_model(tmp_path / "other", max_position_embeddings=1024)
    long = " ".join([TEXT] * 4)
    report = distill(
        settings(models, tmp_path / "out", teacher=other, text=long, tokens=290, chunk_tokens=800, steps=1)
    )
    assert report.chunks == 1
    notes = {result.name: result.note for result in report.results}
    assert notes.pop(FULL).endswith("positions, the model has 512")
    assert {*notes.values()} == {""}


def test_another_model_teaches(models: dict[str, str], tmp_path: Path) -> None:
    other = save_chat_model(tmp_path / "other", max_position_embeddings=512, hidden_act="relu")
    report = distill(settings(models, tmp_path / "out", teacher=other))
    own = distill(settings(models, tmp_path / "own"))
    assert report.first_loss != own.first_loss
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models["chat"]), tmp_path / "out")
    assert loaded.adapter("default").config.num_virtual_tokens == 12


def test_seed_prompts_are_asked_in_turn(models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("is the sky red\n\nis green good => the text \n")
    asked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        original = self_study.SelfStudy.instruction

        def noted(self: Any, text: str, row: int) -> str:
            asked.append(original(self, text, row))
            return asked[-1]

        patch.setattr(self_study.SelfStudy, "instruction", noted)
        distill(settings(models, tmp_path / "out", seed_prompts=str(tmp_path / "prompts.txt"), chunk_tokens=400))
    ends = [one.rpartition("\n\n")[2] for one in asked]
    assert ends == ["is the sky red", "is green good"] * 5
    lines = (tmp_path / "out" / "conversations.jsonl").read_text().splitlines()
    begun = [json.loads(line)["question"].startswith("the text") for line in lines]
    assert len(begun) // 3 <= sum(begun) < len(begun)
    assert all(one.split("\n\n")[0].removeprefix("Passage: ") in TEXT for one in asked)


@pytest.mark.parametrize(
    ("written", "question"),
    [
        ('\n "Who is it?" \nmore', "Who is it?"),
        ("Question: Who?", "Who?"),
        ("Q: Who?", "Who?"),
        (" \n", ""),
        ("", ""),
    ],
)
def test_the_question_in_what_is_written(written: str, question: str) -> None:
    assert self_study.as_question(written) == question
