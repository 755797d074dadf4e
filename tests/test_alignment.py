"""Promise 3: logits, hidden states, attention weights and loss line up with the caller's tokens, for every head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import softtune.adapter_context
from softtune import PeftModel
from softtune.compat import ARGUMENTS, cache_of
from softtune.injection import layout
from tests.families import (
    CAUSAL_LM,
    PAD,
    PREFIX_METHODS,
    QUESTION_ANS,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    TOKEN_CLS,
    VOCABULARY,
    P,
    adapted,
    answers,
    batch,
    cases,
    labels_for,
    sides,
    texts,
)

pytestmark = pytest.mark.promise(3)
ENCODER_METHODS = ("prompt", "prompt_suffix", "p_tuning_lstm", "prefix", "embedding_only", "bitfit")


@pytest.mark.parametrize(("family", "task", "method"), cases())
def test_loss_is_that_of_the_logits(family: str, task: str, method: str) -> None:
    model = adapted(family, task, method)
    for side in sides(family, task):
        inputs = batch(texts(family, task), side)
        labels = labels_for(task, inputs)
        output = model(**inputs, labels=labels)
        logits = output.logits
        if task == CAUSAL_LM:
            logits, labels = logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1)
        elif task == SEQ_2_SEQ_LM:
            logits, labels = logits.flatten(0, 1), labels.flatten()
        torch.testing.assert_close(output.loss, F.cross_entropy(logits, labels), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("family", "task", "method"), cases())
def test_shapes_are_the_base_models(family: str, task: str, method: str) -> None:
    """Every output has the shape that the base model gives it, and each row's values are those of the row alone."""
    model = adapted(family, task, method, attn_implementation="eager")
    rows = texts(family, task)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    inputs = {**batch(rows), **answers(task, len(rows)), **wanted}
    with torch.no_grad():
        output = model(**inputs)
        with model.disable_adapter():
            base = model(**inputs)
        first = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        alone = model(**first)
    assert output.keys() == base.keys()
    for name in output:
        if name in {s.name for s in ARGUMENTS["cache"]}:
            continue
        fields = zip(as_list(output[name]), as_list(base[name]), as_list(alone[name]), strict=True)
        for own, expected, single in fields:
            assert own.shape == expected.shape, name
            torch.testing.assert_close(own[:1], single, atol=1e-5, rtol=1e-5)


def as_list(field: object) -> list[torch.Tensor]:
    return [field] if isinstance(field, torch.Tensor) else list(field)  # type: ignore[call-overload]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "bloom"])
@pytest.mark.parametrize("method", ["prompt", "prompt_suffix", "prefix"])
def test_logits_are_the_heads_of_the_hidden_states(family: str, method: str) -> None:
    model = adapted(family, CAUSAL_LM, method)
    output = model(**batch(texts(family, CAUSAL_LM), "left"), output_hidden_states=True)
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_attention_weights_leave_out_the_virtual_tokens(family: str, method: str) -> None:
    task = SEQ_CLS if family == "bert" else CAUSAL_LM
    model = adapted(family, task, method, attn_implementation="eager")
    inputs = batch(texts(family, task))
    with torch.no_grad():
        layers = model(**inputs, output_attentions=True).attentions
    for weights in layers:
        sums = weights.sum(-1).transpose(1, 2)[inputs["attention_mask"].bool()]
        assert float(sums.max()) < 1
        padding = weights * (1 - inputs["attention_mask"])[:, None, None, :]
        assert float(padding.max()) == 0


@pytest.mark.parametrize(
    ("family", "task", "method"), [c for c in cases(("prompt", "prefix", "bitfit_added")) if c[1] != SEQ_CLS]
)
def test_tuples_hold_the_same(family: str, task: str, method: str) -> None:
    model = adapted(family, task, method)
    inputs = batch(texts(family, task))
    labels = labels_for(task, inputs)
    named, unnamed = model(**inputs, labels=labels), model(**inputs, labels=labels, return_dict=False)
    assert isinstance(unnamed, tuple)
    assert torch.equal(unnamed[0], named.loss)
    assert torch.equal(unnamed[1], named.logits)


@pytest.mark.parametrize(("family", "task", "method"), cases(ENCODER_METHODS, tasks=(TOKEN_CLS,)))
@pytest.mark.parametrize("side", ["right", "left"])
def test_token_classifier(family: str, task: str, method: str, side: str) -> None:
    model, rows = adapted(family, task, method), texts(family, task)
    inputs = batch(rows, side)
    labels = (inputs["input_ids"] % 3).masked_fill(inputs["attention_mask"] == 0, -100)
    output = model(**inputs, labels=labels)
    assert output.logits.shape == (3, 7, 3)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))
    assert torch.equal(output.logits, model(**inputs).logits)
    for i, row in enumerate(rows):
        own = output.logits[i][inputs["attention_mask"][i].bool()]
        torch.testing.assert_close(own, model(input_ids=row[None]).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "task", "method"), cases(ENCODER_METHODS, tasks=(QUESTION_ANS,)))
