"""Promise 2: a row's outputs are the same alone, padded on either side or in a batch, and cached as uncached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from softtune import AdapterError, PeftModel, UnsupportedModelError
from softtune.compat import cache_of
from tests.families import (
    CAUSAL_LM,
    FAMILIES,
    KINDS,
    PAD,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    TOKEN_CLS,
    P,
    adapted,
    answers,
    batch,
    cases,
    pad,
    sides,
    texts,
)

pytestmark = pytest.mark.promise(2)
GENERATED = 5
GENERATING = cases(KINDS, tasks=(CAUSAL_LM, SEQ_2_SEQ_LM))


def real(logits: Tensor, row: Tensor, side: str, task: str) -> Tensor:
    """The logits of a row's own tokens."""
    if task != CAUSAL_LM:
        return logits
    return logits[: len(row)] if side == "right" else logits[len(logits) - len(row) :]


@pytest.mark.parametrize(("family", "task", "method"), cases())
def test_padding_and_company_change_nothing(family: str, task: str, method: str) -> None:
    model, rows = adapted(family, task, method), texts(family, task)
    decoder = answers(task, len(rows))
    with torch.no_grad():
        together = {side: model(**batch(rows, side), **decoder).logits for side in sides(family, task)}
        for i, row in enumerate(rows):
            own = {k: v[i : i + 1] for k, v in decoder.items()}
            alone = model(input_ids=row[None], **own).logits[0]
            for side in sides(family, task):
                padded = model(**batch([row], side, width=9), **own).logits[0]
                torch.testing.assert_close(real(padded, row, side, task), alone, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(real(together[side][i], row, side, task), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "task", "method"),
    [c for c in cases(("prompt", "prefix", "bitfit"), tasks=(CAUSAL_LM, SEQ_CLS)) if FAMILIES[c[0]].takes_vectors],
)
def test_word_vectors_in_place_of_words(family: str, task: str, method: str) -> None:
    model, rows = adapted(family, task, method), texts(family, task, (5, 5))
    inputs = batch(rows)
    vectors = model.get_input_embeddings()(inputs["input_ids"])
    by_vectors = model(inputs_embeds=vectors, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(by_vectors, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("method", ["prompt", "prefix", "prefix_last", "p_tuning_v2", "bitfit_added"])
def test_packed_texts_do_not_see_each_other(family: str, method: str) -> None:
    model, rows = adapted(family, CAUSAL_LM, method), texts(family, CAUSAL_LM)
    positions = torch.cat([torch.arange(len(r)) for r in rows])
    packed = model(input_ids=torch.cat(rows)[None], position_ids=positions[None], use_cache=False).logits[0]
    for row, logits in zip(rows, packed.split([len(r) for r in rows]), strict=True):
        torch.testing.assert_close(logits, model(input_ids=row[None]).logits[0], atol=1e-5, rtol=1e-5)


def test_packed_texts_have_no_place_for_virtual_tokens_among_the_words() -> None:
    model, rows = adapted("llama", CAUSAL_LM, "prompt_suffix"), texts("llama", CAUSAL_LM)
    positions = torch.cat([torch.arange(len(r)) for r in rows])
    with pytest.raises(UnsupportedModelError, match="packed"):
        model(input_ids=torch.cat(rows)[None], position_ids=positions[None], use_cache=False)


def by_argmax(model: PeftModel, row: Tensor, task: str) -> Tensor:
    """Greedy decoding without a cache, through ``forward``."""
    text = row[None]
    decoded = torch.tensor([[model.config.decoder_start_token_id]]) if task == SEQ_2_SEQ_LM else text
    for _ in range(GENERATED):
        inputs = {"input_ids": text, "decoder_input_ids": decoded} if task == SEQ_2_SEQ_LM else {"input_ids": decoded}
        if task == CAUSAL_LM and decoded.shape[1] > text.shape[1] and behind_text(model):
            inputs["prompt_positions"] = torch.full((1, P), len(row))
        best = model(**inputs, use_cache=False).logits[:, -1].argmax(-1)
        decoded = torch.cat([decoded, best[:, None]], dim=1)
    return decoded[0, -GENERATED:]


def behind_text(model: PeftModel) -> bool:
    return getattr(model.active_peft_config, "placement", "prefix") != "prefix"


@pytest.mark.parametrize(("family", "task", "method"), GENERATING)
def test_cached_generation_is_uncached_argmax(family: str, task: str, method: str) -> None:
    model, rows = adapted(family, task, method), texts(family, task)
    settings = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        together = model.generate(**batch(rows, "left"), **settings)[:, -GENERATED:]
        again = model.generate(**batch(rows, "left"), **settings)[:, -GENERATED:]
        uncached = model.generate(**batch(rows, "left"), **settings, use_cache=False)[:, -GENERATED:]
        for i, row in enumerate(rows):
            expected = by_argmax(model, row, task)
            assert torch.equal(together[i], expected)
            assert torch.equal(again[i], expected)
            assert torch.equal(uncached[i], expected)
            assert torch.equal(model.generate(row[None], **settings)[0, -GENERATED:], expected)


@pytest.mark.parametrize(("family", "task", "method"), GENERATING)
def test_cached_scores_are_those_of_forward(family: str, task: str, method: str) -> None:
    """Argmax hides small errors: every step's scores are the logits of one forward over the whole text."""
    model, rows = adapted(family, task, method), texts(family, task)
    inputs = batch(rows, "left")
    with torch.no_grad():
        result = model.generate(
            **inputs,
            max_new_tokens=GENERATED,
            eos_token_id=None,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        scores = torch.stack(result.logits, dim=1)
        if task == SEQ_2_SEQ_LM:
            logits = model(**inputs, decoder_input_ids=result.sequences[:, :-1]).logits
        else:
            mask = torch.cat([inputs["attention_mask"], torch.ones(len(rows), GENERATED, dtype=torch.long)], dim=1)
            places = (
                {"prompt_positions": torch.full((len(rows), P), inputs["input_ids"].shape[1])}
                if behind_text(model)
                else {}
            )
            logits = model(input_ids=result.sequences, attention_mask=mask, **places).logits[:, -GENERATED - 1 : -1]
    torch.testing.assert_close(scores, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "task", "method"), GENERATING)
def test_beams_are_those_of_each_row_alone(family: str, task: str, method: str) -> None:
    model, rows = adapted(family, task, method), texts(family, task)
    settings = {"max_new_tokens": GENERATED, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    with torch.no_grad():
        together = model.generate(**batch(rows, "left"), **settings)
        for i, row in enumerate(rows):
            alone = model.generate(row[None], **settings)
            assert torch.equal(together.sequences[i, -GENERATED:], alone.sequences[0, -GENERATED:])
            torch.testing.assert_close(together.sequences_scores[i], alone.sequences_scores[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "task", "method"), [c for c in GENERATING if c[2] in ("prompt", "prefix", "infix")])
def test_samples_of_one_seed_are_the_same_with_and_without_a_cache(family: str, task: str, method: str) -> None:
    model, (row,) = adapted(family, task, method), texts(family, task, (4,))
    samples = []
    for padded in (False, True):
        torch.manual_seed(5)
        inputs = batch([row], "left", width=6 if padded else 4)
        samples.append(model.generate(**inputs, do_sample=True, max_new_tokens=GENERATED, num_return_sequences=2))
    assert torch.equal(samples[0][:, -GENERATED:], samples[1][:, -GENERATED:])


@pytest.mark.parametrize(("family", "task", "method"), cases(("p_tuning_lstm",), tasks=(CAUSAL_LM,)))
def test_generation_at_the_positions_of_a_template(family: str, task: str, method: str) -> None:
    model, rows = adapted(family, task, method), texts(family, task)
    columns = [[0, 0, 3, 3, 7], [1, 2, 2, 3, 4], [0, 1, 1, 2, 2]]
    inputs = batch(rows, "left")
    positions = torch.tensor(columns) + 7 - inputs["attention_mask"].sum(1, keepdim=True)
    for beams in (1, 3):
        settings = {"max_new_tokens": GENERATED, "num_beams": beams, "do_sample": False, "eos_token_id": None}
        together = model.generate(**inputs, prompt_positions=positions, **settings)[:, -GENERATED:]
        for i, row in enumerate(rows):
            alone = model.generate(row[None], prompt_positions=torch.tensor([columns[i]]), **settings)
            assert torch.equal(together[i], alone[0, -GENERATED:])
            if beams > 1:
                continue
            ids = row[None]
            for _ in range(GENERATED):
                best = model(ids, prompt_positions=torch.tensor([columns[i]])).logits[:, -1].argmax(-1)
                ids = torch.cat([ids, best[:, None]], dim=1)
            assert torch.equal(together[i], ids[0, -GENERATED:])


@pytest.mark.parametrize(
    ("family", "task", "method"),
    [c for c in cases(("prefix", "prompt", "prompt_suffix"), tasks=(CAUSAL_LM,)) if FAMILIES[c[0]].window],
)
def test_generation_past_the_window(family: str, task: str, method: str) -> None:
    model, rows = adapted(family, task, method), texts(family, task, (20, 11))
    settings = {"max_new_tokens": GENERATED, "do_sample": False, "eos_token_id": None}
    together = model.generate(**batch(rows, "left"), **settings)[:, -GENERATED:]
    for i, row in enumerate(rows):
        assert torch.equal(together[i], by_argmax(model, row, task))


@torch.no_grad()
@pytest.mark.parametrize("method", ["prompt", "prompt_suffix", "prefix", "bitfit"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_row_of_token_types_is_for_all_rows(method: str, side: str) -> None:
    model, inputs = adapted("bert", TOKEN_CLS, method), batch(texts("bert", TOKEN_CLS), side, width=9)
    kinds = (torch.arange(9) >= 4).long()[None]
    expected = model(**inputs, token_type_ids=kinds.expand(3, -1)).logits
    assert torch.equal(model(**inputs, token_type_ids=kinds).logits, expected)


def test_token_types_stay_with_their_tokens() -> None:
    for method in ("prompt", "prefix", "bitfit"):
        model, rows = adapted("bert", SEQ_CLS, method), texts("bert", SEQ_CLS)
        types = [torch.arange(len(r)) % 2 for r in rows]
        for side in ("right", "left"):
            padded = batch(types, side)["input_ids"].masked_fill(batch(rows, side)["attention_mask"] == 0, 0)
            logits = model(**batch(rows, side), token_type_ids=padded).logits
            for i, (row, kind) in enumerate(zip(rows, types, strict=True)):
                alone = model(input_ids=row[None], token_type_ids=kind[None]).logits[0]
                torch.testing.assert_close(logits[i], alone, atol=1e-5, rtol=1e-5)
                assert (alone - model(input_ids=row[None]).logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("task", [SEQ_CLS, TOKEN_CLS])
@pytest.mark.parametrize("method", ["prompt", "prompt_suffix", "prefix", "p_tuning_v2", "bitfit"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_boxes_stay_with_their_tokens(task: str, method: str, side: str) -> None:
    """A call may say more of each token than its id: LayoutLM's has the token's box on the page."""
    model, rows = adapted("layoutlm", task, method), texts("layoutlm", task)
    boxes = [torch.randint(0, 16, (len(row), 2)).sort().values.repeat(1, 2) for row in rows]
    for width in (None, 11):
        inputs = batch(rows, side, width)
        padded = torch.stack([pad([b[:, i] for b in boxes], side, width, value=3) for i in range(4)], dim=-1)
        logits = model(**inputs, bbox=padded).logits
        for i, (row, box) in enumerate(zip(rows, boxes, strict=True)):
            alone = model(input_ids=row[None], bbox=box[None]).logits[0]
            own = logits[i] if task == SEQ_CLS else logits[i][inputs["attention_mask"][i] == 1]
            torch.testing.assert_close(own, alone, atol=1e-5, rtol=1e-5)
            assert (alone - model(input_ids=row[None]).logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["prompt", "prompt_suffix", "prefix", "p_tuning_v2"])
def test_a_classifier_reads_the_last_real_token(family: str, method: str) -> None:
    model, (row,) = adapted(family, SEQ_CLS, method), texts(family, SEQ_CLS, (4,))
    other = row.clone()
    other[-1] = PAD + 50
    assert (model(input_ids=row[None]).logits - model(input_ids=other[None]).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "task", "method", "side"),
    [(*c, side) for c in cases(KINDS, tasks=(CAUSAL_LM, SEQ_CLS)) for side in sides(*c[:2])],
)
def test_padding_of_every_row_leaves_training_alone(family: str, task: str, method: str, side: str) -> None:
    model, rows = adapted(family, task, method), texts(family, task)
    gradients = []
    for width in (None, 11):
        inputs = batch(rows, side, width=width)
        # A row's first token is predicted from nothing, so that it has no label.
        labels = inputs["input_ids"].masked_fill(
            inputs["attention_mask"].cumsum(1) * inputs["attention_mask"] < 2, -100
        )
        loss = model(**inputs, labels=labels if task == CAUSAL_LM else torch.tensor([0, 1, 1]), use_cache=False).loss
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients.append([g for g in torch.autograd.grad(loss, trained, allow_unused=True) if g is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6 * max(float(a.abs().max()), 1.0), rtol=1e-4)


def tokens_seen(model: PeftModel, **inputs: Any) -> tuple[int, Any]:
    """How many tokens the first layer works on, and the outputs."""
    seen: list[int] = []
    layer = model.base_model.model.layers[0]
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:2].numel()))
    try:
        output = model(**inputs, use_cache=False, output_hidden_states=True)
    finally:
        handle.remove()
    return sum(seen), output


@pytest.mark.parametrize("side", ["left", "right"])
def test_layers_do_not_work_on_padding(side: str) -> None:
    model, rows = adapted("llama", CAUSAL_LM, "prefix"), texts("llama", CAUSAL_LM)
    inputs = batch(rows, side, width=20)
    seen, output = tokens_seen(model, **inputs)
    assert seen == sum(len(row) for row in rows)
    assert {h.shape[1] for h in output.hidden_states} == {20} == {output.logits.shape[1]}
    assert (output.hidden_states[-1][inputs["attention_mask"] == 0] == 0).all()


def test_rows_that_begin_alike_share_the_beginning() -> None:
    model, (one, other) = adapted("llama", CAUSAL_LM, "prefix"), texts("llama", CAUSAL_LM, (6, 4))
    rows = [one, torch.cat([one[:4], other]), one[:3], other, torch.cat([one[:4], other[:2]])]
    for side in ("left", "right"):
        seen, output = tokens_seen(model, **batch(rows, side))
        assert seen == 6 + 4 + 0 + 4 + 0
        for row, logits in zip(rows, output.logits, strict=True):
            own = logits[: len(row)] if side == "right" else logits[-len(row) :]
            torch.testing.assert_close(own, model(row[None]).logits[0], atol=1e-5, rtol=1e-5)


def test_a_decoding_cache_holds_the_prefix_once_and_counts_the_text() -> None:
    model, rows = adapted("llama", CAUSAL_LM, "prefix"), texts("llama", CAUSAL_LM)
    inputs = batch(rows, "left")
    with torch.no_grad():
        result = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        cache = cache_of(result)
        text = inputs["input_ids"].shape[1] + 2
        assert cache.get_seq_length() == text
        assert cache.layers[0].keys.shape[2] == text + P
        # Going on with the cache is going on with the text.
        mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(len(rows), 3)], dim=1)
        ids = result.sequences
        step = model(input_ids=ids[:, -1:], attention_mask=mask, cache=cache).logits[:, -1]
        whole = model(input_ids=ids, attention_mask=mask).logits[:, -1]
    torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-5)


def test_a_cache_of_another_adapter_is_refused() -> None:
    model, rows = adapted("llama", CAUSAL_LM, "prefix"), texts("llama", CAUSAL_LM)
    inputs = batch(rows, "left")
    result = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    model.prompt_encoder["default"].embedding.weight.data += 1
    with pytest.raises(AdapterError, match="another adapter"), torch.no_grad():
        model(input_ids=result.sequences[:, -1:], cache=cache_of(result))
