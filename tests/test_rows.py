"""Promise 2 for mixed batches: a row is the same beside rows of other adapters, and trains its own adapter alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import (
    MegatronBertConfig,
    MegatronBertForTokenClassification,
    NystromformerConfig,
    NystromformerForMaskedLM,
    PreTrainedModel,
)

from softtune import (
    AdapterError,
    DataError,
    PeftModel,
    PrefixTuningConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    UnsupportedModelError,
    get_peft_model,
)
from softtune.backbone import Site
from softtune.compat import enable_checkpointing
from tests.families import (
    CAUSAL_LM,
    FAMILIES,
    KINDS,
    METHODS,
    QUESTION_ANS,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    TOKEN_CLS,
    answers,
    base_model,
    batch,
    scramble,
    sides,
    takes,
    texts,
)

GENERATED = 4
NOT_BY_ROWS = {
    *(("deberta", kind) for kind in ("bitfit_added", "combined")),
    *(("deberta_v2", kind) for kind in ("bitfit_added", "ia3", "combined")),
}
"""DeBERTa computes its relative positions once for all rows, with biases, and the second by its keys' projection."""
CASES = [(f, task) for f, row in FAMILIES.items() for task in row.tasks if task not in (TOKEN_CLS, QUESTION_ANS)]
GENERATING = [(family, task) for family, task in CASES if task in (CAUSAL_LM, SEQ_2_SEQ_LM)]


def kinds_of(family: str, kinds: tuple[str, ...] = KINDS) -> tuple[str, ...]:
    """The methods that a mixed batch of the family has."""
    return tuple(kind for kind in kinds if takes(family, kind) and (family, kind) not in NOT_BY_ROWS)


def mixed(
    family: str, task: str, kinds: tuple[str, ...] = KINDS, base: PreTrainedModel | None = None
) -> tuple[PeftModel, list[str]]:
    """A model with an adapter of every kind, each of another length, and a row's adapter name for each and the base."""
    kinds = kinds_of(family, kinds)
    model = PeftModel(base or base_model(family, task))
    for number, kind in enumerate(kinds):
        config = METHODS[kind](task_type=task)
        if isinstance(config, PromptLearningConfig):
            config = dataclasses.replace(config, num_virtual_tokens=1 + 2 * number)
        model.add_adapter(kind, config)
        model.set_adapter(kind)
        scramble(model, seed=number)
    model.set_requires_grad(kinds)
    return model.eval(), [*kinds, "__base__", kinds[0]]


def rows_for(family: str, task: str, count: int) -> list[Tensor]:
    return texts(family, task, tuple((7, 4, 2, 5, 3, 6)[i % 6] for i in range(count)))


def own(logits: Tensor, row: Tensor, side: str, task: str) -> Tensor:
    if task != CAUSAL_LM:
        return logits
    return logits[: len(row)] if side == "right" else logits[len(logits) - len(row) :]


@pytest.mark.promise(2, methods=kinds_of)
@pytest.mark.parametrize(("family", "task"), CASES)
def test_outputs_and_gradients_are_those_of_each_row_alone(family: str, task: str) -> None:
    model, names = mixed(family, task)
    rows = rows_for(family, task, len(names))
    decoder = answers(task, len(names))
    alone = []
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        inputs = {"input_ids": row[None], **{k: v[i : i + 1] for k, v in decoder.items()}}
        if name == "__base__":
            with model.disable_adapter():
                alone.append(model(**inputs).logits[0])
        else:
            model.set_adapter(name)
            model.set_requires_grad([n for n in names if n != "__base__"])
            alone.append(model(**inputs).logits[0])
    weights = [torch.randn_like(x) for x in alone]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = gradients(trained, alone, weights)
    for side in sides(family, task):
        logits = model(**batch(rows, side), **decoder, adapter_names=names).logits
        together = [own(x, row, side, task) for x, row in zip(logits, rows, strict=True)]
        for mine, other in zip(together, alone, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
        for name, gradient in gradients(trained, together, weights).items():
            scale = max(1.0, float(expected[name].abs().max()))
            torch.testing.assert_close(gradient, expected[name], atol=1e-5 * scale, rtol=1e-4, msg=name)


def gradients(trained: dict[str, Tensor], outputs: list[Tensor], weights: list[Tensor]) -> dict[str, Tensor]:
    loss = torch.stack([(x * w).sum() for x, w in zip(outputs, weights, strict=True)]).sum()
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(trained.items(), found, strict=True)}


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("kinds", [("prefix", "prompt", "p_tuning_v2"), ("prefix", "bitfit_added")])
@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_of_one_text_without_a_cache(family: str, kinds: tuple[str, ...], side: str) -> None:
    """Where rows share what they have in common, those of another adapter have nothing in common."""
    model, names = mixed(family, CAUSAL_LM, kinds)
    (text,) = texts(family, CAUSAL_LM, (6,))
    names, rows = [*names, *names], [*[text] * len(names), *[text[:4]] * len(names)]
    together = model(**batch(rows, side), adapter_names=names, use_cache=False).logits
    for name, row, logits in zip(names, rows, together, strict=True):
        alone = model(row[None], adapter_names=[name]).logits[0]
        torch.testing.assert_close(own(logits, row, side, CAUSAL_LM), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.promise(2, methods=kinds_of)
@pytest.mark.parametrize(("family", "task"), GENERATING)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_each_row_alone(family: str, task: str, beams: int) -> None:
    model, names = mixed(family, task)
    rows = rows_for(family, task, len(names))
    settings = {"max_new_tokens": GENERATED, "num_beams": beams, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        together = model.generate(**batch(rows, "left"), adapter_names=names, **settings)
        for name, row, generated in zip(names, rows, together, strict=True):
            alone = model.generate(row[None], adapter_names=[name], **settings)
            assert torch.equal(generated[-GENERATED:], alone[0, -GENERATED:]), name


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma3"])
def test_cached_steps_of_mixed_rows_are_the_uncached_forward(family: str) -> None:
    model, names = mixed(family, CAUSAL_LM, ("prompt", "prefix", "prefix_last", "p_tuning_v2", "bitfit_added"))
    rows = rows_for(family, CAUSAL_LM, len(names))
    inputs = batch(rows, "left")
    settings = {"max_new_tokens": GENERATED, "do_sample": False, "eos_token_id": None, "output_logits": True}
    with torch.no_grad():
        result = model.generate(**inputs, adapter_names=names, **settings, return_dict_in_generate=True)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, GENERATED), value=1)
        logits = model(input_ids=result.sequences, attention_mask=mask, adapter_names=names).logits
    torch.testing.assert_close(torch.stack(result.logits, dim=1), logits[:, -GENERATED - 1 : -1], atol=1e-5, rtol=1e-5)


