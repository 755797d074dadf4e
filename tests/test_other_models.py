"""Models with ways of their own, which are no rows of FAMILIES: each a tiny random one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from softtune import PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from softtune.errors import AdapterError, DataError, UnsupportedModelError
from tests.families import (
    BART,
    CAUSAL_LM,
    LLAMA,
    METHODS,
    PAD,
    SEQ_2_SEQ_LM,
    VOCABULARY,
    P,
    base_model,
    batch,
    labels_for,
    scramble,
    texts,
    trained,
)

SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2}
GREEDY: dict[str, Any] = {
    "max_new_tokens": 3,
    "do_sample": False,
    "eos_token_id": None,
    "return_dict_in_generate": True,
    "output_logits": True,
}
VISION = {"hidden_size": 16, "intermediate_size": 16}


def made(name: str, config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def gemma3() -> PreTrainedModel:
    """Makes its masks above the stack, for pictures see all of themselves."""
    text = {**LLAMA, **SPECIAL, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
    vision = {**VISION, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return made("Gemma3ForConditionalGeneration", config)


def qwen_vl() -> PreTrainedModel:
    """Has positions in time, height and width beside those of the text."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**LLAMA, **SPECIAL, "rope_parameters": rope}, vision_config=vision
    )
    return made("Qwen2_5_VLForConditionalGeneration", config)


def stablelm() -> PreTrainedModel:
    """Says that its attention can be chosen, but calls no attention function."""
    return made("StableLmForCausalLM", transformers.StableLmConfig(**LLAMA, **SPECIAL))


def ctrl() -> PreTrainedModel:
    """Scales its input in place."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "dff": 40}
    return made("CTRLLMHeadModel", transformers.CTRLConfig(**sizes, resid_pdrop=0, embd_pdrop=0, **SPECIAL))


def openai_gpt() -> PreTrainedModel:
    """Has a position table by a name of its own."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    config = transformers.OpenAIGPTConfig(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **SPECIAL)
    return made("OpenAIGPTLMHeadModel", config)


def rwkv() -> PreTrainedModel:
    """Goes on from a list of states."""
    return made("RwkvForCausalLM", transformers.RwkvConfig(hidden_size=32, num_hidden_layers=2, **SPECIAL))


def recurrent_gemma() -> PreTrainedModel:
    """Keeps states to itself, which begin anew at position 0."""
    sizes = {**LLAMA, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8}
    return made("RecurrentGemmaForCausalLM", transformers.RecurrentGemmaConfig(**sizes, **SPECIAL))


def with_adapter(model: PreTrainedModel, method: str) -> PeftModel:
    return scramble(get_peft_model(model, METHODS[method](task_type=CAUSAL_LM))).eval()


def check_padding(model: PeftModel) -> None:
    """Each row's logits are those that it has alone, padded left or right."""
    rows = texts("gpt2", CAUSAL_LM)
    for side in ("left", "right"):
        inputs = batch(rows, side, width=9)
        logits = model(**inputs).logits
        for row, found, mask in zip(rows, logits, inputs["attention_mask"], strict=True):
            torch.testing.assert_close(found[mask != 0], model(row[None]).logits[0], atol=1e-4, rtol=1e-3)


def check_generation(model: PeftModel) -> None:
    """Each row goes on as it does alone, with a cache and without."""
    rows = texts("gpt2", CAUSAL_LM)
    expected = torch.cat([logits(model, input_ids=row[None]) for row in rows], dim=1)
    for use_cache in (True, False):
        found = logits(model, **batch(rows, "left"), use_cache=use_cache)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def logits(model: PeftModel, **inputs: Any) -> Tensor:
    """[3, B, vocabulary] of the tokens that are generated."""
    return torch.stack(model.generate(**inputs, **GREEDY).logits)


@torch.no_grad()
@pytest.mark.parametrize("method", ["prefix", "prompt", "bitfit_added"])
@pytest.mark.parametrize("make", [gemma3, qwen_vl, stablelm], ids=lambda make: make.__name__)
def test_padding_and_caches_make_no_difference(make: Any, method: str) -> None:
    model = with_adapter(make(), method)
    check_padding(model)
    check_generation(model)
    with model.disable_adapter():
        base = model(texts("gpt2", CAUSAL_LM)[0][None]).logits
    assert (model(texts("gpt2", CAUSAL_LM)[0][None]).logits - base).abs().max() > 0.1


