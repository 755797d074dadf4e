"""Every public name of PEFT around prompts is here and does the same, or is left out for a reason that is said."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel as TheirModel
from transformers import DynamicCache

import softtune
from softtune import AdapterError, CheckpointError, ConfigError, DataError, PeftConfig, PeftModel, get_peft_model
from softtune.compat import cache_of
from softtune.options import WITHOUT_EFFECT
from tests.families import CAUSAL_LM, METHODS, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, P, adapted, base_model, scramble
from tests.tiny import tokenizer

IDS = torch.tensor([[5, 6, 7, 8]])
OTHER_METHODS = re.compile(
    r"(Ada|Arrow|BOFT|BdLo|C3A|Deft|Delora|Eva|FourierFT|Frod|Glora|Gralora|HRA|Hira|Kasa|LNT|Lily"
    r"|LoHa|LoKr|LoftQ|Lora|Miss|Montec|OFT|OSF|Peanut|Poly|Psoft|Pvera|RandLora|Road|Shadow|Shira|Supert"
    r"|TinyLora|Trainable|UniLora|VBLoRA|Vel|Vera|WaveFT|XLora|PeftMixed)|.*(lora|loftq|eva|arrow|kappa)"
)
"""Names of methods that are no prompts of this library, and of what belongs to them."""
LEFT_OUT = {
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": "prompts are not mixed into one adapter",
    "PEFT_TYPE_TO_TUNER_MAPPING": "prompts have no tuner: their modules are made by their configs",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING": "no cache is rearranged for a model family",
    "bloom_model_postprocess_past_key_value": "no cache is rearranged for a model family",
    "BeftModel": "a model with any adapter is a PeftModel",
    "IA3Model": "a model with any adapter is a PeftModel",
    "NoMatchingPeftModuleError": "a module that is not found is a ConfigError",
    "PeftError": "errors are softtune's: SofttuneError and those below it",
    "PeftWarning": "warnings are UserWarnings",
    "cast_mixed_precision_params": "adapters are fp32 beside a base model of any precision",
    "inject_adapter_in_model": "prompts are no layers that could be put into a model",
}
"""Names that PEFT has, and why softtune has none."""
RUNNING = ("forward", "generate", "prepare_inputs_for_generation")
"""Methods that take the base model's arguments."""
INNER = {"check_kwargs"}
"""What PEFT's configs call of themselves."""


def test_every_name_is_here_or_left_out_for_a_reason() -> None:
    missing = {name for name in peft.__all__ if not hasattr(softtune, name) and not OTHER_METHODS.match(name)}
    assert missing == set(LEFT_OUT)


@pytest.mark.parametrize(
    "name", [n for n in peft.__all__ if hasattr(softtune, n) and inspect.isfunction(getattr(peft, n))]
)
def test_functions_take_the_same_arguments(name: str) -> None:
    own, theirs = (inspect.signature(getattr(library, name)).parameters for library in (softtune, peft))
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values())
    assert takes_all or {*theirs} <= {*own}
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD and n in own]
    assert [n for n in own if n in positional] == positional


@pytest.mark.parametrize("theirs", [TheirModel, *(getattr(peft, c.__name__) for c in TheirModel.__subclasses__())])
def test_methods_and_attributes_of_models(theirs: type) -> None:
    own = getattr(softtune, theirs.__name__, PeftModel)
    names = [n for n in vars(theirs) if not n.startswith("_")]
    model = adapted("gpt2", CAUSAL_LM, "prefix")
    assert [n for n in names if not hasattr(own, n) and not hasattr(model, n)] == []
    for name in names:
        if not inspect.isfunction(vars(theirs)[name]) or name in (
            "forward",
            "generate",
            "prepare_inputs_for_generation",
        ):
            continue
        mine = inspect.signature(getattr(own, name)).parameters
        needed = [n for n, p in inspect.signature(vars(theirs)[name]).parameters.items() if p.kind is not p.VAR_KEYWORD]
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in mine.values())
        assert takes_all or {*needed} <= {*mine}, name


