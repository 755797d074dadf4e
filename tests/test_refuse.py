"""Promise 7: what cannot be done is refused with a message that says what to do, and never ignored."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import FSMTConfig, FSMTForConditionalGeneration

import softtune.checkpoint
from softtune import (
    AdapterError,
    AdapterMismatchError,
    BitFitConfig,
    CheckpointError,
    ConfigError,
    DataError,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    UnsupportedModelError,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tests.families import (
    CAUSAL_LM,
    FAMILIES,
    METHODS,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    TOKEN_CLS,
    P,
    adapted,
    answers,
    base_model,
    batch,
    cases,
    refusals,
    scramble,
    texts,
    trained,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapted("gpt2", CAUSAL_LM, "prefix").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load(folder: str | Path, **kwargs: Any) -> PeftModel:
    return PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM), folder, **kwargs)


# Configs


@pytest.mark.parametrize("read", [get_peft_config, PeftConfig.from_dict, PrefixTuningConfig.from_dict])
def test_unknown_key(read: Any) -> None:
    with pytest.raises(ConfigError, match=r"num_virtual_token.*did you mean num_virtual_tokens"):
        read({"peft_type": "PREFIX_TUNING", "num_virtual_token": 3})


def test_unknown_key_in_a_file(folder: Path) -> None:
    """In softtune's own it may change what the adapter computes; in PEFT's it is of a newer PEFT, or another tool."""
    for name in ("adapter_config.json", "softtune_config.json"):
        path = folder / name
        content = path.read_text()
        values = json.loads(content)
        (values if name.startswith("adapter") else values["config"])["colour"] = "red"
        path.write_text(json.dumps(values))
        is_pefts = name.startswith("adapter")
        with pytest.warns(UserWarning, match="colour") if is_pefts else pytest.raises(ConfigError, match="colour"):
            load(folder)
        path.write_text(content)


@pytest.mark.parametrize("peft_type", [None, "LORA", "PREFIX"])
def test_unknown_method(peft_type: str | None) -> None:
    with pytest.raises(ConfigError, match="PREFIX_TUNING"):
        get_peft_config({"peft_type": peft_type})


@pytest.mark.parametrize("value", [0, -1, "x", 2.5, None])
def test_number_of_virtual_tokens(value: Any) -> None:
    with pytest.raises(ConfigError, match="num_virtual_tokens"):
        PrefixTuningConfig(num_virtual_tokens=value)


@pytest.mark.parametrize("layers", ["last", "last:0", "last:3", "middle:1", "first:x", [], [2], [-1], [0, 0], ["a"], 1])
def test_layers(layers: Any) -> None:
    with pytest.raises(ConfigError, match="layers"):
        get_peft_model(base_model("gpt2", CAUSAL_LM), PrefixTuningConfig(layers=layers))


@pytest.mark.parametrize("sites", [["encoder"], ["cross"], ["decoder", "encoder"], ["middle"], []])
def test_sites(sites: Any) -> None:
    with pytest.raises(ConfigError, match=r"sites|attention"):
        get_peft_model(base_model("gpt2", CAUSAL_LM), PrefixTuningConfig(sites=sites))


def test_a_config_of_another_method() -> None:
    with pytest.raises(ConfigError, match="PREFIX_TUNING"):
        PrefixTuningConfig(peft_type="BITFIT")
    with pytest.raises(ConfigError, match="subclasses"):
        get_peft_model(base_model("gpt2", CAUSAL_LM), PeftConfig())


# Base models


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", BitFitConfig()),
        ("t5", BitFitConfig(roles=["query"])),
        ("bert", PrefixTuningConfig(placement="infix")),
        ("t5", PrefixTuningConfig(placement="infix")),
    ],
)
def test_a_method_that_the_model_cannot_take(family: str, config: PeftConfig) -> None:
    task = {"llama": CAUSAL_LM, "bert": SEQ_CLS, "t5": SEQ_2_SEQ_LM}[family]
    with pytest.raises(UnsupportedModelError):
        get_peft_model(base_model(family, task), config)


@pytest.mark.promise(7)
@pytest.mark.filterwarnings("ignore:.* is not trained by an adapter:UserWarning")
@pytest.mark.parametrize(("family", "method", "remedy"), refusals())
def test_a_refusal_names_what_the_model_can_take(family: str, method: str, remedy: str) -> None:
    with pytest.raises(UnsupportedModelError, match=remedy) as refusal:
        get_peft_model(base_model(family, FAMILIES[family].tasks[0]), METHODS[method]())
    assert "\n" not in str(refusal.value)


def test_bloom_takes_a_prefix_at_all_layers_or_none() -> None:
    """Its prefix is a ready cache, which has every layer and stands before the text."""
    for config in (PrefixTuningConfig(layers="last:1"), PrefixTuningConfig(placement="infix")):
        with pytest.raises(UnsupportedModelError):
            get_peft_model(base_model("bloom", CAUSAL_LM), config)


def test_a_module_that_is_no_transformer() -> None:
    with pytest.raises(UnsupportedModelError, match="from_pretrained"):
        get_peft_model(nn.Linear(2, 2), PromptTuningConfig())


def test_a_model_whose_stacks_are_no_models() -> None:
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = FSMTForConditionalGeneration(FSMTConfig(src_vocab_size=9, tgt_vocab_size=9, **sizes, **heads))
    with pytest.raises(UnsupportedModelError, match=r"FSMTEncoder is no model of its own.*: use another base model"):
        get_peft_model(model, PromptTuningConfig())


def test_a_decoder_that_sees_later_words() -> None:
    """UMT5's in transformers 5.17."""
    model = base_model("t5", SEQ_2_SEQ_LM)
    for module in model.get_decoder().modules():
        if hasattr(module, "has_relative_attention_bias"):
            module.is_causal = False
    with pytest.raises(UnsupportedModelError, match=r"T5.*'s decoder sees later words .*: install 5\.18 or newer"):
        get_peft_model(model, PromptTuningConfig())