def test_gradients_of_a_model_that_makes_masks_above_its_layers() -> None:
    model, rows = with_adapter(gemma3(), "prefix").train(), texts("gpt2", CAUSAL_LM, (7, 4))
    gradients = []
    for side in ("left", "right"):
        model.zero_grad()
        inputs = batch(rows, side)
        types = torch.zeros_like(inputs["input_ids"])
        model(**inputs, labels=labels_for(CAUSAL_LM, inputs), token_type_ids=types).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in trained(model).values()])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [gemma3, qwen_vl], ids=lambda make: make.__name__)
def test_no_place_for_virtual_tokens_among_the_words(make: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"among the words .*: .*PrefixTuningConfig"):
        with_adapter(make(), "prompt_suffix").generate(**batch(texts("gpt2", CAUSAL_LM), "left"), **GREEDY)


@torch.no_grad()
def test_a_model_that_scales_its_input_in_place_leaves_the_prompt_alone() -> None:
    model = with_adapter(ctrl(), "prompt")
    before = [parameter.clone() for parameter in trained(model).values()]
    check_padding(model)
    assert all(torch.equal(*pair) for pair in zip(before, trained(model).values(), strict=True))


@pytest.mark.parametrize("make", [openai_gpt, ctrl], ids=lambda make: make.__name__)
def test_position_tables_of_other_names(make: Any) -> None:
    model = with_adapter(make(), "prompt")
    model(torch.arange(3, 3 + 16 - P)[None])
    with pytest.raises(DataError, match="12 tokens and 5 virtual ones exceed the model's 16 positions"):
        model(torch.arange(3, 3 + 17 - P)[None])


@torch.no_grad()
def test_a_list_of_states() -> None:
    model, row = with_adapter(rwkv(), "prompt"), texts("gpt2", CAUSAL_LM)[0][None]
    first = model(row[:, :3], use_cache=True)
    with model.disable_adapter(), pytest.raises(AdapterError, match="computed with default, not the base model"):
        model(row[:, 3:], state=first.state)
    following = model(row[:, 3:], state=first.state).logits
    torch.testing.assert_close(following, model(row).logits[:, 3:], atol=1e-5, rtol=1e-4)
    assert len(model.generate(row, **GREEDY).logits) == 3


@torch.no_grad()
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_states_beside_the_cache(method: str) -> None:
    model, row = with_adapter(recurrent_gemma(), method), texts("gpt2", CAUSAL_LM)[0][None]
    with pytest.raises(UnsupportedModelError, match=r"keeps states beside its cache, .*: pass use_cache=False"):
        model.generate(row, **GREEDY)
    found = logits(model, input_ids=row, use_cache=False)
    torch.testing.assert_close(found[0], model(row).logits[:, -1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", ["prefix", "prompt", "bitfit_added"])
@pytest.mark.parametrize("name", ["T5EncoderModel", "UMT5EncoderModel", "UMT5ForTokenClassification"])
def test_an_encoder_that_is_half_of_an_encoder_decoder(name: str, method: str) -> None:
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    config = getattr(transformers, f"{name[: name.index('5') + 1]}Config")(**sizes, **SPECIAL)
    model = scramble(get_peft_model(made(name, config), METHODS[method]())).eval()
    rows = texts("gpt2", CAUSAL_LM)
    inputs = batch(rows)
    for row, found, mask in zip(rows, model(**inputs)[0], inputs["attention_mask"], strict=True):
        torch.testing.assert_close(found[mask != 0], model(row[None])[0][0], atol=1e-5, rtol=1e-4)
    with model.disable_adapter():
        base = model(rows[0][None])[0]
    assert not torch.allclose(model(rows[0][None])[0], base, atol=1e-2)


def test_few_words() -> None:
    config = transformers.GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=2, bos_token_id=0, eos_token_id=1)
    for name in ("bitfit", "prefix", "prompt"):
        model = with_adapter(made("GPT2LMHeadModel", config), name)
        assert model(torch.tensor([[0, 1, 1]])).logits.shape == (1, 3, 2)


def layers_left_out(config: PeftConfig) -> PeftModel:
    """M2M100 as it comes: every layer is left out in one training step of twenty."""
    settings = {key: value for key, value in BART.items() if key != "forced_eos_token_id"}
    base = made("M2M100ForConditionalGeneration", transformers.M2M100Config(**settings, **SPECIAL))
    assert base.config.decoder_layerdrop == 0.05
    return scramble(get_peft_model(base, config)).train()


def test_training_where_layers_are_left_out_by_chance() -> None:
    model = layers_left_out(METHODS["prefix"](task_type=SEQ_2_SEQ_LM))
    ids = batch(texts("bart", SEQ_2_SEQ_LM))
    for _ in range(30):
        model(**ids, labels=ids["input_ids"]).loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in trained(model).values())


