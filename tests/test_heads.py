"""Promises 2 and 3 for further heads: multiple choice, masked words with a verbalizer, and no head at all."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForMultipleChoice, PreTrainedModel

from softtune import (
    BitFitConfig,
    DataError,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from tests.families import (
    CAUSAL_LM,
    FAMILIES,
    METHODS,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    TOKEN_CLS,
    VOCABULARY,
    P,
    adapted,
    base_model,
    batch,
    family_config,
    pad,
    scramble,
    takes,
    texts,
)
from tests.reference import prefixes, virtual_tokens

ENCODERS = ("bert", "roberta", "distilbert", "electra", "albert", "modernbert", "deberta_v2")
KINDS = ("prompt", "prompt_suffix", "prefix", "p_tuning_v2", "bitfit_added")
CASES = [(family, method) for family in ENCODERS for method in KINDS if takes(family, method)]


def with_head(auto: Any, family: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(family_config(family)).eval()


def tuned(auto: Any, family: str, method: str, task: str | None) -> PeftModel:
    return scramble(get_peft_model(with_head(auto, family), METHODS[method](task_type=task))).eval()


@pytest.mark.promise(2, 3)
@pytest.mark.parametrize(("family", "method"), CASES)
def test_choices_are_the_same_alone_and_padded(family: str, method: str) -> None:
    model = tuned(AutoModelForMultipleChoice, family, method, SEQ_CLS)
    choices = [texts(family, SEQ_CLS, (5, 3)), texts(family, SEQ_CLS, (2, 6))]
    alone = [[model(input_ids=c[None, None]).logits[0, 0] for c in row] for row in choices]
    expected = torch.stack([torch.stack(row) for row in alone])
    for side in ("right", "left"):
        ids = torch.stack([pad(row, side, width=7) for row in choices])
        mask = torch.stack([pad([torch.ones_like(c) for c in row], side, width=7, value=0) for row in choices])
        output = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([1, 0]))
        torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.loss, F.cross_entropy(expected, torch.tensor([1, 0])), atol=1e-5, rtol=1e-5)
    assert {n.split(".")[0] for n in model.adapter("default").heads} == {
        n.split(".")[0] for n in model.backbone.head_names
    }


@pytest.mark.promise(2, 3)
@pytest.mark.parametrize(("family", "method"), CASES)
def test_words_at_a_mask(family: str, method: str) -> None:
    """A verbalizer's words are scored where the template has its mask: outputs must line up with it."""
    model, rows = tuned(AutoModelForMaskedLM, family, method, None), texts(family, SEQ_CLS, (6, 4, 3))
    places, words = (2, 3, 0), torch.tensor([11, 23])
    expected = [model(input_ids=row[None]).logits[0, at, words] for row, at in zip(rows, places, strict=True)]
    for side in ("right", "left"):
        output = model(**batch(rows, side, width=8)).logits
        assert output.shape == (3, 8, VOCABULARY)
        starts = [0 if side == "right" else 8 - len(row) for row in rows]
        for i, (start, at) in enumerate(zip(starts, places, strict=True)):
            torch.testing.assert_close(output[i, start + at, words], expected[i], atol=1e-5, rtol=1e-5)


