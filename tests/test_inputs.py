"""What does not fit together in a call is refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from softtune import DataError
from softtune.compat import cache_of
from tests.families import CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, P, adapted, answers, batch, texts

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.long)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": "a text"}, "the input is a str and no tensor: unpack what a tokenizer returns"),
        ({"input_ids": IDS[0]}, r"the input \[4\] has no rows: give ids \[B, T\] or vectors"),
        ({"inputs_embeds": torch.zeros(4, 32)}, r"the input \[4, 32\] has no rows"),
        ({"input_ids": ones(0, 4)}, r"the input \[0, 4\] has no tokens"),
        ({"input_ids": IDS, "attention_mask": ones(2, 3)}, r"attention_mask \[2, 3\] does not fit the input \[2, 4\]"),
        ({"input_ids": IDS, "attention_mask": ones(2, 5)}, r"attention_mask \[2, 5\] does not fit the input \[2, 4\]"),
        ({"input_ids": IDS, "attention_mask": ones(3, 4)}, r"attention_mask \[3, 4\] does not fit the input \[2, 4\]"),
        ({"input_ids": IDS, "attention_mask": ones(1, 4)}, r"attention_mask \[1, 4\] does not fit the input \[2, 4\]"),
        ({"input_ids": IDS, "prompt_positions": ones(1, P)}, rf"prompt_positions \[1, {P}\] do not fit 2 rows"),
        (
            {"input_ids": IDS.repeat(2, 1), "prompt_positions": ones(2, P)},
            rf"prompt_positions \[2, {P}\] do not fit 4 rows: give one row for each",
        ),
    ],
)
def test_shapes_that_do_not_fit(call: str, inputs: dict[str, Any], message: str) -> None:
    model = adapted("gpt2", CAUSAL_LM, "prompt")
    with pytest.raises(DataError, match=message) as refusal:
        getattr(model, call)(**inputs)
    assert "\n" not in str(refusal.value)


def test_generate_takes_its_text_by_any_name() -> None:
    model = adapted("gpt2", CAUSAL_LM, "prefix")
    for name in ("inputs", "input_ids"):
        with pytest.raises(DataError, match="has no rows"):
            model.generate(**{name: IDS[0]})
    with pytest.raises(DataError, match="has no rows"):
        model.generate(IDS[0])


@pytest.mark.parametrize("method", ["prefix", "prompt", "bitfit"])
def test_a_mask_of_cached_tokens_too(method: str) -> None:
    model = adapted("gpt2", CAUSAL_LM, method)
    with torch.no_grad():
        expected = model(IDS, attention_mask=ones(2, 4)).logits[:, 3:]
        begun = cache_of(model(IDS[:, :3], attention_mask=ones(2, 3), use_cache=True))
        found = model(IDS[:, 3:], attention_mask=ones(2, 4), cache=begun).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(DataError, match=r"attention_mask \[3, 5\] does not fit the input \[2, 1\]"):
            model(IDS[:, 3:], attention_mask=ones(3, 5), cache=begun)


def test_generate_goes_on_with_a_mask_of_the_whole_text() -> None:
    model, cache = adapted("gpt2", CAUSAL_LM, "prefix"), DynamicCache()
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    first = model.generate(IDS, attention_mask=ones(2, 4), cache=cache, **settings)
    mask = ones(*first.shape)
    expected = model.generate(first, attention_mask=mask, **settings)
    assert torch.equal(model.generate(first, attention_mask=mask, cache=cache, **settings), expected)


@pytest.mark.parametrize(("family", "task"), [("bert", SEQ_CLS), ("t5", SEQ_2_SEQ_LM)])
def test_a_mask_is_for_what_the_encoder_reads(family: str, task: str) -> None:
    model, inputs = adapted(family, task, "prefix"), batch(texts(family, task))
    model(**inputs, **answers(task, 3))
    with pytest.raises(DataError, match="attention_mask"):
        model(**{**inputs, "attention_mask": inputs["attention_mask"][:, 1:]}, **answers(task, 3))


@pytest.mark.parametrize("method", ["prefix", "infix"])
def test_one_ready_mask_for_all_tokens(method: str) -> None:
    model, ids = adapted("llama", CAUSAL_LM, method), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    mask = torch.zeros(2, 1, 1, 4).masked_fill(torch.tensor([0, 0, 1, 0]) == 1, torch.finfo(torch.float32).min)
    expected = model(ids, attention_mask=mask.expand(-1, -1, 4, -1).clone()).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)
