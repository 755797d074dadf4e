"""Cartridges: PEFT's module and folders, frozen tokens that nothing trains, and several of them as one."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.families import (
    CAUSAL_LM,
    METHODS,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    P,
    adapted,
    base_model,
    batch,
    save_adapter,
    scramble,
    texts,
    trained,
)
from tests.serving.stepping import Served
from tests.tiny import save_models
from torch import Tensor
from transformers import DynamicCache

from softtune import (
    AdapterError,
    AdapterMismatchError,
    CartridgeConfig,
    CartridgeEncoder,
    CheckpointError,
    ConfigError,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    compose_cartridge_adapters,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from softtune.compat import renamed
from softtune.methods.kv_layout import composed
from softtune.methods.prompt import KeyValue, Prompt

SIZES: dict[str, Any] = {"token_dim": 12, "num_layers": 3, "num_attention_heads": 2, "num_transformer_submodules": 1}


def cartridge(family: str = "llama", task: str = CAUSAL_LM, seed: int = 1, **fields: Any) -> PeftModel:
    config = CartridgeConfig(**{"num_virtual_tokens": P, "task_type": task, **fields})
    return scramble(get_peft_model(base_model(family, task), config), seed).eval()


def prefix_of(model: PeftModel) -> Tensor:
    return model.get_prompt_embedding_to_save("default")


def through_cache(family: str, flat: Tensor, ids: Tensor) -> Tensor:
    """[T, V] logits of a decoder of even layers for one text [T] behind a prefix [P, W], by transformers' own cache."""
    base, cache = base_model(family, CAUSAL_LM), DynamicCache()
    heads = base.config.num_key_value_heads
    parts = flat.view(len(flat), 2 * base.config.num_hidden_layers, heads, -1).permute(1, 2, 0, 3)
    for layer in range(base.config.num_hidden_layers):
        cache.update(parts[2 * layer][None], parts[2 * layer + 1][None], layer)
    positions = torch.arange(len(flat), len(flat) + len(ids))[None]
    call = {"input_ids": ids[None], "cache": cache, "position_ids": positions}
    logits: Tensor = base(**renamed(call, base.forward)).logits[0]
    return logits


# The module


@pytest.mark.parametrize("frozen", [0, 1, 3, P])
def test_the_module_is_pefts(frozen: int) -> None:
    fields = {"num_virtual_tokens": P, "num_frozen_tokens": frozen, **SIZES}
    theirs = peft.CartridgeEncoder(peft.CartridgeConfig(**fields))
    ours = CartridgeEncoder(CartridgeConfig(**fields))
    flat = torch.randn(P, 2 * 12 * 3)
    for module in (theirs, ours):
        module.load_prompt_embeddings(flat)
    assert torch.equal(ours.weight, theirs.weight)
    tokens = torch.arange(P).expand(2, -1)
    assert torch.equal(ours(tokens), theirs(tokens))
    assert torch.equal(ours(), flat)
    expected = {name: tensor for name, tensor in theirs.state_dict().items() if tensor.numel()}
    torch.testing.assert_close(dict(ours.state_dict()), dict(expected), rtol=0, atol=0)
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        n for n, p in theirs.named_parameters() if p.requires_grad and p.numel()
    ]
    for shape in ((P + 1, 72), (P, 71)):
        with pytest.raises(AdapterMismatchError, match=r"has the shape .*: give a prefix of this base model"):
            ours.load_prompt_embeddings(torch.zeros(shape))


@pytest.mark.parametrize("frozen", [-1, P + 1])
def test_frozen_tokens_are_among_the_virtual_tokens(frozen: int) -> None:
    with pytest.raises(ValueError, match="num_frozen_tokens"):
        peft.CartridgeConfig(num_virtual_tokens=P, num_frozen_tokens=frozen)
    with pytest.raises(ConfigError, match="num_frozen_tokens"):
        CartridgeConfig(num_virtual_tokens=P, num_frozen_tokens=frozen)


