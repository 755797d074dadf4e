"""Tiny random models of every kind of architecture, and every method: the two tables that the contract tests run over.

A new family is a new row of FAMILIES, a new method one of METHODS. Letters: B rows, T tokens, P virtual tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    BloomConfig,
    DebertaConfig,
    DebertaV2Config,
    DeepseekV3Config,
    DistilBertConfig,
    ElectraConfig,
    EncoderDecoderConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    LayoutLMConfig,
    Lfm2Config,
    LlamaConfig,
    M2M100Config,
    MambaConfig,
    MarianConfig,
    MBartConfig,
    MistralConfig,
    ModernBertConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    PegasusConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    RobertaConfig,
    SmolLM3Config,
    T5Config,
    UMT5Config,
)

from softtune import (
    AdaptionPromptConfig,
    BeftConfig,
    BitFitConfig,
    CartridgeConfig,
    CombinedConfig,
    CPTConfig,
    IA3Config,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PrefixMemoryConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PTuningV2Config,
    get_peft_model,
)
from softtune.compat import INSTALLED

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


@dataclass(frozen=True)
class Attention:
    """The attention layers of one site."""

    path: str | None
    """Path of their modules below the base model, with a place for the number; None where they cannot be reached."""
    numbers: tuple[int, ...]
    """The numbers that stand in the path."""
    heads: int
    """H, key/value heads."""
    size: int
    """K, of a key."""
    value_size: int | None = None
    """V, of a value, where it is another."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """H, K and V."""
        return self.heads, self.size, self.value_size or self.size


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture."""

    config: Callable[..., PretrainedConfig]
    """Makes the config from ``sizes`` and the settings that all families share."""
    sizes: dict[str, Any]
    tasks: tuple[str, ...]
    attention: dict[str, list[Attention]] = field(default_factory=dict)
    """By site; none where a prefix has no layer to stand in."""
    has_biases: bool = True
    dropout: tuple[str, ...] = ()
    positions: str = "ids"
    """How positions reach the model: as ``position_ids``, looked up by itself in a ``table``, or ``none``."""
    limit: int | None = None
    """The longest sequence that the model has positions for; None where it computes them."""
    word_scale: float = 1.0
    """What the model multiplies words with that it looks up, but not vectors that come in their place."""
    first_position: int = 0
    """The number of the first real token's position."""
    table: tuple[str, ...] = ()
    """Paths of the position tables of a model that looks them up by itself."""
    window: bool = False
    """Whether some layers see 8 tokens at most."""
    pads: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By task, the sides on which padding leaves the plain model's answers alone; both by default."""
    refused: dict[str, str] = field(default_factory=dict)
    """Methods that the family cannot take, and the methods that the refusal names instead."""
    fused: Callable[[int], dict[str, Tensor]] | None = None
    """Which features of a fused projection are query, key and value, out of their number."""
    plain_cache: bool = True
    """Whether the model's cache holds the keys and values that each layer attends to."""
    ends_with_eos: bool = False
    """Whether the classifier reads the end token, so that every text needs one."""
    takes_vectors: bool = True
    """Whether the model takes word vectors in place of words."""
    checkpoints: bool = True
    """Whether the model has gradient checkpointing."""

    @property
    def reachable(self) -> bool:
        """Whether single layers can be given a prefix."""
        return any(a.path for layers in self.attention.values() for a in layers)

    def layers(self, *sites: str) -> list[tuple[str | None, tuple[int, int, int]]]:
        """Path and sizes of every attention layer, site after site."""
        return [
            (a.path and a.path.format(number), a.sizes)
            for site in sites or self.attention
            for a in self.attention[site]
            for number in a.numbers
        ]


def encoder_decoder(**settings: Any) -> EncoderDecoderConfig:
    """A BERT that reads and a BERT that writes."""
    own = {k: settings.pop(k) for k in ("decoder_start_token_id",)}
    encoder = BertConfig(**settings)
    decoder = BertConfig(**settings | {"num_hidden_layers": 3})
    special = {k: settings[k] for k in ("pad_token_id", "eos_token_id", "bos_token_id", "vocab_size")}
    return EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder, **own, **special)


