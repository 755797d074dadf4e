"""What the methods beside a cartridge put into the context, against the sizes and positions that they may take."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from softtune.distillation import report
from softtune.distillation.context import create_cartridge
from softtune.distillation.corpus import SEPARATOR
from softtune.distillation.dialogue import Dialogue
from softtune.distillation.report import CARTRIDGE, NOTHING, RETRIEVED, SUMMARY, ContextEvaluation, Question
from tests.tiny import chat_tokenizer, save_chat_model

FACTS = ["red sky is cold", "blue sky is warm", "the text is good", "green is bad"]
TEXT = " ".join(FACTS * 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")
    return AutoModelForCausalLM.from_pretrained(save_chat_model(folder / "chat", max_position_embeddings=256)).eval()


def evaluation_of(base: Any, tokens: int, **changes: Any) -> ContextEvaluation:
    fields = {
        "dialogue": Dialogue(chat_tokenizer()),
        "texts": [TEXT, "red green blue"],
        "chunk_tokens": 100,
        "tokens": tokens,
        "questions": [Question("red sky is", "cold")],
        "max_answer_tokens": 6,
        **changes,
    }
    cartridge = create_cartridge(base, fields["dialogue"].context_ids(TEXT)[:tokens])
    return ContextEvaluation(base=base, cartridge=cartridge, **fields)


@pytest.mark.parametrize("tokens", [12, 40, 41, 77, 120])
@pytest.mark.parametrize("question", ["red sky is", "green", "crowns"])
def test_retrieved_passages_have_as_many_tokens_as_the_cartridge(base: Any, tokens: int, question: str) -> None:
    evaluation = evaluation_of(base, tokens)
    text, passages = evaluation._retrieve(question), evaluation._passages
    found = text.split(SEPARATOR)
    assert {*found} <= {*passages}
    assert len(found) == 1 or len(evaluation.dialogue.context_ids(text)) <= tokens
    assert len(found) > 1 or tokens < 77
    places, start = [], 0
    for passage in found:  # in the order of the text
        places.append(passages.index(passage, start))
        start = places[-1] + 1


@pytest.mark.parametrize(("tokens", "chunk_tokens"), [(20, 100), (60, 100), (90, 100), (200, 100), (220, 200)])
def test_summaries_have_as_many_tokens_as_the_cartridge_and_positions(
    base: Any, tokens: int, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation, sizes = evaluation_of(base, tokens, chunk_tokens=chunk_tokens), list[int]()

    def noted(model: Any, tokenizer: Any, prompts: Any, *, max_new_tokens: int, **options: Any) -> list[str]:
        [asked] = prompts
        virtual = model.active_peft_config.num_virtual_tokens
        assert virtual + len(asked.input_ids) + max_new_tokens <= 256
        sizes.append(max_new_tokens)
        return [" ".join(["red"] * max_new_tokens)]

    monkeypatch.setattr(report, "write_texts", noted)
    summary = evaluation._summary
    assert len(sizes) > 2
    assert summary.startswith("red")
    assert len(evaluation.dialogue.context_ids(summary)) <= max(tokens, len(evaluation.dialogue.context_ids("red")))
    assert min(sizes) >= 1
    assert sum(sizes) <= max(tokens, len(sizes))


def test_what_does_not_fit_has_a_note(base: Any) -> None:
    """150 tokens leave a question and its answer room, but not an answer of 100."""
    results = evaluation_of(base, 150, max_answer_tokens=100).run(lambda *_: None)
    notes = {result.name: result.note for result in results}
    assert notes[CARTRIDGE].endswith("positions, the model has 256")
    assert notes[NOTHING] == ""
    short = evaluation_of(base, 20).run(lambda *_: None)
    assert {result.name for result in short if not result.note} >= {CARTRIDGE, RETRIEVED, SUMMARY, NOTHING}


def test_the_means_over_questions(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "write_texts", lambda model, tokenizer, prompts, **_: ["cold sky"] * len(prompts))
    asked = [Question("red sky is", "cold"), Question("blue sky is", "warm"), Question("sky is", "sky")]
    for result in evaluation_of(base, 40, questions=asked).run(lambda *_: None):
        if not result.note:
            assert result.accuracy == pytest.approx(2 / 3)
            assert result.f1 == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
