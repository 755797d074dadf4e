"""The census of architectures, for twenty classes that have ways of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures import TASKS, architectures, build
from tests.census import CENSUS, HOLDS, MARKS, METHODS, REFUSED, UNBUILT, WRONG, Case, examine, write

KNOWN = {name: (task, model_type) for task, model_type, name in architectures()}
SAMPLE = {
    "ArceeForCausalLM": METHODS,
    "DiffLlamaForCausalLM": METHODS,  # attends twice a layer, to halves of the values
    "FalconH1ForCausalLM": METHODS,  # states and attention in every layer
    "GPTBigCodeForCausalLM": METHODS,
    "Llama4ForCausalLM": METHODS,  # its text model has the language head inside
    "NemotronForCausalLM": METHODS,
    "Phi3ForCausalLM": METHODS,
    "RwkvForCausalLM": ("prompt", "BitFit"),  # a list of states, and weights that are scaled by the mode
    "XGLMForCausalLM": METHODS,
    "LEDForConditionalGeneration": ("prompt", "P-tuning", "BitFit"),
    "PegasusXForConditionalGeneration": METHODS,
    "T5GemmaForConditionalGeneration": METHODS,  # eager attention, without masks
    "CamembertForMaskedLM": METHODS,
    "EsmForMaskedLM": ("prefix", "P-tuning v2", "BitFit"),  # positions from behind the padding's
    "NystromformerForMaskedLM": ("BitFit",),  # sees padding
    "MegatronBertForSequenceClassification": ("prompt", "P-tuning", "BitFit"),  # looks like a decoder
    "XLMRobertaForSequenceClassification": METHODS,
    "BigBirdForTokenClassification": ("prompt", "P-tuning", "BitFit"),
    "DebertaForTokenClassification": METHODS,
    "MPNetForQuestionAnswering": ("prompt", "P-tuning", "BitFit"),
}


@pytest.mark.filterwarnings("ignore")  # of single models
@pytest.mark.parametrize("name", SAMPLE)
def test_nothing_is_wrong(name: str) -> None:
    if name not in KNOWN:
        pytest.skip("the installed transformers has no such class")
    task, model_type = KNOWN[name]
    cases = {case.method: case for case in examine(task, model_type, name)}
    assert {method: case.why for method, case in cases.items() if case.outcome in (WRONG, UNBUILT)} == {}
    assert {method for method, case in cases.items() if case.outcome == HOLDS} >= set(SAMPLE[name])
    assert all("\n" not in case.why for case in cases.values())


def test_a_model_is_small_and_has_no_dropout() -> None:
    task, model_type = KNOWN["Phi3ForCausalLM"]
    model = build(model_type, "Phi3ForCausalLM")
    assert task == "CAUSAL_LM"
    assert sum(p.numel() for p in model.parameters()) < 1e6
    assert model.config.resid_pdrop == model.config.attention_dropout == 0


def test_every_task_has_classes() -> None:
    assert {task for task, _ in KNOWN.values()} == {*TASKS}


def test_a_page_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    write([], tmp_path / "build" / "support.md")
    assert (tmp_path / "build" / "support.md").is_file()


def test_the_page_keeps_what_stands_before_it(tmp_path: Path) -> None:
    path = tmp_path / "support.md"
    path.write_text("# What is tested\n\nA table.\n")
    rows = [Case("CAUSAL_LM", "x", "XForCausalLM", method, HOLDS) for method in METHODS]
    rows[1] = rows[1]._replace(outcome=REFUSED)
    for cases in ([], rows):
        write(cases, path)
    text = path.read_text()
    assert text.startswith("# What is tested\n\nA table.\n\n" + CENSUS)
    assert text.count(CENSUS) == 1
    assert "| CAUSAL_LM | 1 | 1 | 1 / 0 / 0 | 0 / 1 / 0 |" in text
    assert f"| XForCausalLM | {MARKS[HOLDS]} | {MARKS[REFUSED]} |" in text