def test_the_active_adapter_is_the_same_after_a_mixed_batch() -> None:
    model, names = mixed("gpt2", CAUSAL_LM)
    model.set_adapter("bitfit_added")
    rows = rows_for("gpt2", CAUSAL_LM, len(names))
    before = model(rows[0][None]).logits
    model(**batch(rows), adapter_names=names)
    assert model.active_adapter == "bitfit_added"
    assert torch.equal(model(rows[0][None]).logits, before)
    with model.disable_adapter():
        base = model(rows[0][None]).logits
        model(**batch(rows), adapter_names=names)
        assert torch.equal(model(rows[0][None]).logits, base)


def test_one_name_for_all_rows_is_that_adapter() -> None:
    model, names = mixed("llama", CAUSAL_LM)
    rows = rows_for("llama", CAUSAL_LM, 3)
    for name in names:
        logits = model(**batch(rows), adapter_names=[name] * 3).logits
        if name != "__base__":
            model.set_adapter(name)
            assert torch.equal(logits, model(**batch(rows)).logits)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_names_that_do_not_fit_are_refused(call: str) -> None:
    model, _ = mixed("gpt2", CAUSAL_LM, ("prompt", "prefix"))
    ids = torch.tensor([[3, 4], [5, 6]])
    run = getattr(model, call)
    with pytest.raises(AdapterError, match="adapter_names has 1 names, the batch 2 rows"):
        run(ids, adapter_names=["prompt"])
    with pytest.raises(AdapterError, match="no adapter is named 'other'"):
        run(ids, adapter_names=["prompt", "other"])
    model.add_adapter("classifier", PrefixTuningConfig(num_virtual_tokens=2, task_type=SEQ_CLS))
    with pytest.raises(AdapterError, match="mixes tasks"):
        run(ids, adapter_names=["prompt", "classifier"])