@pytest.mark.parametrize(
    "name",
    [
        "PromptTuningConfig",
        "PrefixTuningConfig",
        "PromptEncoderConfig",
        "CartridgeConfig",
        "AdaptionPromptConfig",
        "CPTConfig",
        "MultitaskPromptTuningConfig",
        "BeftConfig",
        "IA3Config",
    ],
)
def test_fields_and_methods_of_configs(name: str) -> None:
    own, theirs = getattr(softtune, name), getattr(peft, name)
    assert {f.name for f in dataclasses.fields(theirs)} <= {f.name for f in dataclasses.fields(own)}
    assert [n for n in dir(theirs) if not n.startswith("_") and not hasattr(own, n) and n not in INNER] == []


# Configs


def test_a_config_is_pefts_to_those_who_ask_by_class() -> None:
    config = softtune.PromptTuningConfig(num_virtual_tokens=P)
    assert isinstance(config, peft.PromptTuningConfig)
    assert isinstance(config, softtune.PromptTuningConfig)
    assert isinstance(softtune.PTuningV2Config(), peft.PrefixTuningConfig | peft.PromptLearningConfig)
    assert isinstance(softtune.BitFitConfig(), peft.PeftConfig)
    assert config != peft.PromptTuningConfig(num_virtual_tokens=P)
    again = dataclasses.replace(config, num_virtual_tokens=3)
    assert type(again) is softtune.PromptTuningConfig
    assert again == softtune.PromptTuningConfig(num_virtual_tokens=3)
    for duplicate in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), copy.copy(config)):
        assert type(duplicate) is softtune.PromptTuningConfig
        assert duplicate == config


@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning_mlp", "bitfit"])
def test_pefts_function_makes_softtunes_model_of_softtunes_config(method: str) -> None:
    """And never PEFT's own prompt by softtune's config."""
    config = METHODS[method](task_type=CAUSAL_LM)
    model = peft.get_peft_model(base_model("gpt2", CAUSAL_LM), config)
    assert issubclass(type(model), softtune.PeftModelForCausalLM)
    other = peft.PeftModelForCausalLM(base_model("gpt2", CAUSAL_LM), config, adapter_name="other")
    assert issubclass(type(other), PeftModel)
    assert list(other.peft_config) == ["other"]
    theirs = peft.get_peft_model(
        base_model("gpt2", CAUSAL_LM), peft.LoraConfig(task_type=CAUSAL_LM, fan_in_fan_out=True)
    )
    assert type(theirs) is peft.PeftModelForCausalLM


@pytest.mark.parametrize("config", [peft.PrefixTuningConfig(num_virtual_tokens=3), peft.LoraConfig()])
def test_a_config_of_pefts_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="is no config of softtune's: import it from softtune"):
        get_peft_model(base_model("gpt2", CAUSAL_LM), config)


def test_the_constructor_of_pefts_class_makes_softtunes_model_too() -> None:
    """In a process where nobody has looked at the config's class before."""
    code = (
        "import peft, softtune, transformers\n"
        "base = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=50))\n"
        "model = peft.PeftModelForCausalLM(base, softtune.PromptTuningConfig(task_type='CAUSAL_LM'))\n"
        "assert issubclass(type(model), softtune.PeftModel), type(model)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["save_pretrained", "load_adapter", "from_pretrained", "add_adapter", "set_adapter"])
def test_arguments_by_position_are_pefts(name: str) -> None:
    own, theirs = (inspect.signature(getattr(c, name)).parameters.values() for c in (PeftModel, TheirModel))
    positional = [[p.name for p in some if p.kind is p.POSITIONAL_OR_KEYWORD] for some in (own, theirs)]
    known = [n for n in positional[1] if n in positional[0]]
    assert positional[0] == positional[1][: len(positional[0])]
    assert {*positional[1]} - {*known} <= {*WITHOUT_EFFECT}


def test_configs_are_the_same_with_peft_and_without() -> None:
    one, other = softtune.PrefixTuningConfig(), softtune.PrefixTuningConfig(peft_version="0.3.0")
    assert one == other
    assert type(softtune.get_peft_config({"peft_type": "PREFIX_TUNING"})) is softtune.PrefixTuningConfig


def test_unknown_keys_of_a_saved_config_are_left_out_with_a_warning(tmp_path: Path) -> None:
    content = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "from_the_future": 1, "runtime_config": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    said = r"Unexpected keyword arguments \['from_the_future'\] for class PrefixTuningConfig, these are ignored\."
    with pytest.warns(UserWarning, match="a runtime_config, which is ignored"), pytest.warns(UserWarning, match=said):
        config = PeftConfig.from_pretrained(tmp_path)
    assert config == softtune.PrefixTuningConfig(num_virtual_tokens=3)
    assert PeftConfig.from_peft_type(peft_type="P_TUNING", num_virtual_tokens=4).num_virtual_tokens == 4
    assert softtune.PromptTuningConfig.from_peft_type(num_virtual_tokens=4).num_virtual_tokens == 4


# Models


@pytest.mark.parametrize("method", ["prompt", "prefix", "bitfit"])
def test_without_its_last_adapter_a_model_is_the_base_model(method: str) -> None:
    model = adapted("gpt2", CAUSAL_LM, method)
    expected = base_model("gpt2", CAUSAL_LM)(IDS).logits
    model.delete_adapter("default")
    assert (model.active_adapters, model.peft_config) == ([], {})
    assert model.peft_type is None
    with pytest.raises(AdapterError, match="no adapter is named ''"):
        _ = model.active_peft_config
    assert not model.has_active_enabled_adapter
    assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model.generate(IDS, max_new_tokens=2, do_sample=False)[:, :4], IDS)
    with pytest.raises(AdapterError, match="no adapter to save"):
        model.save_pretrained("nowhere")
    model.add_adapter("again", METHODS[method](task_type=CAUSAL_LM))
    assert model.active_adapter == "again"