def one_after_another(heads: int, key_heads: int) -> Callable[[int], dict[str, Tensor]]:
    """All heads' queries, then all keys, then all values."""

    def places(size: int) -> dict[str, Tensor]:
        head = size // (heads + 2 * key_heads)
        rows = torch.arange(size).view(-1, head)
        parts = rows[:heads], rows[heads : heads + key_heads], rows[heads + key_heads :]
        return {name: part.flatten() for name, part in zip(("query", "key", "value"), parts, strict=True)}

    return places


def by_key_head(heads: int, key_heads: int) -> Callable[[int], dict[str, Tensor]]:
    """For each key head, the queries that look at it, its key and its value."""

    def places(size: int) -> dict[str, Tensor]:
        head, group = size // (heads + 2 * key_heads), heads // key_heads + 2
        found: dict[str, list[int]] = {"query": [], "key": [], "value": []}
        for feature in range(size):
            place = feature // head % group
            name = "value" if place == group - 1 else "key" if place == group - 2 else "query"
            found[name].append(feature)
        return {name: torch.tensor(features) for name, features in found.items()}

    return places


LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
"""The sizes of most decoders."""
WINDOW = {
    "sliding_window": 8,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
SELF_ATTENTION = "layers.{}.self_attn"
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
BERT_ATTENTION = {"encoder": [Attention("encoder.layer.{}.attention.self", (0, 1), 4, 8)]}
BERT_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
BART = {
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
}
BART_ATTENTION = {
    "encoder": [Attention("encoder.layers.{}.self_attn", (0, 1), 4, 8)],
    "decoder": [Attention("decoder.layers.{}.self_attn", (0, 1, 2), 2, 16)],
    "cross": [Attention("decoder.layers.{}.encoder_attn", (0, 1, 2), 2, 16)],
}
BART_TABLES = ("encoder.embed_positions", "decoder.embed_positions")
BART_DROPOUT = ("dropout", "attention_dropout", "activation_dropout")
T5 = {
    "d_model": 32,
    "d_kv": 12,
    "num_heads": 4,
    "d_ff": 40,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": PAD,
}
T5_ATTENTION = {
    "encoder": [Attention("encoder.block.{}.layer.0.SelfAttention", (0, 1, 2), 4, 12)],
    "decoder": [Attention("decoder.block.{}.layer.0.SelfAttention", (0, 1), 4, 12)],
    "cross": [Attention("decoder.block.{}.layer.1.EncDecAttention", (0, 1), 4, 12)],
}
DECODER_TASKS = (CAUSAL_LM, SEQ_CLS)
ENCODER_TASKS = (SEQ_CLS, TOKEN_CLS, QUESTION_ANS)
# Cached keys and values are the only way in, and they come for all layers and in front of the text.
ALL_OR_NONE = {"infix": "placement='prefix'", "prefix_last": "drop layers"}
NO_PREFIX = dict.fromkeys(
    ("prefix", "prefix_projection", "infix", "prefix_last", "p_tuning_v2", "cartridge"), "use PromptTuningConfig"
)


def llama_like(config: Any, *, tasks: tuple[str, ...] = DECODER_TASKS, size: int = 8, **row: Any) -> Family:
    """A row for the many decoders that differ from Llama in their layers only."""
    sizes = LLAMA | row.pop("sizes", {})
    numbers = tuple(range(sizes["num_hidden_layers"]))
    attention = {"decoder": [Attention(SELF_ATTENTION, numbers, sizes["num_key_value_heads"], size)]}
    return Family(config=config, sizes=sizes, tasks=tasks, **{"attention": attention, "has_biases": False} | row)


FAMILIES = {
    "gpt2": Family(
        config=GPT2Config,
        sizes={"n_embd": 36, "n_layer": 2, "n_head": 6, "n_positions": 64},
        tasks=DECODER_TASKS,
        limit=64,
        attention={"decoder": [Attention("h.{}.attn", (0, 1), 6, 6)]},
        dropout=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
        fused=one_after_another(6, 6),
    ),
    "llama": llama_like(LlamaConfig, sizes={"hidden_size": 48, "num_attention_heads": 6}),
    "qwen3": llama_like(Qwen3Config, sizes={"head_dim": 12}, size=12),
    "gemma3": llama_like(Gemma3TextConfig, sizes={**WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8}, window=True),
    "bloom": Family(
        config=BloomConfig,
        sizes={"hidden_size": 32, "n_layer": 2, "n_head": 4},
        tasks=DECODER_TASKS,
        attention={"decoder": [Attention(None, (0, 1), 4, 8)]},
        dropout=("hidden_dropout", "attention_dropout"),
        fused=by_key_head(4, 4),
        positions="none",
        refused=ALL_OR_NONE,
    ),
    "bert": Family(
        config=BertConfig, sizes=BERT, tasks=ENCODER_TASKS, limit=64, attention=BERT_ATTENTION, dropout=BERT_DROPOUT
    ),
    "t5": Family(
        config=T5Config,
        sizes=T5,
        tasks=(SEQ_2_SEQ_LM, SEQ_CLS),
        attention=T5_ATTENTION,
        has_biases=False,
        dropout=("dropout_rate", "classifier_dropout"),
        positions="none",
        pads={SEQ_CLS: ("right",)},  # the classifier's decoder reads the text with its padding
        ends_with_eos=True,
        takes_vectors=False,
    ),
    "bart": Family(
        config=BartConfig,
        sizes=BART,
        tasks=(SEQ_2_SEQ_LM, SEQ_CLS),
        limit=64,
        attention=BART_ATTENTION,
        dropout=BART_DROPOUT,
        positions="table",
        first_position=2,
        table=BART_TABLES,
        pads={SEQ_CLS: ("right",)},  # the classifier's decoder reads the text with its padding
        ends_with_eos=True,
        takes_vectors=False,  # the decoder of its classifier reads the ids
    ),
    "opt": Family(
        config=OPTConfig,
        sizes={
            "hidden_size": 32,
            "word_embed_proj_dim": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 40,
            "max_position_embeddings": 64,
        },
        tasks=DECODER_TASKS,
        limit=64,
        attention={"decoder": [Attention("decoder.layers.{}.self_attn", (0, 1), 4, 8)]},
        dropout=("dropout", "attention_dropout"),
    ),
    "falcon": Family(  # the decoder architecture of the 40B
        config=FalconConfig,
        sizes={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "max_position_embeddings": 64,
        },
        tasks=DECODER_TASKS,
        fused=by_key_head(4, 2),
        attention={"decoder": [Attention(None, (0, 1), 4, 8)]},
        refused=ALL_OR_NONE,
    ),
    "falcon_multi_query": Family(
        config=FalconConfig,
        sizes={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "multi_query": True,
            "bias": True,
            "max_position_embeddings": 64,
        },
        tasks=DECODER_TASKS,
        attention={"decoder": [Attention(None, (0, 1), 1, 8)]},
        fused=by_key_head(4, 1),
        refused=ALL_OR_NONE,
    ),
    "mpt": Family(
        config=MptConfig,
        sizes={"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        tasks=DECODER_TASKS,
        limit=64,
        attention={"decoder": [Attention(None, (0, 1), 4, 8)]},
        has_biases=False,
        fused=one_after_another(4, 4),
        positions="none",
        refused=ALL_OR_NONE,
    ),
    "gptj": Family(
        config=GPTJConfig,
        sizes={"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
        tasks=DECODER_TASKS,
        limit=64,
        attention={"decoder": [Attention("h.{}.attn", (0, 1), 4, 8)]},
    ),
    "gpt_neox": Family(
        config=GPTNeoXConfig,
        sizes={k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
        tasks=DECODER_TASKS,
        attention={"decoder": [Attention("layers.{}.attention", (0, 1), 4, 8)]},
        dropout=("classifier_dropout",),
        fused=by_key_head(4, 4),
    ),
    "mistral": llama_like(MistralConfig, sizes={"sliding_window": 8}, window=True),
    "qwen2": llama_like(Qwen2Config, has_biases=True),
    "gemma2": llama_like(
        Gemma2Config,
        # Only eager attention caps the scores.
        sizes={**WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_implementation": "eager"},
        window=True,
    ),
    "gemma4": llama_like(
        Gemma4TextConfig,
        tasks=(CAUSAL_LM,),
        sizes={
            **WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "head_dim": 8,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 0,
        },
        attention={"decoder": [Attention(SELF_ATTENTION, (0, 1), 2, 8), Attention(SELF_ATTENTION, (2,), 2, 16)]},
        window=True,
    ),
    "gemma4_small": llama_like(  # the E2B and E4B: embeddings for every layer by token id, and layers that share keys
        Gemma4TextConfig,
        tasks=(CAUSAL_LM,),
        sizes={
            **WINDOW,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            "head_dim": 8,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        window=True,
        plain_cache=False,
        takes_vectors=False,
        refused=dict.fromkeys(
            (
                "prompt",
                "prompt_suffix",
                "p_tuning_mlp",
                "p_tuning_lstm",
                "embedding_only",
                "combined",
                "adaption_prompt",
                "cpt",
                "multitask",
            ),
            "use PrefixTuningConfig",
        ),
    ),
    "phi3": llama_like(Phi3Config, fused=one_after_another(4, 2)),
    "olmo2": llama_like(Olmo2Config),
    "smollm3": llama_like(SmolLM3Config),
    "granite": llama_like(
        GraniteConfig, tasks=(CAUSAL_LM,), sizes={"embedding_multiplier": 3.0, "residual_multiplier": 0.5}
    ),
    "gpt_oss": llama_like(
        GptOssConfig,
        sizes={**WINDOW, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        has_biases=True,
        window=True,
    ),
    "deepseek_v3": llama_like(
        DeepseekV3Config,
        sizes={
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
            "num_mtp_layers": 0,
        },
        attention={"decoder": [Attention(SELF_ATTENTION, (0, 1), 4, 12, 6)]},
        plain_cache=False,  # but a latent that they are computed from
        refused={"adaption_prompt": "use PrefixTuningConfig"},
    ),
    "qwen3_next": llama_like(
        Qwen3NextConfig,
        sizes={
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "head_dim": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        attention={"decoder": [Attention(SELF_ATTENTION, (1,), 2, 8)]},
    ),
    "granitemoehybrid": llama_like(
        GraniteMoeHybridConfig,
        tasks=(CAUSAL_LM,),
        sizes={
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
            "mamba_n_heads": 4,
            "mamba_d_state": 8,
            "mamba_d_head": 16,
            "mamba_chunk_size": 4,
            "position_embedding_type": "rope",
        },
        attention={"decoder": [Attention(SELF_ATTENTION, (1,), 2, 8)]},
    ),
    "lfm2": llama_like(
        Lfm2Config,
        tasks=(CAUSAL_LM,),
        sizes={"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
        attention={"decoder": [Attention(SELF_ATTENTION, (1,), 2, 8)]},
    ),
    "mamba": Family(
        config=MambaConfig,
        sizes={"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
        tasks=(CAUSAL_LM,),
        has_biases=False,  # but for those that the layers read off modules instead of calling them
        positions="none",
        refused=NO_PREFIX | dict.fromkeys(("beft", "ia3"), "name some by target_modules"),
    ),
    "roberta": Family(
        config=RobertaConfig,
        sizes=BERT,
        tasks=ENCODER_TASKS,
        limit=62,
        attention=BERT_ATTENTION,
        dropout=BERT_DROPOUT,
        first_position=PAD + 1,
    ),
    "electra": Family(
        config=ElectraConfig,
        sizes=BERT | {"embedding_size": 16},
        tasks=ENCODER_TASKS,
        limit=64,
        attention=BERT_ATTENTION,
        dropout=BERT_DROPOUT,
    ),
    "distilbert": Family(
        config=DistilBertConfig,
        sizes={"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "max_position_embeddings": 64},
        tasks=ENCODER_TASKS,
        limit=64,
        attention={"encoder": [Attention("transformer.layer.{}.attention", (0, 1), 4, 8)]},
        dropout=("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"),
    ),
    "layoutlm": Family(
        config=LayoutLMConfig,
        sizes=BERT | {"max_2d_position_embeddings": 32},
        tasks=(SEQ_CLS, TOKEN_CLS),
        limit=64,
        attention=BERT_ATTENTION,
        dropout=BERT_DROPOUT,
    ),
    "albert": Family(  # all layers are one, and share a prefix
        config=AlbertConfig,
        sizes=BERT | {"embedding_size": 16, "num_hidden_layers": 3},
        tasks=ENCODER_TASKS,
        limit=64,
        attention={"encoder": [Attention("encoder.albert_layer_groups.0.albert_layers.0.attention", (0,), 4, 8)]},
        dropout=(*BERT_DROPOUT, "classifier_dropout_prob"),
        checkpoints=False,
    ),
    "modernbert": Family(
        config=ModernBertConfig,
        sizes=BERT | {"num_hidden_layers": 3, "local_attention": 8, "global_attn_every_n_layers": 2},
        tasks=ENCODER_TASKS,
        attention={"encoder": [Attention("layers.{}.attn", (0, 1, 2), 4, 8)]},
        has_biases=False,
        fused=one_after_another(4, 4),
        window=True,
    ),
    "deberta": Family(
        config=DebertaConfig,
        sizes=BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
        tasks=ENCODER_TASKS,
        attention=BERT_ATTENTION,
        dropout=(*BERT_DROPOUT, "pooler_dropout"),
        fused=by_key_head(4, 4),
    ),
    "deberta_v2": Family(
        config=DebertaV2Config,
        sizes=BERT
        | {
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
        },
        tasks=ENCODER_TASKS,
        attention=BERT_ATTENTION,
        dropout=(*BERT_DROPOUT, "pooler_dropout"),
    ),
    "mbart": Family(
        config=MBartConfig,
        sizes=BART | {"scale_embedding": True},
        tasks=(SEQ_2_SEQ_LM, SEQ_CLS),
        limit=64,
        attention=BART_ATTENTION,
        dropout=BART_DROPOUT,
        positions="table",
        first_position=2,
        table=BART_TABLES,
        pads={SEQ_CLS: ("right",)},  # as in BART
        ends_with_eos=True,
        takes_vectors=False,
    ),
    "pegasus": Family(
        config=PegasusConfig,
        sizes=BART | {"scale_embedding": True},
        tasks=(SEQ_2_SEQ_LM,),
        limit=64,
        word_scale=32**0.5,
        attention=BART_ATTENTION,
        dropout=BART_DROPOUT,
        positions="table",
        table=BART_TABLES,
    ),
    "marian": Family(
        config=MarianConfig,
        sizes=BART | {"scale_embedding": True},
        tasks=(SEQ_2_SEQ_LM,),
        limit=64,
        word_scale=32**0.5,
        attention=BART_ATTENTION,
        dropout=BART_DROPOUT,
        positions="table",
        table=BART_TABLES,
    ),
    "m2m_100": Family(  # and NLLB; computes its positions, of words alone
        config=M2M100Config,
        sizes=BART | {"scale_embedding": True, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
        tasks=(SEQ_2_SEQ_LM,),
        attention=BART_ATTENTION,
        dropout=BART_DROPOUT,
        positions="table",
        first_position=PAD + 1,
        table=BART_TABLES,
    ),
    "umt5": Family(  # every layer has a relative bias of its own
        config=UMT5Config,
        sizes=T5,
        tasks=(SEQ_2_SEQ_LM, SEQ_CLS),
        attention=T5_ATTENTION,
        has_biases=False,
        dropout=("dropout_rate", "classifier_dropout"),
        positions="none",
        pads={SEQ_CLS: ("right",)},  # as in T5
        ends_with_eos=True,
        takes_vectors=False,
    ),
    "encoder_decoder": Family(
        config=encoder_decoder,
        sizes=BERT | {"decoder_start_token_id": 2},
        tasks=(SEQ_2_SEQ_LM,),
        limit=64,
        attention={
            "encoder": [Attention("encoder.encoder.layer.{}.attention.self", (0, 1), 4, 8)],
            "decoder": [Attention("decoder.bert.encoder.layer.{}.attention.self", (0, 1, 2), 4, 8)],
            "cross": [Attention("decoder.bert.encoder.layer.{}.crossattention.self", (0, 1, 2), 4, 8)],
        },
        dropout=BERT_DROPOUT,
    ),
}

if Version("5.18") > INSTALLED:
    del FAMILIES["umt5"]  # refused: its decoder sees later words there
if Version("5.24") > INSTALLED:  # GPT-J does not call the attention interface there
    unreachable = {"decoder": [Attention(None, (0, 1), 4, 8)]}
    FAMILIES["gptj"] = replace(FAMILIES["gptj"], attention=unreachable, refused=ALL_OR_NONE)


def cpt(**fields: Any) -> CPTConfig:
    """Demonstrations without labels of their own, whose tokens may change much."""
    radii = {"opt_projection_epsilon": 60.0, "opt_projection_format_epsilon": 60.0}
    tokens = {"cpt_token_ids": [3, 40, 17, 5, 61], "cpt_tokens_type_mask": [1, 2, 2, 3, 1]}
    return CPTConfig(**{"task_type": CAUSAL_LM, **tokens, **radii, **fields})


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
    "adaption_prompt": lambda **k: AdaptionPromptConfig(adapter_len=P, gate="head", **k),
    "memory": lambda **k: PrefixMemoryConfig(**k),
    "combined": lambda **k: CombinedConfig(
        parts=[
            PrefixTuningConfig(num_virtual_tokens=P),
            PromptTuningConfig(num_virtual_tokens=2),
            BitFitConfig(add_missing=True),
            IA3Config(),
            PrefixMemoryConfig(),
        ],
        **k,
    ),
    "beft": lambda **k: BeftConfig(**k),
    "ia3": lambda **k: IA3Config(**k),
    "cartridge": lambda **k: CartridgeConfig(num_virtual_tokens=P, **k),
    "cpt": lambda **k: cpt(**k),
    "multitask": lambda **k: MultitaskPromptTuningConfig(num_virtual_tokens=P, num_ranks=2, **k),
}

INPUT_METHODS = ("prompt", "prompt_suffix", "p_tuning_mlp", "p_tuning_lstm", "embedding_only")
TERM_METHODS = ("memory", "adaption_prompt", "combined")
"""Methods that add to the outputs of attention, in models that call the attention interface."""
PREFIX_METHODS = ("prefix", "prefix_projection", "infix", "prefix_last", "p_tuning_v2", "cartridge")
KINDS = ("prompt", "prompt_suffix", "prefix", "infix", "prefix_last", "bitfit_added", "ia3", "memory", "combined")
"""One method for each way into the base model; the others differ in how they compute what goes in."""
THOROUGH = ("gpt2", "llama", "bloom", "bert", "t5")
"""Families whose contract with every method is part of the default suite."""
FAMILIAR = ("qwen3", "gemma3", "bart")
"""Families whose contract with KINDS is part of the default suite."""
LIKE_PROMPT = {"cpt": ("gpt2", "llama"), "multitask": ("gpt2", "t5")}
"""Methods that go the way of "prompt", and the families whose contract with them is part of the default suite."""
DAILY = ("prompt", "prefix")
"""Methods with which the contract of every other family is part of the default suite."""
BY_MODULE = ("bitfit", "bitfit_added", "beft", "ia3", *TERM_METHODS)
"""Methods that change single modules, or whose tensors go by the modules' names or by their parts."""
REPARAMETERISED = ("p_tuning_mlp", "p_tuning_lstm", "prefix_projection", "cpt")
CONTRACT = (CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS)
"""Tasks that the contract runs over; the other heads have tests of their own."""


def is_decoder_only(family: str) -> bool:
    return CAUSAL_LM in FAMILIES[family].tasks


def takes(family: str, method: str) -> bool:
    """Whether the family can take the method."""
    row = FAMILIES[family]
    if method in ("infix", "cpt") and not is_decoder_only(family):
        return False
    if method in TERM_METHODS and (not row.reachable or "prefix" in row.refused):
        return False
    return method not in row.refused and (method != "bitfit" or row.has_biases)


def refusals() -> list[tuple[str, str, str]]:
    """Every family, a method that it cannot take, and what the refusal says to do instead."""
    general = {"bitfit": "add_missing=True", "infix": "use placement='prefix'", "cpt": "use PromptTuningConfig"}
    return [
        (family, method, row.refused.get(method) or general.get(method) or "use P")
        for family, row in FAMILIES.items()
        for method in METHODS
        if not takes(family, method)
    ]


def is_slow(family: str, task: str | None, method: str | None) -> bool:
    """Whether a case is left to the slow suite."""
    if method in LIKE_PROMPT:
        return family not in LIKE_PROMPT[method]
    if family in THOROUGH and task != (SEQ_CLS if family in ("bloom", "t5") else None):
        return False
    if family in FAMILIAR and method in (None, *KINDS) and task != (SEQ_CLS if is_decoder_only(family) else None):
        return False
    return method not in (None, *DAILY) or (task not in (None, FAMILIES[family].tasks[0]))


def cases(
    methods: tuple[str, ...] = tuple(METHODS),
    families: tuple[str, ...] = tuple(FAMILIES),
    tasks: tuple[str, ...] = CONTRACT,
) -> list[tuple[str, str, str]]:
    """Every (family, task, method) that goes together; ``conftest`` marks those as slow that ``is_slow`` names."""
    return [
        (family, task, method)
        for family in families
        for task in FAMILIES[family].tasks
        for method in methods
        if task in tasks and takes(family, method) and (method != "cpt" or task == CAUSAL_LM)
    ]


def family_config(family: str, **overrides: Any) -> PretrainedConfig:
    """A family's config, without dropout."""
    row = FAMILIES[family]
    special = {"pad_token_id": PAD, "eos_token_id": 2, "bos_token_id": 0}
    return row.config(vocab_size=VOCABULARY, **row.sizes | dict.fromkeys(row.dropout, 0.0) | special | overrides)


@cache
def _base_model(family: str, task: str, seed: int, overrides: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    labels = {"num_labels": 3} if task in (SEQ_CLS, TOKEN_CLS) else {}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AUTO[task].from_config(family_config(family, **labels, **dict(overrides)))
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
    """Set everything that the active adapter trains, and its frozen tokens, to random numbers."""
    generator = torch.Generator().manual_seed(seed)
    trained_tensors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = f"prompt_encoder.{model.active_adapter}.frozen_embedding"
    kept = [buffer for name, buffer in model.named_buffers() if name == frozen]
    with torch.no_grad():
        for tensor in (*trained_tensors, *kept):
            tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
    return model


def save_adapter(model: str, folder: Path, config: PeftConfig, seed: int) -> None:
    """Write an adapter of random numbers on the decoder in a folder."""
    adapted = PeftModel(AutoModelForCausalLM.from_pretrained(model), config)
    scramble(adapted, seed=seed).save_pretrained(folder)


def trained(model: PeftModel) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def texts(family: str, task: str, lengths: tuple[int, ...] = (7, 4, 2)) -> list[Tensor]:
    """Rows of token ids of these lengths; each ends with the end token where the classifier reads it."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]
    if FAMILIES[family].ends_with_eos and task == SEQ_CLS:
        for row in rows:
            row[-1] = 2
    return rows


def sides(family: str, task: str) -> tuple[str, ...]:
    """The sides on which padding leaves the plain model's answers alone."""
    return FAMILIES[family].pads.get(task, ("right", "left"))


def head_names(family: str, task: str) -> set[str]:
    """Names of the parameters that the task's class adds to the base model, but for a language head."""
    model = base_model(family, task)
    inner = f"{model.base_model_prefix}."
    has_words = task in (CAUSAL_LM, SEQ_2_SEQ_LM)
    return set() if has_words else {n for n, _ in model.named_parameters() if not n.startswith(inner)}


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
        return answers(task, len(ids))["decoder_input_ids"].index_fill(1, torch.tensor([3]), -100)
    return ids.masked_fill(inputs["attention_mask"].cumsum(1) <= 2, -100).masked_fill(
        inputs["attention_mask"] == 0, -100
    )


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """That no gradient's error is more than a share of the norm of all of them together, nor a hundred times that share
    of its own.

    What comes down from the model is rounded in proportion to its own size, and more or less so by the order in which a
    machine adds. A parameter behind it that has but little of it, as an LSTM's, gets the rounding of the whole.
    """
    assert found.keys() == expected.keys()
    whole = max(1.0, sum(float(gradient.norm()) ** 2 for gradient in expected.values()) ** 0.5)
    for name, gradient in expected.items():
        error, own = float((found[name] - gradient).norm()), float(gradient.norm())
        assert error <= tolerance * whole, f"{name} differs by {error:.1e}, all together have {whole:.3g}"
        assert error <= max(100 * tolerance * own, tolerance), f"{name} differs by {error:.1e} of {own:.3g}"