def test_span_finder(family: str, task: str, method: str) -> None:
    model, rows = adapted(family, task, method), texts(family, task)
    starts, ends = torch.tensor([5, 0, 1]), torch.tensor([6, 3, 1])
    output = model(**batch(rows), start_positions=starts, end_positions=ends)
    assert output.start_logits.shape == (3, 7)
    expected = (F.cross_entropy(output.start_logits, starts) + F.cross_entropy(output.end_logits, ends)) / 2
    torch.testing.assert_close(output.loss, expected)
    for i, row in enumerate(rows):
        alone = model(input_ids=row[None])
        torch.testing.assert_close(output.start_logits[i, : len(row)], alone.start_logits[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.end_logits[i, : len(row)], alone.end_logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.promise(3, families=("modernbert",))
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_classifier_that_pools_by_itself(method: str, pooling: str) -> None:
    model, rows = adapted("modernbert", SEQ_CLS, method, classifier_pooling=pooling), texts("modernbert", SEQ_CLS)
    alone = torch.cat([model(**batch([row])).logits for row in rows])
    for side in ("right", "left"):
        torch.testing.assert_close(model(**batch(rows, side, 9)).logits, alone, atol=1e-5, rtol=1e-5)


def logits_of(model: PeftModel | PreTrainedModel, row: torch.Tensor, labels: list[int], side: str) -> torch.Tensor:
    width = len(row) + 2
    inputs = batch([row], side, width)
    edges = (0, 2) if side == "right" else (2, 0)
    logits = model(**inputs, labels=F.pad(torch.tensor([labels]), edges, value=-100)).logits[0]
    return logits[: len(row)] if side == "right" else logits[2:]


@pytest.mark.promise(3, families=("llama",))
@pytest.mark.parametrize("method", ["prompt_suffix", "infix"])
@pytest.mark.parametrize(
    ("labels", "column"),
    [([-100, -100, 5, 6, 7], 2), ([4, 5, 6, 7, 8], 0), ([-100, 5, -100, 6, -100], 1), ([-100] * 5, 5)],
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_suffix_and_infix_stand_before_the_answer(method: str, labels: list[int], column: int, side: str) -> None:
    model, (row,) = adapted("llama", CAUSAL_LM, method), texts("llama", CAUSAL_LM, (5,))
    expected = model(input_ids=row[None], prompt_positions=torch.full((1, P), column)).logits[0]
    torch.testing.assert_close(logits_of(model, row, labels, side), expected, atol=1e-5, rtol=1e-5)


def test_a_row_without_an_answer_does_not_move_the_others() -> None:
    model, rows = adapted("llama", CAUSAL_LM, "prompt_suffix"), texts("llama", CAUSAL_LM, (5, 5))
    labels = torch.tensor([[-100, -100, 5, 6, 7], [-100] * 5])
    together = model(input_ids=torch.stack(rows), labels=labels).logits
    for i, column in enumerate((2, 5)):
        alone = model(input_ids=rows[i][None], prompt_positions=torch.full((1, P), column)).logits[0]
        torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix", "bitfit", "prompt_suffix", "infix"])
def test_only_a_suffix_or_infix_asks_where_the_answer_begins(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def row_starts(*args: Any) -> Tensor:
        asked.append(args)
        return layout.row_starts(*args)

    monkeypatch.setattr(softtune.adapter_context, "row_starts", row_starts)
    inputs = batch(texts("gpt2", CAUSAL_LM))
    adapted("gpt2", CAUSAL_LM, method)(**inputs, labels=inputs["input_ids"])
    assert bool(asked) == (method in ("prompt_suffix", "infix"))


@pytest.mark.promise(3, methods=("prompt_suffix",))
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_labels_of_another_sequence_do_not_place_a_suffix(family: str) -> None:
    model, (row,) = adapted(family, SEQ_2_SEQ_LM, "prompt_suffix"), texts(family, SEQ_2_SEQ_LM, (4,))
    labels = torch.tensor([[-100, -100, 5, 6]])
    decoder_ids = torch.tensor([[model.config.decoder_start_token_id, PAD, PAD, 5]])
    torch.testing.assert_close(
        model(input_ids=row[None], labels=labels).logits,
        model(input_ids=row[None], decoder_input_ids=decoder_ids).logits,
    )


@pytest.mark.promise(3, families=("llama",))
@pytest.mark.parametrize("method", PREFIX_METHODS)
def test_the_cache_holds_the_text_alone(method: str) -> None:
    model, (row,) = adapted("llama", CAUSAL_LM, method), texts("llama", CAUSAL_LM, (4,))
    assert cache_of(model(row[None], use_cache=True)).get_seq_length() == 4