def test_a_prefix_that_reaches_no_layer_is_refused_where_layers_are_left_out() -> None:
    model = layers_left_out(METHODS["prefix"](task_type=SEQ_2_SEQ_LM)).eval()
    layer = model.get_base_model().get_decoder().layers[0]
    layer.self_attn = copy.deepcopy(layer.self_attn)
    ids = batch(texts("bart", SEQ_2_SEQ_LM))
    with pytest.raises(UnsupportedModelError, match="did not reach every layer"):
        model(**ids, decoder_input_ids=ids["input_ids"])


@torch.no_grad()
def test_virtual_tokens_go_through_the_layers_of_their_text() -> None:
    """Those that are left out are left out for both."""
    base, row = base_model("opt", CAUSAL_LM, layerdrop=0.5), texts("opt", CAUSAL_LM)[0][None]
    model = with_adapter(base, "prompt").train()
    words = base.get_input_embeddings()(row)
    prompt = model.adapter("default").module.prompt().vectors
    for seed in range(8):
        torch.manual_seed(seed)
        found = model(row).logits
        torch.manual_seed(seed)
        expected = base(inputs_embeds=torch.cat([prompt[None], words], dim=1)).logits[:, P:]
        torch.testing.assert_close(found, expected)


def test_opt_with_layers_left_out() -> None:
    model = with_adapter(base_model("opt", CAUSAL_LM, layerdrop=0.5), "prefix").train()
    inputs = batch(texts("opt", CAUSAL_LM))
    for _ in range(8):
        model(**inputs, labels=labels_for(CAUSAL_LM, inputs))


@torch.no_grad()
@pytest.mark.skipif(not hasattr(transformers, "DeepseekV32Config"), reason="this transformers has no DeepSeek V3.2")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_goes_by_the_name_of_its_attention_function(attention: str) -> None:
    """DeepSeek V3.2 leaves keys out under these two names, and attends to all of them under any other."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8, "head_dim": 8}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 2,
    }
    index = {"index_topk": 2, "index_n_heads": 2, "index_head_dim": 16}
    config = transformers.DeepseekV32Config(**sizes, **heads, **latent, **experts, **index, **SPECIAL)
    model, ids = made("DeepseekV32ForCausalLM", config), torch.arange(5, 17)[None]
    model.set_attn_implementation(attention)
    expected = model(ids, use_cache=False).logits
    PeftModel(model)
    assert torch.equal(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("method", ["prefix", "prompt", "bitfit_added"])
def test_a_model_that_reads_sound_is_refused_in_one_line(method: str) -> None:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 0}
    model = made("WhisperForConditionalGeneration", transformers.WhisperConfig(**sizes, **heads, **SPECIAL))
    with pytest.raises(UnsupportedModelError, match="has no one embedding of words: use a base model that reads text"):
        PeftModel(model, METHODS[method](task_type=SEQ_2_SEQ_LM))


def test_a_model_without_numbers_takes_a_prefix() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **SPECIAL))
    config = PrefixTuningConfig(task_type=CAUSAL_LM, init_weights="random")
    assert PeftModel(model, config).adapter("default").trained["embedding.weight"].is_meta