def test_positions_are_for_virtual_tokens_of_one_number() -> None:
    model, _ = mixed("gpt2", CAUSAL_LM, ("prompt", "prompt_suffix", "prefix"))
    ids = torch.tensor([[3, 4], [5, 6]])
    with pytest.raises(DataError, match="prompt_positions"):
        model(ids, adapter_names=["prompt", "prompt_suffix"], prompt_positions=torch.tensor([[1], [1]]))
    places = torch.tensor([[1], [0]])
    mixed_rows = model(ids, adapter_names=["prompt", "prefix"], prompt_positions=places).logits
    model.set_adapter("prompt")
    torch.testing.assert_close(mixed_rows[:1], model(ids[:1], prompt_positions=places[:1]).logits)
    model.set_adapter("prefix")
    torch.testing.assert_close(mixed_rows[1:], model(ids[1:]).logits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "kinds",
    [
        ("prefix", "p_tuning_v2"),
        ("prompt", "prefix_last"),
        ("prefix", "bitfit_added"),
        ("prefix", "prompt_suffix"),
        ("memory", "adaption_prompt", "combined"),
    ],
)
def test_rows_train_under_checkpointing(kinds: tuple[str, ...], reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        model, names = mixed("llama", CAUSAL_LM, kinds)
        if checkpointed:
            enable_checkpointing(model, use_reentrant=reentrant)
        inputs = batch(rows_for("llama", CAUSAL_LM, len(names)))
        model.train()(**inputs, labels=inputs["input_ids"], adapter_names=names).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_biases_that_act_on_all_rows_at_once_are_refused() -> None:
    model = get_peft_model(base_model("deberta_v2", SEQ_CLS), METHODS["bitfit"](task_type=SEQ_CLS)).eval()
    with pytest.raises(UnsupportedModelError, match="not compute row by row"):
        model(**batch(texts("deberta_v2", SEQ_CLS)), adapter_names=["default", "default", "__base__"])


def test_heads_of_several_adapters() -> None:
    base = base_model("bert", SEQ_CLS)
    model = get_peft_model(base, METHODS["p_tuning_v2"](task_type=SEQ_CLS), "a")
    scramble(model, 1)
    model.add_adapter("b", METHODS["bitfit"](task_type=SEQ_CLS))
    model.set_adapter("b")
    scramble(model, 2)
    rows = texts("bert", SEQ_CLS)
    logits = model.eval()(**batch(rows), adapter_names=["b", "a", "__base__"]).logits
    for row, name, own_logits in zip(rows, ("b", "a", "__base__"), logits, strict=True):
        torch.testing.assert_close(own_logits, model(row[None], adapter_names=[name]).logits[0], atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits[2], model(rows[2][None]).logits[0], atol=1e-5, rtol=1e-5)


def test_encoder_decoders_mix_sites() -> None:
    model = PeftModel(base_model("t5", SEQ_2_SEQ_LM))
    for number, site in enumerate(("encoder", "decoder", "cross")):
        config = PrefixTuningConfig(num_virtual_tokens=2 + number, sites=[site], task_type=SEQ_2_SEQ_LM)
        model.add_adapter(site, config)
        model.set_adapter(site)
        scramble(model, number)
    names = ["cross", "__base__", "encoder", "decoder"]
    rows = rows_for("t5", SEQ_2_SEQ_LM, 4)
    decoder = answers(SEQ_2_SEQ_LM, 4)["decoder_input_ids"]
    logits = model.eval()(**batch(rows), decoder_input_ids=decoder, adapter_names=names).logits
    for i, name in enumerate(names):
        alone = model(rows[i][None], decoder_input_ids=decoder[i : i + 1], adapter_names=[name]).logits[0]
        torch.testing.assert_close(logits[i], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "task"), [("t5", SEQ_2_SEQ_LM), ("bart", SEQ_2_SEQ_LM), ("bert", SEQ_CLS)])
def test_texts_without_padding_do_not_see_the_prefixes_of_others(
    family: str, task: str, attention: str, masked: bool
) -> None:
    """Layers that need no mask get one, in the form that their attention function adds."""
    base = base_model(family, task, attn_implementation=attention)
    model, names = mixed(family, task, ("prefix", "p_tuning_v2"), base)
    inputs = batch(texts(family, task, (5,)) * len(names))
    decoder = answers(task, 1)
    if not masked:
        del inputs["attention_mask"]
    together = model(**inputs, **{k: x.expand(len(names), -1) for k, x in decoder.items()}, adapter_names=names).logits
    for name, found in zip(names, together, strict=True):
        alone = model(**{k: x[:1] for k, x in inputs.items()}, **decoder, adapter_names=[name]).logits[0]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


def test_a_model_that_sees_padding_takes_rows_of_one_number_alone() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    torch.manual_seed(0)
    base = NystromformerForMaskedLM(
        NystromformerConfig(**sizes, vocab_size=97, num_landmarks=4, segment_means_seq_len=4)
    )
    model = PeftModel(base, PromptTuningConfig(num_virtual_tokens=2)).eval()
    ids = torch.tensor([[5, 6, 7], [5, 6, 7]])
    assert model(ids).logits.shape[:2] == (2, 3)
    with pytest.raises(UnsupportedModelError, match=r"does not ignore padding, .*: run them in batches of their own"):
        model(ids, adapter_names=["default", "__base__"])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_not_taken_for_padding_that_is_seen(dtype: torch.dtype) -> None:
    model, names = mixed("bloom", CAUSAL_LM, ("prompt", "prefix"), base_model("bloom", CAUSAL_LM).to(dtype))
    assert model(**batch(rows_for("bloom", CAUSAL_LM, len(names))), adapter_names=names).logits.isfinite().all()
    assert model.backbone.stacks[0].ignores_padding


def test_an_encoder_without_a_word_of_its_causality_is_seen_to_be_one() -> None:
    """It takes a cache, as a decoder would, and its modules say nothing."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    torch.manual_seed(0)
    base = MegatronBertForTokenClassification(MegatronBertConfig(**sizes, vocab_size=97)).eval()
    model = scramble(PeftModel(base, PromptTuningConfig(num_virtual_tokens=2))).eval()
    assert [stack.site for stack in model.backbone.stacks] == [Site.ENCODER]
    ids = torch.tensor([[5, 6, 7], [5, 6, 7]])
    with torch.no_grad():
        mixed_rows = model(ids, adapter_names=["default", "__base__"]).logits
        torch.testing.assert_close(mixed_rows[0], model(ids[:1]).logits[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mixed_rows[1], base(ids[:1]).logits[0], atol=1e-5, rtol=1e-5)
