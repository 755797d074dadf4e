"""Several adapters in one row, one prefix behind the other: as the folder that holds both, beside rows of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softtune import (
    AdapterError,
    AdapterMismatchError,
    CartridgeConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    compose_cartridge_adapters,
)
from softtune.adapter_context import BatchAdapters
from softtune.compat import cache_of, renamed
from tests.families import (
    CAUSAL_LM,
    METHODS,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    adapted,
    answers,
    base_model,
    batch,
    scramble,
    texts,
)
from tests.methods.test_cartridge import through_cache

LENGTHS = {"a": 5, "b": 3, "c": 1}
NAMES = ("a", "a+b", "b+a", "__base__", "c+a+b", "a+a", "b")
ROWS = (7, 4, 2, 5, 6, 3, 1)
CONTRACT = [
    ("llama", CAUSAL_LM),
    ("gpt2", CAUSAL_LM),
    ("bloom", CAUSAL_LM),
    ("gemma3", CAUSAL_LM),
    ("t5", SEQ_2_SEQ_LM),
]


def several(family: str = "llama", task: str = CAUSAL_LM, **fields: Any) -> PeftModel:
    """A model with cartridges of several lengths, of random numbers."""
    model = PeftModel(base_model(family, task))
    for seed, (name, length) in enumerate(LENGTHS.items()):
        frozen = min(length, seed)
        config = CartridgeConfig(num_virtual_tokens=length, num_frozen_tokens=frozen, task_type=task, **fields)
        model.add_adapter(name, config)
        model.set_adapter(name)
        scramble(model, seed + 1)
    return model.eval()


def add(model: PeftModel, name: str, config: Any) -> None:
    """Add an adapter of random numbers, and make it the active one."""
    model.add_adapter(name, config)
    model.set_adapter(name)
    scramble(model, seed=9).eval()


def as_folder(model: PeftModel, name: str, folder: Path, family: str = "llama", task: str = CAUSAL_LM) -> PeftModel:
    """The adapters of a name as one adapter, by way of their folders."""
    for part in LENGTHS:
        model.save_pretrained(folder, selected_adapters=[part])
    compose_cartridge_adapters([folder / part for part in name.split("+")], output_path=folder / name)
    return PeftModel.from_pretrained(base_model(family, task), folder / name)


def flat_of(model: PeftModel, name: str) -> Tensor:
    """[P, W] the prefixes of a name's adapters, one behind the other."""
    return torch.cat([model.get_prompt_embedding_to_save(part) for part in name.split("+")])


def by_cache(model: PeftModel, name: str, ids: Tensor) -> Tensor:
    """[T, V] logits for one text [T], by transformers' own cache."""
    if name == "__base__":
        return base_model("llama", CAUSAL_LM)(ids[None]).logits[0]
    return through_cache("llama", flat_of(model, name), ids)


@pytest.mark.parametrize(("family", "task"), CONTRACT)
@pytest.mark.parametrize("name", ["a+b", "c+b+a"])
def test_a_row_is_that_of_the_composed_folder(family: str, task: str, name: str, tmp_path: Path) -> None:
    model = several(family, task)
    whole = as_folder(model, name, tmp_path, family, task)
    for side in ("right", "left"):
        call = {**batch(texts(family, task), side), **answers(task, 3)}
        assert torch.equal(model(**call, adapter_names=[name] * 3).logits, whole(**call).logits)


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_beside_each_other(side: str) -> None:
    model, rows = several(), texts("llama", CAUSAL_LM, ROWS)
    logits = model(**batch(rows, side), adapter_names=NAMES).logits
    for name, row, found in zip(NAMES, rows, logits, strict=True):
        own = found[: len(row)] if side == "right" else found[-len(row) :]
        torch.testing.assert_close(own, by_cache(model, name, row), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "counts"), [("llama", False), ("gpt2", False), ("bloom", True), ("mpt", True)])
def test_the_order_counts_where_distances_are_added_to_scores(family: str, counts: bool) -> None:
    model, row = several(family), texts(family, CAUSAL_LM)[0]
    one, other, alone = model(row.repeat(3, 1), adapter_names=["a+b", "b+a", "a"]).logits
    assert torch.allclose(one, other, atol=1e-5) is not counts  # else each part has its positions in its keys
    assert (one - alone).abs().max() > 1e-2


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 2}])
def test_what_is_written_is_what_the_composed_folder_writes(strategy: dict[str, Any], tmp_path: Path) -> None:
    model, rows = several(), texts("llama", CAUSAL_LM, (6, 3, 5))
    whole = as_folder(model, "b+a", tmp_path)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, **strategy}
    names = ["b+a", "a", "b+a"]
    found = model.generate(**batch(rows, "left"), adapter_names=names, **options)
    expected = whole.generate(**batch(rows, "left"), **options)
    assert torch.equal(found[[0, 2], :12], expected[[0, 2], :12])
    assert not torch.equal(found[1], expected[1])
    ids = rows[0]
    for _ in range(0 if strategy else 3):
        ids = torch.cat([ids, by_cache(model, "b+a", ids)[-1].argmax()[None]])
        assert torch.equal(found[0, : len(ids)], ids)