def test_a_config_that_is_given_to_load_becomes_the_models_own(tmp_path: Path) -> None:
    adapted("gpt2", CAUSAL_LM, "prompt").save_pretrained(tmp_path)
    config = METHODS["prompt"](task_type=CAUSAL_LM)
    model = PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM), tmp_path, config=config)
    assert model.peft_config["default"] is config
    assert config.inference_mode
    assert config.token_dim == model.config.n_embd


def test_one_config_for_two_adapters(tmp_path: Path) -> None:
    adapted("gpt2", CAUSAL_LM, "prompt").save_pretrained(tmp_path)
    config = METHODS["prompt"](task_type=CAUSAL_LM)
    model = PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM), tmp_path, "frozen", config=config)
    model.load_adapter(tmp_path, "new", is_trainable=True, config=config)
    model.set_adapter("frozen")
    assert not any(p.requires_grad for p in model.prompt_encoder["frozen"].parameters())
    model.set_adapter("new")
    assert all(p.requires_grad for p in model.prompt_encoder["new"].parameters())


def test_loading_has_pefts_result_and_a_second_adapter_can_be_trained(tmp_path: Path) -> None:
    model = adapted("gpt2", CAUSAL_LM, "prefix")
    model.save_pretrained(tmp_path)
    found = model.load_adapter(tmp_path, "second", is_trainable=True)
    assert (list(found.missing_keys), list(found.unexpected_keys)) == ([], [])
    assert all(p.requires_grad for p in model.prompt_encoder["second"].parameters())
    model.load_adapter(tmp_path, "third")
    assert not any(p.requires_grad for p in model.prompt_encoder["third"].parameters())


@pytest.mark.parametrize(
    "option",
    [
        {"low_cpu_mem_usage": True},
        {"torch_device": "cpu"},
        {"device_map": "auto"},
        {"max_memory": {"cpu": "1GB"}},
        {"offload_folder": "folder"},
        {"torch_dtype": torch.bfloat16},
        {"autocast_adapter_dtype": False},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_of_pefts_loading(option: dict[str, Any], tmp_path: Path) -> None:
    model = adapted("gpt2", CAUSAL_LM, "prompt")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM), tmp_path, **option)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_weights_are_safetensors_even_if_others_are_asked_for(tmp_path: Path) -> None:
    model, pickled = adapted("gpt2", CAUSAL_LM, "prompt"), tmp_path / "adapter_model.bin"
    with pytest.warns(UserWarning, match="saved as safetensors too"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    torch.testing.assert_close(torch.load(pickled), softtune.load_peft_weights(tmp_path), rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not pickled.exists()


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_pickled_weights_are_read_where_the_caller_asks_by_name(method: str, tmp_path: Path) -> None:
    """PEFT's, in fact: they are tensors alone."""
    theirs = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[method]
    model = peft.get_peft_model(base_model("gpt2", CAUSAL_LM), theirs(task_type=CAUSAL_LM, num_virtual_tokens=P))
    model.save_pretrained(str(tmp_path), safe_serialization=False)
    with pytest.raises(CheckpointError, match=r"softtune import FOLDER NEW, or load them by allow_pickle=True"):
        PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM), tmp_path)
    own = PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM), tmp_path, allow_pickle=True)
    expected = peft.get_peft_model_state_dict(model)["prompt_embeddings"]
    assert torch.equal(own.get_prompt_embedding_to_save("default"), expected)
    assert torch.equal(softtune.load_peft_weights(tmp_path, allow_pickle=True)["prompt_embeddings"], expected)