@pytest.mark.promise(3, methods=("p_tuning_mlp",))
@pytest.mark.parametrize("family", ENCODERS)
def test_a_template_with_anchors_around_a_mask(family: str) -> None:
    base = with_head(AutoModelForMaskedLM, family)
    model = scramble(get_peft_model(base, PromptEncoderConfig(num_virtual_tokens=P))).eval()
    (row,), columns = texts(family, SEQ_CLS, (5,)), [0, 1, 1, 3, 5]
    vectors = model.prompt_encoder["default"]()
    sequence, slots = virtual_tokens.arrange(base.get_input_embeddings()(row), vectors, columns)
    plain, virtual = with_head(AutoModelForMaskedLM, family), set(range(len(sequence))) - set(slots)
    window = FAMILIES[family].window  # which does not end virtual tokens
    with prefixes.naive_prefixes(plain, {}, open_slots=tuple(virtual)) if window else nullcontext():
        expected = plain(inputs_embeds=sequence[None]).logits[0, slots]
    output = model(row[None], prompt_positions=torch.tensor([columns])).logits[0]
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.promise(2, 3)
@pytest.mark.parametrize(("family", "method"), CASES)
def test_features_line_up_with_the_words(family: str, method: str) -> None:
    model, rows = tuned(AutoModel, family, method, "FEATURE_EXTRACTION"), texts(family, SEQ_CLS, (6, 4, 3))
    alone = [model(input_ids=row[None]).last_hidden_state[0] for row in rows]
    for side in ("right", "left"):
        states = model(**batch(rows, side)).last_hidden_state
        for own, row, expected in zip(states, rows, alone, strict=True):
            mine = own[: len(row)] if side == "right" else own[len(own) - len(row) :]
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.promise(2, 3)
@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("method", ["prompt", "prefix", "bitfit_added"])
def test_features_of_decoders(family: str, method: str) -> None:
    model, rows = tuned(AutoModel, family, method, "FEATURE_EXTRACTION"), texts(family, CAUSAL_LM, (6, 4, 3))
    states = model(**batch(rows, "left")).last_hidden_state
    for own, row in zip(states, rows, strict=True):
        expected = model(input_ids=row[None]).last_hidden_state[0]
        torch.testing.assert_close(own[len(own) - len(row) :], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.promise(7, methods=("prefix",))
@pytest.mark.parametrize(
    ("family", "task", "labels", "message"),
    [
        ("llama", CAUSAL_LM, torch.zeros(3, 7 + P, dtype=torch.long), r"labels \[3, 12\] .* \[3, 7\]"),
        ("llama", CAUSAL_LM, torch.zeros(2, 7, dtype=torch.long), r"labels \[2, 7\] .* \[3, 7\]"),
        ("bert", TOKEN_CLS, torch.zeros(3, 7 + P, dtype=torch.long), r"labels \[3, 12\] .* \[3, 7\]"),
        ("bert", SEQ_CLS, torch.zeros(2, dtype=torch.long), r"labels \[2\] .* 3 rows"),
        ("t5", SEQ_2_SEQ_LM, torch.zeros(2, 4, dtype=torch.long), r"labels \[2, 4\] .* 3 rows"),
    ],
)
def test_labels_of_the_wrong_shape(family: str, task: str, labels: Tensor, message: str) -> None:
    model = adapted(family, task, "prefix")
    with pytest.raises(DataError, match=message):
        model(**batch(texts(family, task)), labels=labels)


def test_classes_of_several_labels_are_no_tokens() -> None:
    model = adapted("bert", SEQ_CLS, "prefix", problem_type="multi_label_classification")
    output = model(**batch(texts("bert", SEQ_CLS)), labels=torch.ones(3, 3))
    assert output.loss.isfinite()


def test_biases_of_a_model_without_head() -> None:
    model = get_peft_model(with_head(AutoModel, "bert"), BitFitConfig())
    assert model.adapter("default").heads == {}


@pytest.mark.parametrize("named", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_what_is_tied_stays_tied(named: list[str], tmp_path: Path) -> None:
    base = base_model("llama", CAUSAL_LM, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match=r"model\.embed_tokens and lm_head are tied, and are trained as one"):
        model = get_peft_model(base, PromptTuningConfig(task_type=CAUSAL_LM, modules_to_save=named)).train()
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    heads = model.adapter("default").heads
    assert heads["model.embed_tokens"].weight is heads["lm_head"].weight
    assert not torch.equal(heads["lm_head"].weight, base.lm_head.weight)
    assert (
        model.get_nb_trainable_parameters()[0]
        == base.lm_head.weight.numel() + model.prompt_encoder["default"].embedding.weight.numel()
    )
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model("llama", CAUSAL_LM, tie_word_embeddings=True), tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    reloaded = again.adapter("default").heads
    assert reloaded["model.embed_tokens"].weight is reloaded["lm_head"].weight


@pytest.mark.parametrize("named", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_what_peft_trained_apart_is_read_as_it_is(named: list[str], tmp_path: Path) -> None:
    base = base_model("llama", CAUSAL_LM, tie_word_embeddings=True)
    config = peft.PromptTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=P, modules_to_save=named)
    theirs = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(base_model("llama", CAUSAL_LM, tie_word_embeddings=True), tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    found = get_peft_model_state_dict(model)
    assert found.keys() == saved.keys()
    torch.testing.assert_close(found, saved, rtol=0, atol=0)


def test_a_head_that_the_task_leaves_untrained_is_told() -> None:
    with pytest.warns(
        UserWarning, match="classifier of BertForSequenceClassification is not trained by an adapter for"
    ):
        get_peft_model(base_model("bert", SEQ_CLS), METHODS["prefix"](task_type=CAUSAL_LM))