def test_positions_that_no_prefix_can_move() -> None:
    class Positions(nn.Module):
        def forward(self, words: torch.Tensor) -> torch.Tensor:
            return torch.zeros(words.shape[1], 32)

    model, inputs = adapted("bart", SEQ_2_SEQ_LM, "prefix"), batch(texts("bart", SEQ_2_SEQ_LM))
    stay = get_peft_model(model.get_base_model(), PrefixTuningConfig(shift_positions=False))
    model.get_base_model().get_encoder().embed_positions = Positions()
    with pytest.raises(UnsupportedModelError, match=r"BartEncoder counts positions .*: set shift_positions=False"):
        model(**inputs, **answers(SEQ_2_SEQ_LM, 3))
    stay(**inputs, **answers(SEQ_2_SEQ_LM, 3))


@pytest.mark.promise(7, families=("gpt2",))
@pytest.mark.parametrize("method", ["prompt", "p_tuning_lstm", "prefix", "p_tuning_v2"])
@pytest.mark.parametrize("other", [{"n_embd": 24}, {"n_layer": 3}, {"n_head": 4}, {"seed": 7}])
def test_an_adapter_of_another_base_model(method: str, other: dict[str, int], tmp_path: Path) -> None:
    adapted("gpt2", CAUSAL_LM, method).save_pretrained(tmp_path)
    for trainable in (False, True):
        with pytest.raises(AdapterMismatchError, match="base model"):
            PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM, **other), tmp_path, is_trainable=trainable)


def test_weights_of_another_shape() -> None:
    model = adapted("gpt2", CAUSAL_LM, "prefix")
    with pytest.raises(AdapterMismatchError, match="shape"):
        set_peft_model_state_dict(model, {"prompt_embeddings": torch.zeros(P, 3)})
    with pytest.raises(AdapterMismatchError, match="lacks"):
        set_peft_model_state_dict(model, {})
    with pytest.raises(AdapterMismatchError, match="also has"):
        set_peft_model_state_dict(model, {"prompt_embeddings": torch.zeros(P, 144), "more": torch.zeros(1)})


