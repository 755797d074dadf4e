"""Attention implementations: with flash and flex attention, an adapter computes what it does with sdpa.

Without a GPU, flash attention's kernels are those of ``tests/flash.py``, and flex attention runs uncompiled. In double
precision, so that only what is computed matters, and not its order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from softtune import PeftModel, UnsupportedModelError, get_peft_model
from softtune.compat import enable_checkpointing
from tests import flash
from tests.families import (
    CAUSAL_LM,
    FAMILIES,
    KINDS,
    METHODS,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    answers,
    base_model,
    batch,
    cases,
    labels_for,
    scramble,
    sides,
    texts,
    trained,
)
from tests.test_generation import SETTINGS
from tests.test_rows import mixed, rows_for

FLASH, FLEX = ("flash_attention_2", "flash_attention_3"), ("flex_attention",)
DIRECT = ("prompt", "prompt_suffix", "prefix", "prefix_last", "p_tuning_v2")
CASES = [
    *((name, *case) for name in FLASH[:1] for case in cases(DIRECT, ("gpt2", "llama", "bert"))),
    *((name, *case) for name in FLASH[:1] for case in cases(("prompt", "prefix"), ("mistral",))),
    *((name, *case) for name in FLEX for case in cases(DIRECT, ("llama", "mistral", "bert", "modernbert", "bart"))),
    ("flash_attention_3", "llama", CAUSAL_LM, "prefix"),
    ("flash_attention_2", "gemma3", CAUSAL_LM, "prefix"),
    ("flex_attention", "llama", CAUSAL_LM, "infix"),
    ("flex_attention", "t5", SEQ_2_SEQ_LM, "prefix"),
]
GENERATING = [case for case in CASES if case[2] == CAUSAL_LM]


@pytest.fixture
def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    flash.install(monkeypatch)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *args: None)  # it denies the CPU gradients
    with torch.compiler.set_stance("force_eager"):
        yield


pytestmark = [
    pytest.mark.usefixtures("on_this_machine"),
    pytest.mark.filterwarnings("ignore"),  # of the compiler
]


def choose(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    """Past the checks of ``set_attn_implementation``, which asks for a GPU."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = implementation
    return model.double()


def model_on(implementation: str, family: str, task: str, method: str, **overrides: Any) -> PeftModel:
    base = choose(base_model(family, task, **overrides), implementation)
    return scramble(get_peft_model(base, METHODS[method](task_type=task))).eval()


def run(model: PeftModel, task: str, inputs: dict[str, Tensor], **options: Any) -> tuple[Any, ...]:
    """Logits of real tokens, and gradients."""
    labels = labels_for(task, inputs).to(inputs["input_ids"].device)
    output = model(**{k: v for k, v in inputs.items() if k != "decoder_input_ids"}, labels=labels, **options)
    output.loss.backward()
    logits = output.logits.detach()
    real = inputs["attention_mask"] != 0
    return logits[real] if task == CAUSAL_LM else logits, {n: p.grad for n, p in trained(model).items()}


def same(implementation: str, family: str, task: str, method: str, inputs: dict[str, Tensor], **overrides: Any) -> None:
    """Outputs and gradients are those with sdpa."""
    expected, found = (
        run(model_on(name, family, task, method, **overrides), task, inputs) for name in ("sdpa", implementation)
    )
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("implementation", "family", "task", "method"), CASES)
def test_padded_rows(implementation: str, family: str, task: str, method: str) -> None:
    for side in sides(family, task):
        same(implementation, family, task, method, {**batch(texts(family, task), side), **answers(task, 3)})


@pytest.mark.parametrize("implementation", [*FLASH, *FLEX])
@pytest.mark.parametrize(("family", "task"), [("llama", CAUSAL_LM), ("bert", SEQ_CLS)])
def test_hidden_virtual_tokens(implementation: str, family: str, task: str) -> None:
    shown = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]])
    for side in sides(family, task):
        same(implementation, family, task, "prefix", {**batch(texts(family, task), side), "prefix_mask": shown})