def test_prompt_tuning_counts_as_the_prefix_that_it_is() -> None:
    model, row = several(), texts("llama", CAUSAL_LM)[0]
    add(model, "words", METHODS["prompt"](task_type=CAUSAL_LM))
    vectors = model.get_prompt_embedding_to_save("words")
    cache = cache_of(base_model("llama", CAUSAL_LM).model(inputs_embeds=vectors[None], use_cache=True))
    pairs = [part[0].transpose(0, 1).flatten(1) for layer in cache.layers for part in (layer.keys, layer.values)]
    flat = torch.cat([torch.cat(pairs, dim=1), flat_of(model, "b")])
    found = model(row[None], adapter_names=["words+b"]).logits[0]
    torch.testing.assert_close(found, through_cache("llama", flat, row), atol=1e-5, rtol=1e-5)


def test_a_row_of_a_task_with_another_adapter_behind_it() -> None:
    model, row = several(), texts("llama", CAUSAL_LM)[0]
    add(model, "tasks", MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, task_type=CAUSAL_LM))
    rows = row.repeat(3, 1)
    found = model(rows, adapter_names=["tasks+a", "a", "tasks+a"], task_ids=[1, 0, 0]).logits
    for number, task in ((0, 1), (2, 0)):
        alone = model(row[None], adapter_names=["tasks+a"], task_ids=[task]).logits[0]
        torch.testing.assert_close(found[number], alone, atol=1e-5, rtol=1e-5)
    assert (found[0] - found[2]).abs().max() > 1e-3
    with pytest.raises(AdapterError, match="'tasks' has 2 tasks, and no row says which"):
        model(row[None], adapter_names=["tasks+a"])


def test_a_cache_is_gone_on_with_by_the_same_adapters() -> None:
    model, row = several(), texts("llama", CAUSAL_LM)[0][None]
    whole = model(row, adapter_names=["a+b"]).logits
    first = cache_of(model(row[:, :4], adapter_names=["a+b"], use_cache=True))
    go_on = renamed({"cache": first}, model.backbone.model.forward)
    for other in ("a", "b+a", "__base__"):
        with pytest.raises(AdapterError, match=r"computed with a\+b, not"):
            model(row[:, 4:], adapter_names=[other], **go_on)
    rest = model(row[:, 4:], adapter_names=["a+b"], **go_on)
    torch.testing.assert_close(rest.logits, whole[:, 4:], atol=1e-5, rtol=1e-5)


def test_a_prefix_mask_hides_virtual_tokens_of_a_part(tmp_path: Path) -> None:
    model, rows = several(), texts("llama", CAUSAL_LM)
    mask = torch.tensor([[1] * 5 + [0] * 3, [0] * 5 + [1] * 3, [1] * 8])
    found = model(**batch(rows), adapter_names=["a+b"] * 3, prefix_mask=mask).logits
    assert torch.equal(found, as_folder(model, "a+b", tmp_path)(**batch(rows), prefix_mask=mask).logits)
    seen = model(**batch(rows), adapter_names=["a+b"] * 3).logits
    assert [bool((one - other).abs().max() > 1e-2) for one, other in zip(found, seen, strict=True)] == [1, 1, 0]


def test_gradients_are_those_of_the_composed_folder(tmp_path: Path) -> None:
    model, rows = several(), texts("llama", CAUSAL_LM)
    whole = as_folder(model, "a+b", tmp_path).train()
    whole.set_requires_grad("default")
    model.train().set_requires_grad(["a", "b"])
    call = {**batch(rows), "labels": batch(rows)["input_ids"]}
    model(**call, adapter_names=["a+b"] * 3).loss.backward()
    whole(**call).loss.backward()
    [expected] = [p.grad for p in whole.parameters() if p.requires_grad]
    found = [p.grad for name in ("a", "b") for p in model.adapter(name).trained.values()]
    frozen_of_b = 1
    assert whole.peft_config["default"].num_frozen_tokens == 0
    torch.testing.assert_close(found[0], expected[:5])
    torch.testing.assert_close(found[1], expected[5 + frozen_of_b :])