@pytest.mark.parametrize("content", [{"prompt_embeddings": [1.0]}, [torch.zeros(2)], {"a": Path("b")}])
def test_pickled_files_of_anything_else_are_refused(content: Any, tmp_path: Path) -> None:
    METHODS["prompt"](task_type=CAUSAL_LM).save_pretrained(tmp_path)
    torch.save(content, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin (is damaged or )?holds"):
        PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM), tmp_path, allow_pickle=True)


def test_what_prompt_an_adapter_has() -> None:
    vectors = adapted("gpt2", CAUSAL_LM, "prompt")
    assert torch.equal(vectors.get_prompt(2)[1], vectors.get_prompt_embedding_to_save("default"))
    prefix = adapted("llama", CAUSAL_LM, "prefix")
    cache = prefix.get_prompt(batch_size=2)
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == P
    assert len(cache.layers) == prefix.config.num_hidden_layers
    placed = torch.arange(P, P + IDS.shape[1])[None].expand(2, -1)
    found = prefix.get_base_model()(IDS.expand(2, -1), position_ids=placed, cache=cache) if _has_cache() else None
    if found is not None:
        torch.testing.assert_close(found.logits[1:], prefix(IDS).logits, atol=1e-5, rtol=1e-4)
    for family, task, method in (("t5", SEQ_2_SEQ_LM, "prefix"), ("gpt2", CAUSAL_LM, "bitfit")):
        with pytest.raises(AdapterError, match="get_prompt_embedding_to_save"):
            adapted(family, task, method).get_prompt(1)


def _has_cache() -> bool:
    return "cache" in inspect.signature(type(base_model("llama", CAUSAL_LM)).forward).parameters


def test_a_prompt_has_the_base_models_precision() -> None:
    model = adapted("llama", CAUSAL_LM, "prefix")
    model.get_base_model().bfloat16()
    assert model.get_prompt(1).layers[0].keys.dtype == torch.bfloat16


def test_what_an_adapter_says_of_itself() -> None:
    model = adapted("gpt2", CAUSAL_LM, "prompt")
    assert model.peft_type == peft.PeftType.PROMPT_TUNING
    assert model.word_embeddings is model.get_base_model().get_input_embeddings()
    assert model.prompt_tokens["default"].tolist() == list(range(P))
    assert model.base_model_torch_dtype == torch.float32
    assert model.modules_to_save is None
    assert not model.supports_lora_conversion()
    for ask in (model.get_layer_status, model.get_model_status, lambda: softtune.get_layer_status(model)):
        with pytest.raises(TypeError, match="soft prompts are no layers"):
            ask()


def test_the_base_models_own_numbers_are_read_and_set() -> None:
    model, other = adapted("gpt2", CAUSAL_LM, "prefix"), base_model("gpt2", CAUSAL_LM, seed=3)
    found = softtune.get_base_model_state_dict(model)
    assert found.keys() == other.state_dict().keys()
    softtune.set_base_model_state_dict(model, other.state_dict())
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, other(IDS).logits)


def test_a_model_is_prepared_for_few_bits() -> None:
    base = softtune.prepare_model_for_kbit_training(base_model("llama", CAUSAL_LM).bfloat16())
    assert {p.dtype for p in base.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in base.parameters())
    model = scramble(get_peft_model(base, METHODS["prefix"](task_type=CAUSAL_LM)))
    model.prepare_model_for_gradient_checkpointing(base)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_a_compiled_models_state() -> None:
    model = adapted("gpt2", CAUSAL_LM, "prompt")
    found = softtune.get_peft_model_state_dict(torch.compile(model), unwrap_compiled=True)
    torch.testing.assert_close(found, softtune.get_peft_model_state_dict(model))


