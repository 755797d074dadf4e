"""What PEFT's tests load from the hub: tiny random models with tokenizers, in a folder laid out as the hub's cache.

The architectures are those of the hub's models of these names; sizes and weights are not. Knows nothing of adapters.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, DatasetDict
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedModel, PreTrainedTokenizerFast

COMMIT = "0" * 40
TOKENS = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<image>"]
VOCABULARY = len(TOKENS)
ATTENTION = {"num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 40}
SIZES = {**ATTENTION, "vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 512}
LLAMA = {**SIZES, "num_key_value_heads": 2}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
DEBERTA = {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}
OPT = {**SIZES, "ffn_dim": 40, "word_embed_proj_dim": 32}
GEMMA = {**LLAMA, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA4 = {
    **GEMMA,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 512,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 40,
    "num_layers": 2,
    "decoder_start_token_id": 0,
}
IMAGE, PATCH = 32, 16
LLAVA = {
    "text_config": {"model_type": "llama", **LLAMA},
    "vision_config": {"model_type": "clip_vision_model", **ATTENTION, "image_size": IMAGE, "patch_size": PATCH},
    "image_token_index": TOKENS.index("<image>"),
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**GPT2, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", LLAMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", LLAMA),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 16}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", GEMMA),
    "peft-internal-testing/tiny-random-gemma4-E2B": ("Gemma4ForCausalLM", GEMMA4),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", BART),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", SIZES),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", SIZES),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", DEBERTA),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", SIZES),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", SIZES),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        {**LLAMA, "num_labels": 1},
    ),
    "peft-internal-testing/tiny-LlavaForConditionalGeneration": ("LlavaForConditionalGeneration", LLAVA),
}
"""By name on the hub: the model's class and its config's fields."""


def fill(cache: Path) -> None:
    """Write the models that a cache lacks, or has from before this file changed."""
    for name, (class_name, fields) in MODELS.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        main = repository / "refs" / "main"
        if main.exists() and main.stat().st_mtime > Path(__file__).stat().st_mtime:
            continue
        shutil.rmtree(repository, ignore_errors=True)
        snapshot = repository / "snapshots" / COMMIT
        build(class_name, fields).save_pretrained(snapshot)
        processor(class_name).save_pretrained(snapshot)
        main.parent.mkdir()
        main.write_text(COMMIT, encoding="utf-8")


def build(class_name: str, fields: dict[str, Any]) -> PreTrainedModel:
    """A random model, the same each time."""
    own = getattr(transformers, class_name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = own(own.config_class(**fields))
    return model


def processor(class_name: str) -> Any:
    """What prepares a model's inputs: a tokenizer, or a processor of texts and images."""
    return llava_processor(tokenizer()) if class_name.startswith("Llava") else tokenizer()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; a BPE without merges, since ``AutoTokenizer`` rebuilds Qwen2's tokenizers as byte-level BPE."""
    core = Tokenizer(BPE({token: number for number, token in enumerate(TOKENS)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=["<image>"], **special)


def llava_processor(words: PreTrainedTokenizerFast) -> Any:
    images = transformers.CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE})
    return transformers.LlavaProcessor(
        images, words, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def load_dataset(name: str) -> Any:
    """Stand-ins for the two data sets that PEFT's tests load."""
    if name == "huggingface/cats-image":
        return {"test": {"image": [Image.new("RGB", (IMAGE, IMAGE))]}}
    if name == "ybelkada/english_quotes_copy":
        quotes = [f"the {color} sky is {judgement} text" for color in ("red", "blue") for judgement in ("good", "bad")]
        return DatasetDict(train=Dataset.from_dict({"quote": 8 * quotes}))
    raise ValueError(f"no data set {name} is at hand")
