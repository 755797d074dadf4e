"""Base models that read more than words: pictures go through as they are, and prompts act on the text around them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from softtune import BitFitConfig, UnsupportedModelError, get_peft_model
from softtune.promises import OUTPUTS
from tests.families import CAUSAL_LM, METHODS, SEQ_2_SEQ_LM, scramble
from tests.test_other_models import made

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {
    **SIZES,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {**SIZES, "image_size": 16}
PICTURE = 96
"""The id that stands for a piece of a picture."""
PIXELS = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
Call = dict[str, Tensor]


def row(words: list[int], pads: int = 0) -> Call:
    ids = torch.tensor([[0] * pads + words])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def blip2() -> PreTrainedModel:
    """Runs the layers of its language model by themselves, past the module around them."""
    text = {k: v for k, v in TEXT.items() if k != "intermediate_size"}
    opt = {**text, "model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 48}
    former = {**SIZES, "encoder_hidden_size": 32, "vocab_size": 97}
    config = transformers.Blip2Config(
        vision_config={**TOWER, "patch_size": 8},
        text_config=opt,
        qformer_config=former,
        num_query_tokens=4,
        image_token_index=PICTURE,
    )
    return made("Blip2ForConditionalGeneration", config)


def paligemma() -> PreTrainedModel:
    """Counts positions by columns, from 1, above its layers."""
    tower = transformers.SiglipVisionConfig(**TOWER, patch_size=8, projection_dim=32, vision_use_head=False)
    text = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "model_type": "gemma"}
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=tower.to_dict(), projection_dim=32, image_token_index=PICTURE
    )
    return made("PaliGemmaForConditionalGeneration", config)


def fuyu() -> PreTrainedModel:
    """Counts positions by columns, above its layers."""
    text = {**TEXT, "model_type": "persimmon"}
    return made("FuyuForCausalLM", transformers.FuyuConfig(text_config=text, **TEXT, image_size=16, patch_size=4))


def gemma3() -> PreTrainedModel:
    text = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
    tower = transformers.SiglipVisionConfig(**TOWER, patch_size=4)
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=tower.to_dict(),
        mm_tokens_per_image=4,
        image_token_index=PICTURE,
        boi_token_index=94,
        eoi_token_index=93,
    )
    return made("Gemma3ForConditionalGeneration", config)


def llava() -> PreTrainedModel:
    tower = transformers.CLIPVisionConfig(**TOWER, patch_size=8)
    text = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=PICTURE, vision_feature_select_strategy="default"
    )
    return made("LlavaForConditionalGeneration", config)


def qwen_vl() -> PreTrainedModel:
    """Has positions in time, height and width."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    tower = {"hidden_size": 32, "depth": 2, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32}
    pieces = {"patch_size": 4, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1]}
    tokens = {"vision_start_token_id": 95, "vision_end_token_id": 94, "video_token_id": 93}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={**tower, **pieces},
        image_token_id=PICTURE,
        **tokens,
    )
    return made("Qwen2_5_VLForConditionalGeneration", config)