@pytest.mark.parametrize("lost", ["lacks", "shape"])
def test_a_state_dict_that_does_not_fit(lost: str, tmp_path: Path) -> None:
    model, other = (adapted("bert", SEQ_CLS, "prefix", seed=seed) for seed in (1, 2))
    own, state = {n: x.clone() for n, x in model.state_dict().items()}, other.state_dict()
    name = list(state)[-1]
    state = {n: x for n, x in state.items() if n != name} | ({name: torch.zeros(7)} if lost == "shape" else {})
    calls = (
        lambda: model.load_state_dict(state),
        lambda: get_peft_model_state_dict(model, state),
        lambda: model.save_pretrained(tmp_path, state_dict=state),
    )
    for call in calls:
        with pytest.raises(AdapterMismatchError, match=f"another '{name}'") as refusal:
            call()
        assert "\n" not in str(refusal.value)
    torch.testing.assert_close(dict(model.state_dict()), own, rtol=0, atol=0)
    with pytest.raises(AdapterMismatchError, match="another"):
        get_peft_model_state_dict(model, {})


# Folders


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load(folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "training_state.safetensors"])
def test_a_file_cut_short(name: str, tmp_path: Path) -> None:
    adapted("gpt2", CAUSAL_LM, "prefix_projection").save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    for size in (0, 4, len(content) // 2, len(content) - 1):
        (tmp_path / name).write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="restore"):
            load(tmp_path, is_trainable=True)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_damaged_config(folder: Path, content: str) -> None:
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="JSON"):
        load(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["my runs/x", "~/adapters", "a--b", "runs/one/adapter", "nobody/nothing", "nothing"])
def test_an_adapter_that_is_nowhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=name) as refusal:
        load(name)
    assert "\n" not in str(refusal.value)


def test_an_adapter_in_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    torch.testing.assert_close(dict(load("~/adapter").state_dict()), dict(load(folder).state_dict()), rtol=0, atol=0)


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("fired"),))


@pytest.mark.parametrize("trainable", [False, True])
def test_pickled_weights_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch, trainable: bool) -> None:
    monkeypatch.chdir(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Payload()))
    with pytest.raises(CheckpointError, match="pickled"):
        load(folder, is_trainable=trainable)
    assert not Path("fired").exists()
    pickle.loads((folder / "adapter_model.bin").read_bytes())
    assert Path("fired").exists()


def test_saving_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="folder"):
        adapted("gpt2", CAUSAL_LM, "prefix").save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_what_was_there(existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = adapted("gpt2", CAUSAL_LM, "prefix_projection"), tmp_path / "adapter"
    if existing:
        model.save_pretrained(folder)
    before = {p.name: p.read_bytes() for p in folder.glob("*")}
    scramble(model, seed=9)
    calls = []

    def fail_second(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError("no space left on device")
        save_file(*args, **kwargs)

    monkeypatch.setattr(softtune.checkpoint, "save_file", fail_second)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.glob("*")} == before
    assert {p.name for p in tmp_path.iterdir()} == ({"adapter"} if existing else set())


@pytest.mark.parametrize("method", ["prompt_suffix", "prefix_last", "infix", "embedding_only"])
def test_peft_stops_at_a_folder_that_it_would_misread(method: str, tmp_path: Path) -> None:
    import peft

    adapted("gpt2", CAUSAL_LM, method).save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="prompt_embeddings"):
        peft.PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM), tmp_path)


def test_the_file_of_a_misread_folder_has_another_key(tmp_path: Path) -> None:
    adapted("gpt2", CAUSAL_LM, "infix").save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"softtune.prompt_embeddings"}


# Names


def test_names() -> None:
    model = adapted("gpt2", CAUSAL_LM, "prefix")
    calls = (
        lambda: model.set_adapter("nobody"),
        lambda: model.delete_adapter("nobody"),
        lambda: model.get_prompt_embedding_to_save("nobody"),
        lambda: model.save_pretrained("nowhere", selected_adapters=["nobody"]),
    )
    for call in calls:
        with pytest.raises(AdapterError, match="nobody"):
            call()
    assert not Path("nowhere").exists()
    no_names = ("default", "", "a.b", "__base__", "training", "keys", "forward", "_modules", "pop")
    for name in (*no_names, "a/b", "/outside", "..", "a\\b"):
        with pytest.raises(AdapterError, match=f"{re.escape(repr(name))} is .*loaded"):
            model.add_adapter(name, PrefixTuningConfig(num_virtual_tokens=2))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ConfigError, match="no_such_module"):
        model.add_adapter("other", PrefixTuningConfig(modules_to_save=["no_such_module"]))


