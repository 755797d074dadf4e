"""Promise 2 for every way to generate: each writes what the uncached forward would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from softtune import AdapterError, PeftModel, UnsupportedModelError
from softtune.compat import cache_of
from tests.families import CAUSAL_LM, FAMILIES, KINDS, SEQ_2_SEQ_LM, P, adapted, base_model, batch, cases, takes, texts

pytestmark = pytest.mark.promise(2)
GENERATED = 5
SETTINGS: dict[str, Any] = {
    "max_new_tokens": GENERATED,
    "min_new_tokens": GENERATED,
    "do_sample": False,
    "eos_token_id": None,
}
CASES = cases(KINDS, tasks=(CAUSAL_LM, SEQ_2_SEQ_LM))
DECODERS = [c for c in CASES if c[1] == CAUSAL_LM]
REFUSED = {
    "chunks": ("mpt", "mamba"),
    "guesses": ("mpt", "mamba", "qwen3_next", "granitemoehybrid"),
    "returned": ("mpt", "mamba"),
}
"""Families that transformers' own generate refuses to do so, with any model."""


def uncached(model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    """What ``test_invariance`` compares with argmax over ``forward``."""
    with torch.no_grad():
        return model.generate(**inputs, **SETTINGS, use_cache=False)[:, -GENERATED:]


@pytest.mark.parametrize(("family", "task", "method"), CASES)
def test_a_static_cache(family: str, task: str, method: str) -> None:
    model, inputs = adapted(family, task, method), batch(texts(family, task), "left")
    if family == "mistral" and method in ("prompt_suffix", "combined"):  # every layer has a window
        with pytest.raises(UnsupportedModelError, match="cache_implementation"):
            model.generate(**inputs, **SETTINGS, cache_implementation="static")
        return
    for _ in range(2):  # the model remembers how long its last one was
        with torch.no_grad():
            written = model.generate(**inputs, **SETTINGS, cache_implementation="static")[:, -GENERATED:]
            assert torch.equal(written, uncached(model, inputs))


@pytest.mark.parametrize(("family", "task", "method"), [c for c in CASES if c[0] not in REFUSED["chunks"]])
def test_a_text_read_in_chunks(family: str, task: str, method: str) -> None:
    model, inputs = adapted(family, task, method), batch(texts(family, task), "left")
    among_words = method == "prompt" and not model.backbone.is_pure_attention_decoder
    if task == SEQ_2_SEQ_LM or method in ("prompt_suffix", "infix", "combined") or among_words:
        with pytest.raises(UnsupportedModelError, match="prefill_chunk_size"):
            model.generate(**inputs, **SETTINGS, prefill_chunk_size=3)
        return
    with torch.no_grad():
        written = model.generate(**inputs, **SETTINGS, prefill_chunk_size=3)[:, -GENERATED:]
        assert torch.equal(written, uncached(model, inputs))


@pytest.mark.parametrize(("family", "task", "method"), CASES)
def test_word_vectors(family: str, task: str, method: str) -> None:
    model, inputs = adapted(family, task, method), batch(texts(family, task), "left")
    vectors = model.get_input_embeddings()(inputs["input_ids"]).detach() * FAMILIES[family].word_scale
    with torch.no_grad():
        mask = inputs["attention_mask"]
        written = model.generate(inputs_embeds=vectors, attention_mask=mask, **SETTINGS)[:, -GENERATED:]
        assert torch.equal(written, uncached(model, inputs))


@pytest.mark.parametrize(("family", "task", "method"), [c for c in DECODERS if c[0] not in REFUSED["guesses"]])
@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_guessed_tokens(family: str, task: str, method: str, how: str) -> None:
    model, inputs = adapted(family, task, method), batch(texts(family, task, (6,)))
    inputs["input_ids"][0, 3:] = inputs["input_ids"][0, :3]  # something to look up
    assistant = base_model(family, task, seed=4)
    option = {"assistant_model": assistant} if how == "assistant" else {"prompt_lookup_num_tokens": 2}
    with torch.no_grad():
        written = model.generate(**inputs, **SETTINGS, **option)[:, -GENERATED:]
        assert torch.equal(written, uncached(model, inputs))


@pytest.mark.parametrize(("family", "task", "method"), [c for c in DECODERS if c[0] not in REFUSED["returned"]])
def test_going_on_from_returned_keys_and_values(family: str, task: str, method: str) -> None:
    model, inputs = adapted(family, task, method), batch(texts(family, task), "left")
    with torch.no_grad():
        first = {**SETTINGS, "max_new_tokens": 2, "min_new_tokens": 2}
        begun = model.generate(**inputs, **first, return_dict_in_generate=True)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
        rest = {**SETTINGS, "max_new_tokens": GENERATED - 2, "min_new_tokens": GENERATED - 2}
        rest |= {"attention_mask": mask, "cache": cache_of(begun)}
        written = model.generate(begun.sequences, **rest)[:, -GENERATED:]
        assert torch.equal(written, uncached(model, inputs))


@pytest.mark.parametrize(("family", "task", "method"), [c for c in DECODERS if c[0] not in REFUSED["returned"]])
def test_steps_by_hand(family: str, task: str, method: str) -> None:
    """``forward`` with the cache that it returned, as a loop of one's own does it."""
    model, inputs = adapted(family, task, method), batch(texts(family, task), "left")
    mask, ids, cache = inputs["attention_mask"], inputs["input_ids"], None
    written = []
    with torch.no_grad():
        for _ in range(GENERATED):
            output = model(input_ids=ids, attention_mask=mask, cache=cache, use_cache=True)
            ids, cache = output.logits[:, -1:].argmax(-1), cache_of(output)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            written.append(ids)
        assert torch.equal(torch.cat(written, dim=1), uncached(model, inputs))


@pytest.mark.parametrize(("family", "task", "method"), [c for c in CASES if c[2] in ("prompt", "prefix", "infix")])
def test_sequences_to_return(family: str, task: str, method: str) -> None:
    model, inputs = adapted(family, task, method), batch(texts(family, task), "left")
    beams = {**SETTINGS, "num_beams": 3, "num_return_sequences": 2}
    with torch.no_grad():
        together = model.generate(**inputs, **beams)
        slow = model.generate(**inputs, **beams, use_cache=False)
    assert len(together) == 2 * len(inputs["input_ids"])
    assert torch.equal(together, slow)


@pytest.mark.promise(2, families=("llama",))
@pytest.mark.parametrize("method", ["prompt", "prefix", "bitfit_added"])
def test_a_cache_belongs_to_whom_it_was_computed_with(method: str) -> None:
    model, inputs = adapted("llama", CAUSAL_LM, method), batch(texts("llama", CAUSAL_LM), "left")
    ids = inputs["input_ids"][:, :1]
    with torch.no_grad():
        own = cache_of(model(**inputs, use_cache=True))
        with model.disable_adapter():
            base = cache_of(model(**inputs, use_cache=True))
            with pytest.raises(AdapterError, match="computed with default"):
                model(ids, cache=own)
        with pytest.raises(AdapterError, match="computed with the base model"):
            model(ids, cache=base)
        unsigned = cache_of(base_model("llama", CAUSAL_LM)(**inputs, use_cache=True))
        with pytest.raises(AdapterError, match="computed with the base model"):
            model.generate(inputs["input_ids"], cache=unsigned, **SETTINGS)


@pytest.mark.promise(2, methods=("p_tuning_mlp",))
@pytest.mark.parametrize(
    "family", sorted({c[0] for c in DECODERS if takes(c[0], "p_tuning_mlp")} - {*REFUSED["guesses"]})
)
def test_generation_at_the_places_of_a_template_with_guessed_tokens(family: str) -> None:
    model, inputs = adapted(family, CAUSAL_LM, "p_tuning_mlp"), batch(texts(family, CAUSAL_LM, (6,)))
    places = {"prompt_positions": torch.tensor([[0, 1, 1, 4, 6]])}
    assert places["prompt_positions"].shape[1] == P
    with torch.no_grad():
        expected = model.generate(**inputs, **places, **SETTINGS, use_cache=False)
        assert torch.equal(model.generate(**inputs, **places, **SETTINGS, prompt_lookup_num_tokens=2), expected)


@pytest.mark.parametrize("family", ["qwen3_next", "mpt"])
def test_padding_on_the_right_is_no_packed_text(family: str) -> None:
    model, rows = adapted(family, CAUSAL_LM, "prompt_suffix"), texts(family, CAUSAL_LM)
    with torch.no_grad():
        written = model.generate(**batch(rows, "right"), **SETTINGS)[:, -GENERATED:]
        longest = max(range(len(rows)), key=lambda n: len(rows[n]))
        alone = model.generate(**batch([rows[longest]]), **SETTINGS)[:, -GENERATED:]
    assert torch.equal(written[longest], alone[0])