@pytest.mark.parametrize(("implementation", "family", "task", "method"), CASES)
def test_one_row_without_a_mask(implementation: str, family: str, task: str, method: str) -> None:
    """Its positions begin behind the prefix, by which it is not taken for several packed texts."""
    inputs = {"input_ids": texts(family, task, (7,))[0][None], **answers(task, 1)}
    with torch.no_grad():
        expected, found = (model_on(n, family, task, method)(**inputs).logits for n in ("sdpa", implementation))
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 3},
    "beams": {"num_beams": 3},
    "uncached": {"use_cache": False},
}


@pytest.mark.parametrize(
    ("implementation", "family", "task", "method", "option"),
    # transformers' own generate has no static cache for flex attention
    [(*case, option) for case in GENERATING for option in OPTIONS if (case[0], option) != ("flex_attention", "static")],
)
def test_generation(implementation: str, family: str, task: str, method: str, option: str) -> None:
    model, inputs = model_on(implementation, family, task, method), batch(texts(family, task), "left")
    refusal = refusal_of(implementation, family, method, option)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=refusal) if refusal else nullcontext():
        written = model.generate(**inputs, **SETTINGS, **OPTIONS[option])
        expected = model_on("sdpa", family, task, method).generate(**inputs, **SETTINGS, **OPTIONS[option])
        assert torch.equal(written, expected)


def refusal_of(implementation: str, family: str, method: str, option: str) -> str | None:
    """What a kind of generation is refused for; None where it is not."""
    if method in ("prompt_suffix", "infix") and option == "chunks":
        return "prefill_chunk_size"
    has_window = FAMILIES[family].window and implementation in FLASH
    return "window of 8 tokens" if has_window and option == "uncached" else None


@pytest.mark.parametrize(
    ("implementation", "family", "kinds"),
    [
        ("flash_attention_2", "llama", tuple(k for k in KINDS if k != "infix")),
        ("flash_attention_2", "bert", KINDS),
        ("flex_attention", "llama", KINDS),
        ("flex_attention", "mistral", KINDS),
        ("flex_attention", "bert", KINDS),
    ],
)
def test_every_row_its_own_adapter(implementation: str, family: str, kinds: tuple[str, ...]) -> None:
    task = FAMILIES[family].tasks[0]
    found = []
    for name in ("sdpa", implementation):
        model, names = mixed(family, task, kinds, choose(base_model(family, task), name))
        inputs = batch(rows_for(family, task, len(names)), "left")
        found.append(run(model, task, inputs, adapter_names=names))
        if task == CAUSAL_LM:
            found[-1] += (model.generate(**inputs, **SETTINGS, adapter_names=names),)
    torch.testing.assert_close(found[1], found[0], atol=1e-7, rtol=1e-5)


def test_kernels_with_a_name_of_their_own() -> None:
    AttentionInterface.register("some/kernels", ALL_ATTENTION_FUNCTIONS["flash_attention_2"])
    AttentionMaskInterface.register("some/kernels", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    same("some/kernels", "llama", CAUSAL_LM, "prefix", batch(texts("llama", CAUSAL_LM)))


def test_a_gap_in_the_positions_of_one_row_makes_no_pack_of_it() -> None:
    ids, positions = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 1, 7, 8]])
    model = model_on("flash_attention_2", "llama", CAUSAL_LM, "prefix")
    alone = model(input_ids=ids, position_ids=positions).logits
    together = model(input_ids=ids.repeat(2, 1), position_ids=positions.repeat(2, 1)).logits
    torch.testing.assert_close(alone, together[:1])