def of_qwen_vl(words: list[int], pads: int = 0) -> Call:
    call = row([5, 95, *[PICTURE] * 4, 94, 11, 12], pads)
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(3))
    types = (call["input_ids"] == PICTURE).long()
    return {**call, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": types}


def mllama() -> PreTrainedModel:
    """Some of its layers attend to pictures."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    sizes = {**TEXT, "num_hidden_layers": 4, "num_key_value_heads": 2}
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4}
    pieces = {"image_size": 16, "patch_size": 8, "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}
    outputs = {"intermediate_size": 48, "vision_output_dim": 64, "intermediate_layers_indices": [0]}
    config = transformers.MllamaConfig(
        text_config={**sizes, "cross_attention_layers": [1, 3], "rope_parameters": rope},
        vision_config={**tower, **pieces, **outputs},
        image_token_index=PICTURE,
    )
    return made("MllamaForConditionalGeneration", config)


def of_mllama(words: list[int], pads: int = 0) -> Call:
    call = row([PICTURE, 5, 6, 7, 8], pads)
    seen = torch.zeros(*call["input_ids"].shape, 1, 1, dtype=torch.long)
    seen[:, pads:] = 1
    ratio = {"aspect_ratio_ids": torch.tensor([[1]]), "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long)}
    return {**call, **ratio, "pixel_values": PIXELS[None, None], "cross_attention_mask": seen}


def with_picture(words: list[int], pads: int = 0) -> Call:
    call = row(words, pads)
    return {**call, "pixel_values": PIXELS}


def with_types(words: list[int], pads: int = 0) -> Call:
    call = with_picture(words, pads)
    return {**call, "token_type_ids": (call["input_ids"] == PICTURE).long()}


REFUSED = {
    *((name, method) for name in ("whisper", "vit", "wav2vec2", "trocr", "canine") for method in METHODS),
    *(("funnel", method) for method in ("prefix", "prompt")),  # pools its words
    ("paligemma", "prompt"),  # makes its masks above the layers
    ("mllama", "prompt"),  # has a row for each token of what it sees of pictures
    ("clip", "prompt"),  # looks for the end among the ids
}
"""Models that cannot take a method."""
WORDS = [5, *[PICTURE] * 4, 11, 12]
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[..., Call]]] = {
    "blip2": (blip2, with_picture),
    "paligemma": (paligemma, with_types),
    "fuyu": (fuyu, lambda words, pads=0: row([5, 6, 7, 8, 9], pads)),
    "gemma3": (gemma3, with_types),
    "llava": (llava, with_picture),
    "qwen_vl": (qwen_vl, of_qwen_vl),
    "mllama": (mllama, of_mllama),
}


def logits(model: Any, call: Call) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**call).logits
    return found


def wrapped(base: PreTrainedModel, method: str, task: str | None, call: Call) -> Any:
    """A model with an adapter of random numbers, or the line that refuses it, at the latest in its first call."""
    try:
        model = scramble(get_peft_model(base, METHODS[method](task_type=task))).eval()
        model(**call)
    except UnsupportedModelError as error:
        return str(error)
    return model


OF_MLLAMA = "ignore:.hidden_state. is deprecated:FutureWarning"
"""What transformers 5.17 says of its own tower."""


@pytest.mark.filterwarnings(OF_MLLAMA)
@pytest.mark.parametrize("method", ["prefix", "prompt", "p_tuning_v2"])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_acts_and_padding_does_not(name: str, method: str) -> None:
    build, call = MODELS[name]
    base = build()
    alone = logits(base, call(WORDS))
    model = wrapped(base, method, CAUSAL_LM, call(WORDS))
    if isinstance(model, str):
        assert (name, method) in REFUSED
        assert "\n" not in model
        return
    found = logits(model, call(WORDS))
    assert float((found - alone).abs().max()) > 1e-2
    for pads in (1, 3):
        torch.testing.assert_close(logits(model, call(WORDS, pads))[:, pads:], found, atol=2e-4, rtol=1e-3)
    model(**call(WORDS), labels=call(WORDS)["input_ids"]).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings(OF_MLLAMA)
@pytest.mark.parametrize("pads", [0, 2])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("name", MODELS)
def test_a_text_is_written_with_a_cache_as_without(name: str, method: str, pads: int) -> None:
    build, call = MODELS[name]
    if (name, method) in REFUSED:
        return
    model = scramble(get_peft_model(build(), METHODS[method](task_type=CAUSAL_LM))).eval()
    cached = written(model, call(WORDS, pads))
    torch.testing.assert_close(written(model, call(WORDS)), cached, atol=2e-4, rtol=1e-3)
    plain = [written(build(), call(WORDS, pads), use_cache=use) for use in (True, False)]
    if torch.allclose(*plain, atol=2e-4, rtol=1e-3):  # PaliGemma of transformers 5.17 differs by itself
        torch.testing.assert_close(written(model, call(WORDS, pads), use_cache=False), cached, atol=2e-4, rtol=1e-3)
    else:
        assert name == "paligemma"


def written(model: Any, call: Call, **options: Any) -> Tensor:
    """[3, 1, V] the logits of three tokens that a model writes."""
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(**call, **settings, eos_token_id=None, **options).logits)


@pytest.mark.parametrize("name", ["blip2", "gemma3", "llava", "paligemma"])
def test_biases_of_convolutions_are_those_of_channels(name: str) -> None:
    build, call = MODELS[name]
    base = build()
    plain = deepcopy(base)
    model = get_peft_model(base, BitFitConfig(task_type=CAUSAL_LM)).eval()
    biases = dict(plain.named_parameters())
    with torch.no_grad():
        for slot, change in model.adapter("default").module.prompt().additions:
            change.normal_(std=0.1)
            biases[f"{slot.module}.bias"] += change
    convolutions = [slot for slot, _ in model.adapter("default").module.prompt().additions if "patch" in slot.module]
    assert convolutions or name == "llava"  # whose pieces have no bias
    torch.testing.assert_close(logits(model, call(WORDS)), logits(plain, call(WORDS)), atol=1e-4, rtol=1e-3)


# Models that read no words

SMALL = SIZES
SEQ2SEQ = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def crossed(config: Any) -> Any:
    config.is_decoder = config.add_cross_attention = True
    return config


def trocr() -> PreTrainedModel:
    encoder = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8)
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    decoder = crossed(transformers.TrOCRConfig(vocab_size=97, **sizes, cross_attention_hidden_size=32))
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.VisionEncoderDecoderModel(config=config).eval()


def bert_and_bart() -> PreTrainedModel:
    parts = transformers.BertConfig(**SMALL, vocab_size=97), crossed(transformers.BartConfig(**SEQ2SEQ))
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    return transformers.EncoderDecoderModel(config=config).eval()


def whisper() -> PreTrainedModel:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    sizes = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64}
    silent = {"suppress_tokens": None, "begin_suppress_tokens": None}
    return made("WhisperForConditionalGeneration", transformers.WhisperConfig(**SEQ2SEQ, **special, **sizes, **silent))


def wav2vec2() -> PreTrainedModel:
    layers = {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    return made("Wav2Vec2ForCTC", transformers.Wav2Vec2Config(**SMALL, vocab_size=32, **layers, **positions))


def canine() -> PreTrainedModel:
    sizes = {"num_hash_buckets": 64, "num_hash_functions": 2, "downsampling_rate": 2, "local_transformer_stride": 8}
    config = transformers.CanineConfig(**SMALL, **sizes, upsampling_kernel_size=2)
    return made("CanineForSequenceClassification", config)


def funnel() -> PreTrainedModel:
    sizes = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1], "num_decoder_layers": 1}
    return made("FunnelForSequenceClassification", transformers.FunnelConfig(vocab_size=97, **sizes))


OTHERS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], str | None]] = {
    "whisper": (whisper, {"input_features": torch.randn(1, 8, 40), "labels": IDS}, SEQ_2_SEQ_LM),
    "vit": (
        lambda: made("ViTForImageClassification", transformers.ViTConfig(**TOWER, patch_size=4)),
        {"pixel_values": PIXELS},
        None,
    ),
    "wav2vec2": (wav2vec2, {"input_values": torch.randn(1, 400)}, None),
    "trocr": (trocr, {"pixel_values": PIXELS, "decoder_input_ids": IDS}, SEQ_2_SEQ_LM),
    "bert and bart": (bert_and_bart, {"input_ids": IDS, "decoder_input_ids": IDS}, SEQ_2_SEQ_LM),
    "clip": (
        lambda: made(
            "CLIPTextModelWithProjection",
            transformers.CLIPTextConfig(**TEXT | {"max_position_embeddings": 77}, projection_dim=16),
        ),
        {"input_ids": torch.tensor([[1, 5, 6, 7, 2]])},
        None,
    ),
    "canine": (canine, {"input_ids": IDS.repeat(1, 4), "attention_mask": torch.ones(1, 20).long()}, "SEQ_CLS"),
    "funnel": (funnel, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, "SEQ_CLS"),
}


@pytest.mark.parametrize("method", ["prefix", "prompt", "bitfit"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_models_work_or_are_refused_when_they_are_wrapped(name: str, method: str) -> None:
    build, call, task = OTHERS[name]
    base = build()
    with torch.no_grad():
        expected = answer(base(**call))
        model = wrapped(base, method, task, call)
        if isinstance(model, str):
            assert (name, method) in REFUSED
            assert "\n" not in model
            return
        assert float((answer(model(**call)) - expected).abs().max()) > 1e-4


@pytest.mark.parametrize("method", [m for m in METHODS if m != "cpt"])  # whose config refuses their tasks
@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_models_of_pictures_and_sound_refuse_every_method_in_one_line(name: str, method: str) -> None:
    build, call, task = OTHERS[name]
    refusal = wrapped(build(), method, task, call)
    assert isinstance(refusal, str)
    assert "has no one embedding of words: use a base model that reads text" in refusal
    assert "\n" not in refusal


@pytest.mark.parametrize("name", ["gemma3", "llava", "paligemma"])
def test_biases_that_are_added_act_with_a_picture_too(name: str) -> None:
    """By hand: each change is added to what its module returns."""
    build, call = MODELS[name]
    base, plain = build(), build()
    model = scramble(get_peft_model(base, BitFitConfig(task_type=CAUSAL_LM, add_missing=True))).eval()
    additions = model.adapter("default").module.prompt().additions
    assert not all(slot.has_bias for slot, _ in additions)
    assert any("vision" in slot.module for slot, _ in additions)
    for slot, change in additions:
        plain.get_submodule(slot.module).register_forward_hook(
            lambda module, args, output, slot=slot, change=change: with_addition(module, output, slot, change)
        )
    torch.testing.assert_close(logits(model, call(WORDS)), logits(plain, call(WORDS)), atol=1e-4, rtol=1e-3)


def with_addition(module: Any, output: Tensor, slot: Any, change: Tensor) -> Tensor:
    assert slot.index is None
    return output + (change[:, None, None] if isinstance(module, torch.nn.Conv2d) else change)


def answer(output: Any) -> Tensor:
    found: Tensor = next(output[name] for name in OUTPUTS if output.get(name) is not None)
    return found