def test_labels_as_a_decoder_reads_them() -> None:
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    found = softtune.shift_tokens_right(labels, 1, 2)
    assert torch.equal(found, torch.tensor([[2, 5, 6], [2, 7, 1]]))
    theirs = peft.utils.shift_tokens_right(labels, 1, 2)
    assert torch.equal(found, theirs)


def test_a_model_card_is_written(tmp_path: Path) -> None:
    adapted("gpt2", CAUSAL_LM, "prompt").create_or_update_model_card(tmp_path)
    assert "PROMPT_TUNING adapter" in (tmp_path / "README.md").read_text()


# A prefix from a text


@pytest.mark.parametrize("method", ["prefix", "cartridge"])
def test_a_prefix_starts_from_a_cache_as_in_peft(method: str) -> None:
    model = get_peft_model(base_model("llama", CAUSAL_LM), METHODS[method](task_type=CAUSAL_LM))
    ids = torch.randint(3, 50, (1, P + 4), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model.get_base_model()(ids, use_cache=True)
    cache = cache_of(whole)
    flat = softtune.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=P)
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    assert torch.equal(flat, peft.prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=P))
    assert torch.equal(softtune.initialize_kv_prefix_from_past_key_values(model, past_key_values=pairs), flat)
    assert torch.equal(model.get_prompt_embedding_to_save("default"), flat)
    torch.testing.assert_close(model.eval()(ids[:, P:]).logits, whole.logits[:, P:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "method"), [("llama", "prefix"), ("mistral", "prefix"), ("llama", "cartridge")])
def test_a_prefix_starts_from_the_first_tokens_of_a_text(family: str, method: str) -> None:
    """Mistral's layers keep the last ones alone."""
    model = get_peft_model(base_model(family, CAUSAL_LM), METHODS[method](task_type=CAUSAL_LM)).train()
    words = tokenizer(ends=False)
    text = "the sky is blue and red and good text : label :"
    flat = softtune.initialize_kv_prefix_from_text(model, words, text=text)
    ids = words(text, return_tensors="pt")["input_ids"][:, :P]
    with torch.no_grad():
        cache = cache_of(base_model(family, CAUSAL_LM)(ids, use_cache=True))
    assert torch.equal(flat, softtune.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=P))
    assert torch.equal(model.get_prompt_embedding_to_save("default"), flat)
    with pytest.raises(DataError, match="give one row of at least"):
        softtune.initialize_kv_prefix_from_text(model, words, text="red")


def test_caches_and_adapters_that_do_not_fit() -> None:
    model = get_peft_model(base_model("llama", CAUSAL_LM), METHODS["prefix"](task_type=CAUSAL_LM))
    start = softtune.initialize_kv_prefix_from_past_key_values
    part = torch.zeros(1, 2, P, 8)
    for cache, message in (
        ([], "no keys and values"),
        ([(part[0], part[0])], "no keys and values"),
        ([(part[:, :, :2], part[:, :, :2])], f"1 rows of 2 tokens: give one row of at least {P}"),
        ([(part.expand(2, -1, -1, -1), part)], "2 rows"),
        ([(part, part)] * 9, "the prefix has"),
    ):
        with pytest.raises(DataError, match=message):
            start(model, past_key_values=cache)
    for method in ("prompt", "prefix_projection", "bitfit_added"):
        other = get_peft_model(base_model("llama", CAUSAL_LM), METHODS[method](task_type=CAUSAL_LM))
        with pytest.raises(AdapterError, match="is no plain prefix"):
            start(other, past_key_values=[(part, part)])


def test_no_name_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in softtune.__all__:
            getattr(softtune, name)


@pytest.mark.parametrize("task", [SEQ_CLS, TOKEN_CLS])
def test_heads_are_among_the_modules_to_save(task: str) -> None:
    model = adapted("bert", task, "prefix")
    assert model.modules_to_save is None or "classifier" in model.modules_to_save


@pytest.mark.parametrize("call", ["get_prompt", "get_prompt_embedding_to_save"])
def test_no_tensor_holds_the_prompt_of_a_combined_adapter(call: str) -> None:
    model = adapted("llama", CAUSAL_LM, "combined")
    argument = 2 if call == "get_prompt" else "default"
    with pytest.raises(AdapterError, match=r"'default' combines methods, .*: read get_peft_model_state_dict instead"):
        getattr(model, call)(argument)
