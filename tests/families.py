"""Tiny random models of every kind of architecture, and every method: the two tables that the contract tests run over.

A new family is a new row of FAMILIES, a new method one of METHODS. Letters: B rows, T tokens, P virtual tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    T5Config,
)

from softtune import (
    BitFitConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PTuningV2Config,
    get_peft_model,
)

P = 5
VOCABULARY = 97
PAD = 1
CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS = "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS"
TOKEN_CLS, QUESTION_ANS = "TOKEN_CLS", "QUESTION_ANS"

AUTO: dict[str, Any] = {
    CAUSAL_LM: AutoModelForCausalLM,
    SEQ_2_SEQ_LM: AutoModelForSeq2SeqLM,
    SEQ_CLS: AutoModelForSequenceClassification,
    TOKEN_CLS: AutoModelForTokenClassification,
    QUESTION_ANS: AutoModelForQuestionAnswering,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    ``attention`` is the path of each site's attention modules below the base model; none where they cannot be reached.
    """

    config: type[PretrainedConfig]
    sizes: dict[str, Any]
    tasks: tuple[str, ...]
    attention: dict[str, str] = field(default_factory=dict)
    has_biases: bool = True
    dropout: tuple[str, ...] = ()


FAMILIES = {
    "gpt2": Family(
        config=GPT2Config,
        sizes={"n_embd": 36, "n_layer": 2, "n_head": 6, "n_positions": 64},
        tasks=(CAUSAL_LM, SEQ_CLS),
        attention={"decoder": "h.{}.attn"},
        dropout=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    ),
    "llama": Family(
        config=LlamaConfig,
        sizes={
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "intermediate_size": 40,
            "max_position_embeddings": 64,
        },
        tasks=(CAUSAL_LM, SEQ_CLS),
        attention={"decoder": "layers.{}.self_attn"},
        has_biases=False,
    ),
    "qwen3": Family(
        config=Qwen3Config,
        sizes={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "intermediate_size": 40,
            "max_position_embeddings": 64,
        },
        tasks=(CAUSAL_LM,),
        attention={"decoder": "layers.{}.self_attn"},
        has_biases=False,
    ),
    "gemma3": Family(
        config=Gemma3TextConfig,
        sizes={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "intermediate_size": 40,
            "max_position_embeddings": 64,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        tasks=(CAUSAL_LM,),
        attention={"decoder": "layers.{}.self_attn"},
        has_biases=False,
    ),
    "bloom": Family(
        config=BloomConfig,
        sizes={"hidden_size": 32, "n_layer": 2, "n_head": 4},
        tasks=(CAUSAL_LM,),
        dropout=("hidden_dropout", "attention_dropout"),
    ),
    "bert": Family(
        config=BertConfig,
        sizes={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 40,
            "max_position_embeddings": 64,
        },
        tasks=(SEQ_CLS,),
        attention={"encoder": "encoder.layer.{}.attention.self"},
        dropout=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    ),
    "t5": Family(
        config=T5Config,
        sizes={
            "d_model": 32,
            "d_kv": 12,
            "num_heads": 4,
            "d_ff": 40,
            "num_layers": 3,
            "num_decoder_layers": 2,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
            "decoder_start_token_id": PAD,
        },
        tasks=(SEQ_2_SEQ_LM,),
        attention={
            "encoder": "encoder.block.{}.layer.0.SelfAttention",
            "decoder": "decoder.block.{}.layer.0.SelfAttention",
            "cross": "decoder.block.{}.layer.1.EncDecAttention",
        },
        has_biases=False,
        dropout=("dropout_rate",),
    ),
    "bart": Family(
        config=BartConfig,
        sizes={
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
        tasks=(SEQ_2_SEQ_LM, SEQ_CLS),
        attention={
            "encoder": "encoder.layers.{}.self_attn",
            "decoder": "decoder.layers.{}.self_attn",
            "cross": "decoder.layers.{}.encoder_attn",
        },
        dropout=("dropout", "attention_dropout", "activation_dropout"),
    ),
}

METHODS: dict[str, Callable[..., PeftConfig]] = {
    "prompt": lambda **k: PromptTuningConfig(num_virtual_tokens=P, **k),
    "prompt_suffix": lambda **k: PromptTuningConfig(num_virtual_tokens=P, placement="suffix", **k),
    "p_tuning_mlp": lambda **k: PromptEncoderConfig(num_virtual_tokens=P, encoder_hidden_size=11, **k),
    "p_tuning_lstm": lambda **k: PromptEncoderConfig(
        num_virtual_tokens=P, encoder_hidden_size=7, encoder_reparameterization_type="LSTM", **k
    ),
    "prefix": lambda **k: PrefixTuningConfig(num_virtual_tokens=P, **k),
    "prefix_projection": lambda **k: PrefixTuningConfig(
        num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=9, **k
    ),
    "infix": lambda **k: PrefixTuningConfig(num_virtual_tokens=P, placement="infix", **k),
    "embedding_only": lambda **k: PrefixTuningConfig(num_virtual_tokens=P, embedding_only=True, **k),
    "prefix_last": lambda **k: PrefixTuningConfig(num_virtual_tokens=P, layers="last:1", **k),
    "p_tuning_v2": lambda **k: PTuningV2Config(num_virtual_tokens=P, **k),
    "bitfit": lambda **k: BitFitConfig(**k),
    "bitfit_added": lambda **k: BitFitConfig(add_missing=True, **k),
}

INPUT_METHODS = ("prompt", "prompt_suffix", "p_tuning_mlp", "p_tuning_lstm", "embedding_only")
PREFIX_METHODS = ("prefix", "prefix_projection", "infix", "prefix_last", "p_tuning_v2")
KINDS = ("prompt", "prompt_suffix", "prefix", "infix", "prefix_last", "bitfit_added")
"""One method for each way into the base model; the others differ in how they compute what goes in."""
THOROUGH = ("gpt2", "llama", "bloom", "bert", "t5")
"""Families that the contract runs with every method; the others with KINDS."""
REPARAMETERISED = ("p_tuning_mlp", "p_tuning_lstm", "prefix_projection")


def is_decoder_only(family: str) -> bool:
    return CAUSAL_LM in FAMILIES[family].tasks


def takes(family: str, method: str) -> bool:
    """Whether the family can take the method; Bloom takes a prefix only as a cache, at all layers and in front."""
    if method == "infix":
        return is_decoder_only(family) and bool(FAMILIES[family].attention)
    if method == "prefix_last":
        return bool(FAMILIES[family].attention)
    return method != "bitfit" or FAMILIES[family].has_biases


def cases(
    methods: tuple[str, ...] = tuple(METHODS),
    families: tuple[str, ...] = tuple(FAMILIES),
    tasks: tuple[str, ...] = tuple(AUTO),
) -> list[tuple[str, str, str]]:
    """Every (family, task, method) that goes together, less what differs in nothing that a contract is about."""
    return [
        (family, task, method)
        for family in families
        for task in FAMILIES[family].tasks
        for method in methods
        if task in tasks and takes(family, method) and (method in KINDS or family in THOROUGH)
    ]


@cache
def _base_model(family: str, task: str, seed: int, overrides: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    row = FAMILIES[family]
    special = {"pad_token_id": PAD, "eos_token_id": 2, "bos_token_id": 0}
    settings = row.sizes | dict.fromkeys(row.dropout, 0.0) | special | dict(overrides)
    if task in (SEQ_CLS, TOKEN_CLS):
        settings["num_labels"] = 3
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AUTO[task].from_config(row.config(vocab_size=VOCABULARY, **settings))
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def base_model(family: str, task: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of one's own: a copy of one that is made once."""
    return copy.deepcopy(_base_model(family, task, seed, tuple(overrides.items())))


def adapted(family: str, task: str, method: str, seed: int = 1, **overrides: Any) -> PeftModel:
    """A tiny model with an adapter that acts strongly on every output, in evaluation mode."""
    model = get_peft_model(base_model(family, task, **overrides), METHODS[method](task_type=task))
    return scramble(model, seed).eval()


def scramble(model: PeftModel, seed: int = 1) -> PeftModel:
    """Set everything that the active adapter trains to random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(model: PeftModel) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def texts(family: str, task: str, lengths: tuple[int, ...] = (7, 4, 2)) -> list[Tensor]:
    """Rows of token ids of these lengths; for BART's classifier each ends with the end token that it reads."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]
    if family == "bart" and task == SEQ_CLS:
        for row in rows:
            row[-1] = 2
    return rows


def pad(rows: list[Tensor], side: str = "right", width: int | None = None, value: int = PAD) -> Tensor:
    """[B, T] rows in one tensor."""
    width = width or max(len(r) for r in rows)
    sides = [(0, width - len(r)) if side == "right" else (width - len(r), 0) for r in rows]
    return torch.stack([torch.nn.functional.pad(r, s, value=value) for r, s in zip(rows, sides, strict=True)])


def batch(rows: list[Tensor], side: str = "right", width: int | None = None) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` [B, T]."""
    mask = pad([torch.ones_like(r) for r in rows], side, width, value=0)
    return {"input_ids": pad(rows, side, width), "attention_mask": mask}


def answers(task: str, rows: int, length: int = 4) -> dict[str, Tensor]:
    """What the decoder of an encoder-decoder reads: nothing for other tasks."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    return {"decoder_input_ids": ids} if task == SEQ_2_SEQ_LM else {}


def labels_for(task: str, inputs: dict[str, Tensor]) -> Tensor:
    """Labels that fit: classes, or tokens of which each row's first two are masked."""
    ids = inputs["input_ids"]
    if task == SEQ_CLS:
        return torch.arange(len(ids)) % 3
    if task == SEQ_2_SEQ_LM:
        return ids.flip(1)[:, :4].contiguous()
    return ids.masked_fill(inputs["attention_mask"].cumsum(1) <= 2, -100).masked_fill(
        inputs["attention_mask"] == 0, -100
    )