def test_a_frozen_adapter_is_not_loaded_for_training(folder: Path) -> None:
    model = load(folder)
    with pytest.raises(AdapterError, match=r"frozen: train it by set_requires_grad\('default'\), or load it under an"):
        model.load_adapter(folder, "default", is_trainable=True)
    model.set_requires_grad("default")
    model.load_adapter(folder, "default", is_trainable=True)
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(AdapterError, match="frozen"):
        model.load_adapter(folder, "default", is_trainable=True)
    model.load_adapter(folder, "default")


def test_an_adapter_that_waits_for_its_turn_is_loaded_for_training(folder: Path) -> None:
    model = load(folder, is_trainable=True)
    for _ in range(2):
        model.load_adapter(folder, "b", is_trainable=True)
    model.set_adapter("b")
    assert trained(model).keys() == {"prompt_encoder.b.embedding.weight"}
    model.load_adapter(folder, "default", is_trainable=True)
    model.load_adapter(folder, "c")
    with pytest.raises(AdapterError, match="frozen"):
        model.load_adapter(folder, "c", is_trainable=True)


# Running


@pytest.mark.promise(7)
@pytest.mark.parametrize(
    ("family", "task", "method"),
    [c for c in cases(("prompt", "prompt_suffix", "prefix", "infix")) if FAMILIES[c[0]].limit and c[1] != SEQ_CLS]
    + [c for c in cases(("prompt", "prefix"), tasks=(TOKEN_CLS,)) if FAMILIES[c[0]].limit],
)
def test_more_tokens_than_positions(family: str, task: str, method: str) -> None:
    model, limit = adapted(family, task, method), FAMILIES[family].limit
    assert limit is not None
    decoder = answers(task, 1)
    model(input_ids=torch.full((1, limit - P), 5), **decoder)
    with pytest.raises(DataError, match=f"{limit} positions"):
        model(input_ids=torch.full((1, limit + 1 - P), 5), **decoder)


@pytest.mark.promise(2)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("family", "task", "method"),
    [
        c
        for c in cases(("prompt", "prompt_suffix", "prefix", "infix"), tasks=(CAUSAL_LM, SEQ_CLS))
        if FAMILIES[c[0]].limit and FAMILIES[c[0]].positions == "ids"
    ],
)
def test_padding_takes_no_positions(family: str, task: str, method: str, side: str) -> None:
    model, limit = adapted(family, task, method), FAMILIES[family].limit
    assert limit is not None
    rows = texts(family, task, (limit - P, 4))
    padded = model(**batch(rows, side, width=limit + 3)).logits
    for i, row in enumerate(rows):
        own = padded[i] if task == SEQ_CLS else padded[i][batch(rows, side, width=limit + 3)["attention_mask"][i] == 1]
        torch.testing.assert_close(own, model(input_ids=row[None]).logits[0], atol=1e-5, rtol=1e-5)
    rows = texts(family, task, (limit + 1 - P, 4))
    with pytest.raises(DataError, match=f"{limit + 1 - P} tokens and {P} virtual ones exceed"):
        model(**batch(rows, side, width=limit + 3))


def test_models_that_count_columns_by_themselves_count_padding() -> None:
    model = adapted("bart", SEQ_2_SEQ_LM, "prefix")
    with pytest.raises(DataError, match="60 tokens and 5 virtual ones exceed"):
        model(**batch(texts("bart", SEQ_2_SEQ_LM), "left", width=60), **answers(SEQ_2_SEQ_LM, 3))


def test_packed_texts_may_be_longer_than_the_positions() -> None:
    model, row = adapted("gpt2", CAUSAL_LM, "prefix"), torch.full((1, 120), 5)
    positions = torch.arange(40).repeat(3)[None]
    logits = model(row, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits[:, 80:], model(row[:, :40]).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(DataError, match="60 tokens and 5 virtual ones exceed"):
        model(row, position_ids=torch.arange(60).repeat(2)[None], use_cache=False)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rows_may_have_more_tokens_together_than_positions(family: str) -> None:
    model, rows = adapted(family, CAUSAL_LM, "prefix"), texts(family, CAUSAL_LM, (50, 40, 50))
    logits = model(**batch(rows, "left"), use_cache=False).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i, -len(row) :], model(row[None]).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