@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning_v2"])
def test_packed_texts(method: str) -> None:
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    expected, found = (model_on(n, "llama", CAUSAL_LM, method)(**inputs).logits for n in ("sdpa", "flex_attention"))
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("method", DIRECT)
@pytest.mark.parametrize("implementation", [*FLASH[:1], *FLEX])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(implementation: str, method: str, reentrant: bool) -> None:
    inputs = batch(texts("llama", CAUSAL_LM))
    expected = run(model_on("sdpa", "llama", CAUSAL_LM, method).train(), CAUSAL_LM, inputs)
    model = model_on(implementation, "llama", CAUSAL_LM, method).train()
    enable_checkpointing(model, use_reentrant=reentrant)
    torch.testing.assert_close(run(model, CAUSAL_LM, inputs), expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("method", DIRECT)
def test_an_encoders_windows_that_its_texts_do_not_fill(method: str) -> None:
    for side in sides("modernbert", SEQ_CLS):
        inputs = batch(texts("modernbert", SEQ_CLS), side)
        same("flash_attention_2", "modernbert", SEQ_CLS, method, inputs, local_attention=64)


@pytest.mark.parametrize("method", DIRECT)
def test_an_encoder_decoder_reads_and_writes(method: str) -> None:
    inputs = batch(texts("bart", SEQ_2_SEQ_LM, (7, 7, 7)))
    same("flash_attention_2", "bart", SEQ_2_SEQ_LM, method, {**inputs, **answers(SEQ_2_SEQ_LM, 3)})
    padded = batch(texts("bart", SEQ_2_SEQ_LM))
    written = [model_on(n, "bart", SEQ_2_SEQ_LM, method).generate(**padded, **SETTINGS) for n in ("sdpa", *FLASH[:1])]
    assert torch.equal(*written)


REFUSED: dict[str, tuple[str, str, str, Any]] = {
    "an infix": ("gpt2", CAUSAL_LM, "infix", batch([torch.arange(5, 12)])),
    "a window of 8": ("mistral", CAUSAL_LM, "prefix", batch([torch.arange(5, 14)])),
    "a window of 5": ("modernbert", SEQ_CLS, "prefix", batch([torch.arange(5, 11)])),
    "behind a window": ("modernbert", SEQ_CLS, "prompt", batch([torch.arange(5, 11)])),
    "behind a window of 8": ("mistral", CAUSAL_LM, "prompt_suffix", batch([torch.arange(5, 9)])),
    "the padding of the encoder": (
        "bart",
        SEQ_2_SEQ_LM,
        "bitfit_added",
        batch(texts("bart", SEQ_2_SEQ_LM)) | answers(SEQ_2_SEQ_LM, 3),
    ),
    "no ready mask": (
        "llama",
        CAUSAL_LM,
        "prefix",
        {"input_ids": torch.full((1, 3), 5), "attention_mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)},
    ),
    "packed into one row": (
        "llama",
        CAUSAL_LM,
        "prefix",
        {"input_ids": torch.full((1, 5), 5), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])},
    ),
    "to several texts packed": (
        "llama",
        CAUSAL_LM,
        "prefix",
        {
            "input_ids": torch.full((1, 5), 5),
            **{name: torch.tensor([0, 3, 5], dtype=torch.int32) for name in ("cu_seq_lens_q", "cu_seq_lens_k")},
            "max_length_q": 3,
            "max_length_k": 3,
        },
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_flash_attention_refuses_what_it_cannot_express(reason: str) -> None:
    family, task, method, inputs = REFUSED[reason]
    model = model_on("flash_attention_2", family, task, method)
    with pytest.raises(UnsupportedModelError, match=rf"^flash attention .*{reason}.*: load the model with [^\n]*$"):
        model(**inputs)


def test_flash_attention_refuses_prefixes_of_several_lengths_in_front_of_an_encoders_text() -> None:
    base = choose(base_model("bart", SEQ_2_SEQ_LM), "flash_attention_2")
    model, names = mixed("bart", SEQ_2_SEQ_LM, ("prefix", "p_tuning_v2"), base)
    inputs = batch(texts("bart", SEQ_2_SEQ_LM, (4,) * len(names))) | answers(SEQ_2_SEQ_LM, len(names))
    with pytest.raises(UnsupportedModelError, match="the encoder's prefixes"):
        model(**inputs, adapter_names=names)


def test_an_attention_function_that_no_one_knows() -> None:
    AttentionInterface.register("unknown", lambda *args, **kwargs: None)
    AttentionMaskInterface.register("unknown", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    with pytest.raises(UnsupportedModelError, match=r"no prefix goes with .* unknown: load"):
        model_on("unknown", "llama", CAUSAL_LM, "prefix")


@pytest.mark.parametrize("implementation", [*FLASH, *FLEX])
def test_the_base_model_stays_as_it_was(implementation: str) -> None:
    inputs = batch(texts("llama", CAUSAL_LM), "left")
    with torch.no_grad():
        expected = choose(base_model("llama", CAUSAL_LM), implementation)(**inputs).logits
        model = model_on(implementation, "llama", CAUSAL_LM, "prefix")
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, expected)