def test_random_tokens_are_from_pefts_distribution() -> None:
    model = get_peft_model(base_model("gpt2", CAUSAL_LM), CartridgeConfig(num_virtual_tokens=50, init_weights="random"))
    assert abs(float(prefix_of(model).std()) - 1) < 0.05
    assert abs(float(prefix_of(model)[0].std()) - 1) < 0.2


# Frozen tokens


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_gradients_are_those_through_a_cache(frozen: int, side: str) -> None:
    model = cartridge(num_frozen_tokens=frozen).train()
    rows = texts("llama", CAUSAL_LM)
    inputs = batch(rows, side)
    logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    flat = prefix_of(model).clone().requires_grad_()
    expected = torch.cat([through_cache("llama", flat, row) for row in rows])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    (gradient,) = [p.grad for p in trained(model).values()]
    assert flat.grad is not None
    torch.testing.assert_close(gradient, flat.grad[frozen:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("frozen", [0, 2, P])
def test_nothing_moves_frozen_tokens(frozen: int) -> None:
    """Neither weight decay, nor who trains or freezes all parameters."""
    model = cartridge("llama", SEQ_CLS, num_frozen_tokens=frozen).train()
    model.set_requires_grad("default", False)
    model.set_requires_grad("default", True)
    model.prompt_encoder.requires_grad_(True)
    before = prefix_of(model).clone()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    inputs = batch(texts("llama", SEQ_CLS))
    for _ in range(3):
        model(**inputs, labels=torch.arange(3)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    moved = (prefix_of(model) != before).any(dim=1)
    assert moved.tolist() == [False] * frozen + [True] * (P - frozen)


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_numbers_are_counted_as_pefts(frozen: int) -> None:
    fields = {"num_virtual_tokens": P, "num_frozen_tokens": frozen, "task_type": CAUSAL_LM}
    theirs = peft.get_peft_model(base_model("llama", CAUSAL_LM), peft.CartridgeConfig(**fields))
    assert cartridge(num_frozen_tokens=frozen).get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_frozen_tokens_are_saved_and_go_on(tmp_path: Path) -> None:
    model = cartridge(num_frozen_tokens=2)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "softtune_config.json",
        "README.md",
    }
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == {"prompt_embeddings"}
    assert torch.equal(saved["prompt_embeddings"], prefix_of(model))
    loaded = PeftModel.from_pretrained(base_model("llama", CAUSAL_LM), tmp_path, is_trainable=True)
    assert torch.equal(prefix_of(loaded), prefix_of(model))
    assert trained(loaded)["prompt_encoder.default.trainable_embedding"].shape == (P - 2, 64)
    first, second = cartridge(num_frozen_tokens=2, seed=9), cartridge(num_frozen_tokens=2, seed=9)
    first.load_state_dict(model.state_dict())
    set_peft_model_state_dict(second, get_peft_model_state_dict(first, state_dict=model.state_dict()))
    for copied in (first, second, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(prefix_of(copied), prefix_of(model))


# Rows and serving


def test_rows_of_cartridges_beside_other_methods() -> None:
    model = cartridge(num_frozen_tokens=2)
    model.add_adapter("short", CartridgeConfig(num_virtual_tokens=2, num_frozen_tokens=2, task_type=CAUSAL_LM))
    for method in ("prefix", "prompt", "infix", "bitfit_added"):
        model.add_adapter(method, METHODS[method](task_type=CAUSAL_LM))
        model.set_adapter(method)
        scramble(model, seed=3)
    names = ["default", "prompt", "short", "__base__", "bitfit_added", "prefix", "infix"]
    rows = texts("llama", CAUSAL_LM, (7, 4, 2, 5, 3, 6, 4))
    for side in ("right", "left"):
        inputs = batch(rows, side)
        logits = model(**inputs, adapter_names=names).logits
        for name, row, found, mask in zip(names, rows, logits, inputs["attention_mask"].bool(), strict=True):
            alone = model(row[None], adapter_names=[name]).logits[0]
            torch.testing.assert_close(found[mask], alone, atol=1e-5, rtol=1e-5)


def test_the_embedded_engine_writes_what_generate_writes(tmp_path: Path) -> None:
    llama = save_models(tmp_path / "models", attention_dropout=0.0)["llama"]
    for seed, frozen in enumerate((0, 1, 4)):
        config = CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=frozen, task_type=CAUSAL_LM)
        save_adapter(llama, tmp_path / "adapters" / f"frozen{frozen}", config, seed)
    (tmp_path / "spool").mkdir()
    served = Served(llama, tmp_path / "adapters", tmp_path / "spool")
    asked = [(name, text) for name in served.names for text in ("the sky is blue", "red")]
    jobs = [served.write(name, text, max_tokens=7)[0] for name, text in asked]
    served.finish()
    written = [job.output_ids for job in jobs]
    assert written == [served.expected(name, text, 7) for name, text in asked]
    assert len({tuple(ids) for ids in written}) > 2


# Composition


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Cartridges of 5, 3 and 4 virtual tokens on one base model."""
    paths = []
    for number, (length, frozen) in enumerate(((5, 2), (3, 0), (4, 1))):
        paths.append(tmp_path / f"part{number}")
        cartridge(seed=number, num_virtual_tokens=length, num_frozen_tokens=frozen).save_pretrained(paths[-1])
    return paths


def test_composed_cartridges_are_pefts(folders: list[Path], tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    compose_cartridge_adapters(folders, output_path=ours)
    peft.compose_cartridge_adapters(folders, output_path=theirs)
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    configs = [peft.PeftConfig.from_pretrained(str(folder)) for folder in (ours, theirs)]
    assert dataclasses.replace(configs[0], peft_version=None) == dataclasses.replace(configs[1], peft_version=None)
    config = PeftConfig.from_pretrained(ours)
    assert isinstance(config, CartridgeConfig)
    assert isinstance(config, peft.CartridgeConfig)
    assert (config.num_virtual_tokens, config.num_frozen_tokens) == (12, 2)
    for folder in (ours, theirs):
        model = PeftModel.from_pretrained(base_model("llama", CAUSAL_LM), folder)
        flat = torch.cat([load_file(part / "adapter_model.safetensors")["prompt_embeddings"] for part in folders])
        assert torch.equal(prefix_of(model), flat)
        row = texts("llama", CAUSAL_LM)[0]
        torch.testing.assert_close(model(row[None]).logits[0], through_cache("llama", flat, row), atol=1e-5, rtol=1e-5)


def test_cartridges_of_pefts_compose(tmp_path: Path) -> None:
    for number in (2, 3):
        config = peft.CartridgeConfig(num_virtual_tokens=number, task_type=CAUSAL_LM)
        peft.get_peft_model(base_model("llama", CAUSAL_LM), config).save_pretrained(str(tmp_path / str(number)))
    with pytest.warns(UserWarning, match="saved as safetensors too"):
        compose_cartridge_adapters(
            [tmp_path / "2", str(tmp_path / "3")], output_path=tmp_path / "both", safe_serialization=False
        )
    pickled = torch.load(tmp_path / "both" / "adapter_model.bin")
    torch.testing.assert_close(pickled, load_file(tmp_path / "both" / "adapter_model.safetensors"), rtol=0, atol=0)
    assert prefix_of(PeftModel.from_pretrained(base_model("llama", CAUSAL_LM), tmp_path / "both")).shape == (5, 64)


def test_cartridges_for_three_sites_compose(tmp_path: Path) -> None:
    parts = [cartridge("t5", SEQ_2_SEQ_LM, seed) for seed in (1, 2)]
    for number, part in enumerate(parts):
        part.save_pretrained(tmp_path / str(number))
    compose_cartridge_adapters([tmp_path / "0", tmp_path / "1"], output_path=tmp_path / "both")
    model = PeftModel.from_pretrained(base_model("t5", SEQ_2_SEQ_LM), tmp_path / "both")
    assert torch.equal(prefix_of(model), torch.cat([prefix_of(part) for part in parts]))


def test_what_cannot_be_composed(folders: list[Path], tmp_path: Path) -> None:
    def save(name: str, model: PeftModel) -> Path:
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    other_base = get_peft_model(base_model("llama", CAUSAL_LM, seed=5), CartridgeConfig(task_type=CAUSAL_LM))
    wide = get_peft_model(base_model("llama", CAUSAL_LM, num_key_value_heads=3), CartridgeConfig(task_type=CAUSAL_LM))
    late = cartridge(layers="last:1")
    lone = save("lone", wide)
    (lone / "softtune_config.json").unlink()
    cases: list[tuple[list[Path], type[Exception], str]] = [
        (folders[:1], AdapterError, "1 cartridges cannot be composed: name at least two"),
        ([], AdapterError, "0 cartridges"),
        ([folders[0], save("prefix", adapted("llama", CAUSAL_LM, "prefix"))], AdapterError, "PREFIX_TUNING: name cart"),
        ([folders[0], save("other", other_base)], AdapterMismatchError, "different base models, with other word embed"),
        ([folders[0], lone], AdapterMismatchError, "differ in token_dim: 16 and 24"),
        ([folders[0], save("late", late)], AdapterMismatchError, "differ in layers: None and 'last:1'"),
        ([save("head", cartridge("bert", SEQ_CLS))] * 2, AdapterError, "heads cannot be composed"),
        ([folders[0], tmp_path / "nowhere"], CheckpointError, "nowhere"),
    ]
    for paths, error, message in cases:
        with pytest.raises(error, match=message) as refusal:
            compose_cartridge_adapters(paths, output_path=tmp_path / "out")
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "out").exists()


def test_prompts_are_composed_in_memory(folders: list[Path]) -> None:
    models = [PeftModel.from_pretrained(base_model("llama", CAUSAL_LM), folder) for folder in folders]
    prompts = [model.adapter("default").module.prompt() for model in models]
    whole = composed(prompts)
    assert whole.num_virtual_tokens == 12
    flat = torch.cat([prefix_of(model) for model in models])
    expected = CartridgeConfig(num_virtual_tokens=12).build(models[0].backbone)
    expected.load_prompt_embeddings(flat)
    for place, pair in expected.prompt().prefixes.items():
        assert torch.equal(whole.prefixes[place].key, pair.key)
        assert torch.equal(whole.prefixes[place].value, pair.value)
    assert composed(prompts[:1]).prefixes.keys() == whole.prefixes.keys()


def test_prompts_that_cannot_be_composed() -> None:
    place = next(iter(cartridge().adapter("default").module.prompt().prefixes))
    pair = KeyValue(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    plain = Prompt(num_virtual_tokens=3, prefixes={place: pair})
    for prompts in ([], [plain, Prompt(num_virtual_tokens=3, vectors=torch.zeros(3, 8))], [Prompt()]):
        with pytest.raises(AdapterError, match="only prefixes in front of the text"):
            composed(prompts)
    wider = KeyValue(torch.zeros(4, 3, 4), torch.zeros(4, 3, 4))
    for other in (
        dataclasses.replace(plain, shifts_positions=False),
        dataclasses.replace(plain, prefixes={place: wider}),
        dataclasses.replace(plain, prefixes={(place[0], 7): pair}),
    ):
        with pytest.raises(AdapterMismatchError, match="different layers or positions"):
            composed([plain, other])


def test_without_frozen_tokens_it_is_a_prefix() -> None:
    model = cartridge(num_frozen_tokens=0)
    prefix = get_peft_model(base_model("llama", CAUSAL_LM), PrefixTuningConfig(num_virtual_tokens=P))
    prefix.prompt_encoder["default"].start_from(prefix_of(model))
    inputs = batch(texts("llama", CAUSAL_LM))
    assert torch.equal(model(**inputs).logits, prefix.eval()(**inputs).logits)


def test_a_folder_without_tensors_cannot_be_composed(tmp_path: Path) -> None:
    for name in ("full", "empty"):
        cartridge().save_pretrained(tmp_path / name)
    save_file({}, tmp_path / "empty" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="empty holds no prefix: restore the folder from a good copy"):
        compose_cartridge_adapters([tmp_path / "full", tmp_path / "empty"], output_path=tmp_path / "out")