@pytest.mark.parametrize("method", ["prefix", "prompt", "bitfit"])
def test_an_empty_batch(shape: tuple[int, int], method: str) -> None:
    with pytest.raises(DataError, match=r"the input \[\d, \d\] has no tokens: leave out empty batches"):
        adapted("gpt2", CAUSAL_LM, method)(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("positions", [[[0, 1]], [[0, 1, 2, 3, 5]], [[-1, 0, 0, 0, 0]], [[0] * P, [0] * P]])
def test_positions_that_do_not_fit(positions: list[list[int]]) -> None:
    with pytest.raises(DataError, match="prompt_positions"):
        adapted("gpt2", CAUSAL_LM, "prompt")(torch.tensor([[5, 6, 7, 8]]), prompt_positions=torch.tensor(positions))


def test_an_infix_in_pieces() -> None:
    with pytest.raises(DataError, match="infix"):
        adapted("gpt2", CAUSAL_LM, "infix")(torch.tensor([[5, 6, 7]]), prompt_positions=torch.tensor([[0, 1, 1, 2, 2]]))


@pytest.mark.promise(7, methods=("prefix",))
@pytest.mark.parametrize("family", ["llama", "bart", "t5"])
def test_another_attention_after_wrapping_does_not_drop_the_prefix(family: str) -> None:
    task = CAUSAL_LM if family == "llama" else SEQ_2_SEQ_LM
    model, inputs = adapted(family, task, "prefix"), batch(texts(family, task))
    expected = model(**inputs, labels=inputs["input_ids"]).logits
    model.get_base_model().set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs, labels=inputs["input_ids"]).logits, expected)


@pytest.mark.promise(7)
@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("method", ["prompt", "prefix", "memory"])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_outputs_without_the_adapter(family: str, method: str, masked: bool) -> None:
    model, inputs = adapted(family, SEQ_2_SEQ_LM, method), batch(texts(family, SEQ_2_SEQ_LM))
    outputs = model.get_base_model().get_encoder()(**inputs)
    mask = {"attention_mask": inputs["attention_mask"]} if masked else {}
    decoder_ids = torch.full((3, 2), 5)
    with pytest.raises(AdapterError, match="encoder_outputs"):
        model(encoder_outputs=outputs, decoder_input_ids=decoder_ids, **mask)
    with model.disable_adapter():
        model(encoder_outputs=outputs, decoder_input_ids=decoder_ids, **mask)


def test_a_ready_mask_and_virtual_tokens() -> None:
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    with pytest.raises(UnsupportedModelError, match="2-D"):
        adapted("llama", CAUSAL_LM, "prompt_suffix")(ids, attention_mask=mask)
    for method in ("prefix", "prompt"):
        model = adapted("llama", CAUSAL_LM, method)
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_every_method_names_itself_in_its_folder(tmp_path: Path) -> None:
    for method in METHODS:
        if method == "bitfit_added":
            continue
        adapted("gpt2", CAUSAL_LM, method).save_pretrained(tmp_path / method)
        assert type(PeftConfig.from_pretrained(tmp_path / method)) is type(METHODS[method]())


def test_options_that_would_have_no_effect(tmp_path: Path) -> None:
    model = adapted("llama", CAUSAL_LM, "prompt")
    with pytest.raises(ConfigError, match="no option revisoin='main'"):
        PeftModel.from_pretrained(model.get_base_model(), tmp_path, revisoin="main")
    with pytest.raises(DataError, match="prompt_positions is for virtual tokens among the words"):
        adapted("llama", CAUSAL_LM, "prefix")(
            input_ids=torch.tensor([[3, 4]]), prompt_positions=torch.zeros(1, P).long()
        )
    with pytest.raises(ConfigError, match="no use for init_text"):
        PrefixTuningConfig(init_weights="zero", init_text="some words")