def test_the_gradients_of_all_parts_are_watched() -> None:
    model = several()
    add(model, "tasks", MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, task_type=CAUSAL_LM))
    batch = BatchAdapters.from_names(["tasks+a", "b", "a+b", "__base__"], model.adapter, [1, 0, 0, 0])
    assert {name: adapter.module for name, adapter in batch.by_name.items()} == {
        name: model.adapter(name).module for name in ("tasks", "a", "b")
    }
    assert batch.adapter_names == ("tasks/task 1+a", "b", "a+b", "__base__")


def test_a_name_with_a_plus_keeps_its_meaning() -> None:
    model, row = several(), texts("llama", CAUSAL_LM)[0][None]
    add(model, "a+b", PrefixTuningConfig(num_virtual_tokens=2, task_type=CAUSAL_LM))
    own = model(row, adapter_names=["a+b"]).logits
    assert torch.equal(own, model(row).logits)
    assert (own - model(row, adapter_names=["b+a"]).logits).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("prompt_suffix", "its virtual tokens are behind the text"),
        ("infix", "its virtual tokens are behind the text"),
        ("bitfit_added", "it has trained biases"),
        ("ia3", "it has trained factors"),
        ("memory", "it adds to what attention returns"),
        ("combined", "it has trained"),
    ],
)
def test_what_is_more_than_a_prefix(method: str, why: str) -> None:
    model, row = several(), texts("llama", CAUSAL_LM)[0][None]
    add(model, "other", METHODS[method](task_type=CAUSAL_LM))
    for name, place in (("a+other", 2), ("other+a", 1)):
        with pytest.raises(AdapterError, match=why) as refusal:
            model(row, adapter_names=[name])
        assert f"(adapter {place} of 2): only prefixes" in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a+x", "no adapter is named 'x'"),
        ("x+y", "no adapter is named 'x'"),
        ("a+", "no adapter is named ''"),
        ("a+__base__", "no adapter is named '__base__'"),
        ("a + b", "no adapter is named 'a '"),
    ],
)
def test_unknown_parts(name: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        several()(texts("llama", CAUSAL_LM)[0][None], adapter_names=[name])


def test_prefixes_of_several_kinds() -> None:
    model, row = several(), texts("llama", CAUSAL_LM)[0][None]
    add(model, "late", PrefixTuningConfig(num_virtual_tokens=2, layers="last:1", task_type=CAUSAL_LM))
    add(model, "still", PrefixTuningConfig(num_virtual_tokens=2, shift_positions=False, task_type=CAUSAL_LM))
    add(model, "words", METHODS["prompt"](task_type=CAUSAL_LM))
    add(model, "taskless", PrefixTuningConfig(num_virtual_tokens=2))
    for other in ("late", "still"):
        with pytest.raises(AdapterMismatchError, match="different layers or positions"):
            model(row, adapter_names=[f"a+{other}"])
    with pytest.raises(AdapterError, match="mixes tasks"):
        model(row, adapter_names=["a+taskless"])
    with pytest.raises(AdapterError, match="at the input"):  # where they stand among the words, no keys are known
        model(row, adapter_names=["words+a"], prefix_mask=torch.ones(1, 10, dtype=torch.long))


def test_heads_and_losses_of_their_own() -> None:
    headed = adapted("bert", SEQ_CLS, "prefix")
    with pytest.raises(AdapterError, match="'default' has trained modules beside its prefix: run it apart from"):
        headed(texts("bert", SEQ_CLS)[0][None], adapter_names=["default+default"])
    model, row = several(), texts("llama", CAUSAL_LM)[0][None]
    add(model, "shown", METHODS["cpt"](task_type=CAUSAL_LM))
    assert model(row, adapter_names=["shown+a"]).logits.shape[1] == row.shape[1]
    with pytest.raises(AdapterError, match="no loss together"):
        model(row, labels=row, adapter_names=["shown+a"])


def test_parts_that_drop_virtual_tokens_at_different_rates() -> None:
    model, row = several(), texts("llama", CAUSAL_LM)[0][None]
    add(model, "loose", PrefixTuningConfig(num_virtual_tokens=2, token_dropout=0.5, task_type=CAUSAL_LM))
    model(row, adapter_names=["a+loose"])
    with pytest.raises(AdapterMismatchError, match="token dropout"):
        model.train()(row, adapter_names=["a+loose"])
