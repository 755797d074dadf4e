"""Adapters beside one another, and in training loops of any kind, leave no trace in one another or the base model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from softtune import (
    AdapterError,
    AdapterMismatchError,
    BitFitConfig,
    ConfigError,
    DataError,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    UnsupportedModelError,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from softtune.compat import cache_of, enable_checkpointing
from tests.families import CAUSAL_LM, SEQ_CLS, adapted, base_model, batch, scramble, texts


def test_a_prefix_beside_trained_biases_starts_from_the_frozen_model() -> None:
    config = PrefixTuningConfig(num_virtual_tokens=3, init_weights="vocabulary")
    starts = []
    for method in ("prefix", "bitfit"):
        model = adapted("gpt2", CAUSAL_LM, method)
        torch.manual_seed(0)
        model.add_adapter("new", config)
        starts.append(model.get_prompt_embedding_to_save("new"))
    torch.testing.assert_close(*starts, rtol=0, atol=0)


def test_a_copied_module_is_the_base_models_own() -> None:
    model = get_peft_model(base_model("bert", SEQ_CLS), BitFitConfig(task_type=SEQ_CLS))
    scramble(model)
    enable_checkpointing(model, use_reentrant=False)
    inputs = batch(texts("bert", SEQ_CLS))
    model.train()(**inputs).logits.sum().backward()
    model.add_adapter("new", PrefixTuningConfig(num_virtual_tokens=2, modules_to_save=["pooler"], task_type=SEQ_CLS))
    pooler = model.adapter("new").heads["bert.pooler"]
    assert not any(m._forward_hooks for m in pooler.modules())


@pytest.mark.parametrize("method", ["bitfit", "prefix", "p_tuning_lstm"])
def test_a_copy_of_the_whole_model_is_its_own(method: str) -> None:
    model, inputs = adapted("gpt2", CAUSAL_LM, method), batch(texts("gpt2", CAUSAL_LM))
    before = model(**inputs).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**inputs).logits, before)
    scramble(copied, 9)
    assert (copied(**inputs).logits - before).abs().max() > 1e-3
    assert torch.equal(model(**inputs).logits, before)
    copied(**inputs).logits.sum().backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["bitfit", "prefix"])
def test_the_base_model_is_clean_between_calls(method: str) -> None:
    base, inputs = base_model("gpt2", CAUSAL_LM), batch(texts("gpt2", CAUSAL_LM))
    expected = base(**inputs).logits
    model = adapted("gpt2", CAUSAL_LM, method)
    enable_checkpointing(model, use_reentrant=False)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert torch.equal(model.eval().get_base_model()(**inputs).logits, expected)


def test_trained_modules_inside_layers_under_checkpointing() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = get_peft_model(
            base_model("llama", CAUSAL_LM), PrefixTuningConfig(num_virtual_tokens=2, modules_to_save=["mlp"])
        )
        scramble(model)
        if checkpointed:
            enable_checkpointing(model, use_reentrant=False)
        inputs = batch(texts("llama", CAUSAL_LM))
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(g is not None for g in gradients[0].values())
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_what_is_saved_in_training_is_without_dropout(tmp_path: Path) -> None:
    config = PromptEncoderConfig(
        num_virtual_tokens=4, encoder_reparameterization_type="LSTM", encoder_dropout=0.5, task_type=CAUSAL_LM
    )
    model = scramble(get_peft_model(base_model("gpt2", CAUSAL_LM), config))
    ids = torch.tensor([[5, 6, 7]])
    expected = model.eval()(ids).logits
    model.train()
    state = torch.get_rng_state()
    model.save_pretrained(tmp_path)
    assert model.training
    assert model.prompt_encoder["default"].training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM), tmp_path)(ids).logits, expected)


def test_options_of_other_libraries_calls(tmp_path: Path) -> None:
    model, other = adapted("gpt2", CAUSAL_LM, "prefix"), adapted("gpt2", CAUSAL_LM, "prefix", seed=5)
    # As push_to_hub of transformers and save_model of accelerate call it.
    model.save_pretrained(tmp_path, max_shard_size="5GB", save_function=torch.save, state_dict=other.state_dict())
    loaded = PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(get_peft_model_state_dict(loaded), get_peft_model_state_dict(other), rtol=0, atol=0)
    model.save_pretrained(tmp_path, save_embedding_layers="auto")
    with pytest.raises(ConfigError, match="save_embedding_layers=True"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ConfigError, match="ephemeral_gpu_offload=True"):
        model.load_adapter(tmp_path, "other", ephemeral_gpu_offload=True)


def test_trained_modules_act_on_virtual_tokens_that_run_ahead() -> None:
    config = PromptTuningConfig(num_virtual_tokens=3, modules_to_save=["ln_1"], task_type=CAUSAL_LM)
    model = scramble(get_peft_model(base_model("gpt2", CAUSAL_LM), config)).eval()
    ids = torch.tensor([[5, 6, 7]])
    among = model(ids, prompt_positions=torch.zeros(1, 3, dtype=torch.long)).logits
    torch.testing.assert_close(model(ids).logits, among, atol=1e-5, rtol=1e-5)
    whole = get_peft_model(base_model("gpt2", CAUSAL_LM), PrefixTuningConfig(modules_to_save=["attn"]))
    with pytest.raises(UnsupportedModelError, match="modules_to_save"):
        whole(ids)


def test_a_refused_load_changes_nothing(tmp_path: Path) -> None:
    model = adapted("bert", SEQ_CLS, "prefix")
    inputs = batch(texts("bert", SEQ_CLS))
    before = model(**inputs).logits
    longer = get_peft_model(base_model("bert", SEQ_CLS), PrefixTuningConfig(num_virtual_tokens=9, task_type=SEQ_CLS))
    longer.save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatchError, match="num_virtual_tokens = 9"):
        model.load_adapter(tmp_path, "default")
    with pytest.raises(AdapterMismatchError, match="shape"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(longer))
    assert torch.equal(model(**inputs).logits, before)


def test_adapters_come_and_go_while_none_acts() -> None:
    model, ids = adapted("gpt2", CAUSAL_LM, "prefix"), torch.tensor([[5, 6, 7]])
    model.add_adapter("b", PrefixTuningConfig(num_virtual_tokens=2))
    model.set_requires_grad("b")
    with model.disable_adapter():
        model.add_adapter("c", PrefixTuningConfig(num_virtual_tokens=2))
        model.delete_adapter("default")
    assert model.active_adapter == "b"
    assert all(p.requires_grad for p in model.prompt_encoder["b"].parameters())
    assert not any(p.requires_grad for p in model.prompt_encoder["c"].parameters())
    model(ids)


def test_places_out_of_order_are_refused() -> None:
    model = get_peft_model(base_model("gpt2", CAUSAL_LM), PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(DataError, match="ascend"):
        model(torch.tensor([[5, 6, 7]]), prompt_positions=torch.tensor([[3, 1]]))


def test_a_cache_of_states_belongs_to_its_adapter() -> None:
    model, ids = adapted("mamba", CAUSAL_LM, "prompt"), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        states = cache_of(model(ids, use_cache=True))
        with model.disable_adapter(), pytest.raises(AdapterError, match="computed with default"):
            model(ids[:, :1], cache=states)
