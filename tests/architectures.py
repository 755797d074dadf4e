"""Tiny models of every architecture that transformers has, built from its config class by general rules.

Sizes that configs have in common are small numbers that go together; a row of ``HINTS`` holds what a config needs
beside them. Knows nothing about adapters.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

TASKS = {
    "CAUSAL_LM": "CAUSAL_LM",
    "SEQ_2_SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM": "MASKED_LM",
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "QUESTION_ANSWERING",
}
"""Kinds of models, by softtune's names for their tasks, and what transformers calls their auto mappings."""
VOCABULARY = 160
LARGEST = 20_000_000
"""Parameters of a model that is still called tiny."""

_NAMES: dict[int, str] = {
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers depth "
    "num_key_value_heads num_kv_heads n_head_kv multi_query_group_num linear_num_key_heads num_experts_per_tok "
    "num_experts_per_token moe_topk moe_top_k index_n_heads swa_num_key_value_heads num_encoder_layers "
    "num_hidden_groups",
    1: "n_group n_groups topk_group mamba_n_groups first_k_dense_replace num_nextn_predict_layers",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "linear_num_value_heads num_experts num_local_experts n_routed_experts moe_num_experts time_step_rank "
    "swa_num_attention_heads linear_num_heads",
    8: "qk_rope_head_dim qk_nope_head_dim mamba_n_heads mamba_num_heads rotary_dim state_size mamba_d_state "
    "ssm_state_size index_topk",
    16: "head_dim d_kv v_head_dim qk_head_dim kv_lora_rank q_lora_rank linear_key_head_dim linear_value_head_dim "
    "index_head_dim mamba_d_head mamba_head_dim dim_head d_head linear_head_dim swa_head_dim global_head_dim "
    "kv_channels",
    32: "moe_intermediate_size shared_expert_intermediate_size embedding_size chunk_size image_size "
    "mamba_chunk_size hidden_size_per_layer_input num_mel_bins",
    64: "hidden_size d_model n_embd dim emb_dim intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff "
    "ffn_hidden_size hidden_dim d_inner inner_dim n_inner lru_width attention_hidden_size "
    "moe_shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp output_dim "
    "pooler_hidden_size dense_intermediate_size",
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    256: "max_position_embeddings n_positions max_source_positions max_target_positions",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
MOST_LAYERS = 8
"""So many, at most, that each kind of layer comes once."""
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BERT = {
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
HINTS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"linear_head_dim": 16, "head_dim": 16},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": _PLAIN_ROPE},
    "encoder-decoder": {
        "encoder": _BERT,
        "decoder": {**_BERT, "is_decoder": True, "add_cross_attention": True},
        "decoder_start_token_id": 0,
        "pad_token_id": 1,
    },
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 4, "pad_token_id": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96, "num_attention_heads": 4},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "gemma3n_text": {"num_hidden_layers": 5, "num_kv_shared_layers": 0, "intermediate_size": [64] * 5},
    "dots1": {"mlp_layer_types": None},
    "dots3_note": {"num_key_value_heads": 4},
    "ernie4_5_moe": {"moe_k": 2},
    "esmc": {"num_key_value_heads": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "longcat_flash": {"expert_ffn_hidden_size": 32, "ffn_hidden_size": 64, "zero_expert_num": 2},
    "longformer": {"attention_window": [4, 4]},
    "luke": {"entity_vocab_size": 60, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "perceiver": {"d_latents": 32, "num_latents": 16, "num_self_attends_per_block": 2, "qk_channels": 32},
    "squeezebert": {"embedding_size": 64},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32]},
}
"""By a config's ``model_type``, fields that the general rules do not get right."""


def architectures() -> Iterator[tuple[str, str, str]]:
    """Every task, a config's ``model_type`` and the name of a class that transformers' auto mappings have for them."""
    for task, name in TASKS.items():
        mapping = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES")
        seen = set()
        for model_type, classes in mapping.items():
            for name in classes if isinstance(classes, (tuple, list)) else (classes,):
                if name not in seen:
                    seen.add(name)
                    yield task, model_type, name


def build(model_type: str, class_name: str) -> PreTrainedModel:
    """A tiny random model without dropout, in evaluation mode, whose every parameter matters."""
    import transformers

    own = getattr(transformers, class_name)
    config = tiny_config(own.config_class or CONFIG_MAPPING[model_type])
    with torch.device("meta"):
        count = sum(p.numel() for p in own(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters are not tiny")
    torch.manual_seed(0)
    model: PreTrainedModel = own(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.nan_to_num_().add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_config(own: type[PretrainedConfig]) -> PretrainedConfig:
    """A small config of a class, with small ones of the models that it is made of."""
    return own(**_fields(own))


def _fields(own: type[PretrainedConfig]) -> dict[str, Any]:
    hints = HINTS.get(own.model_type, {})
    try:
        default = own()
    except Exception:
        return dict(hints)
    values = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if name in SIZES and isinstance(value, int) and not isinstance(value, bool) and value:
            fields[name] = min(SIZES[name], value)
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCABULARY:
            fields[name] = random.Random(name).randrange(100, VOCABULARY - 4)
        elif "drop" in name and isinstance(value, float):
            fields[name] = 0.0
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        if isinstance(values.get(name), list) or (values.get(name) or 0) >= VOCABULARY:
            fields[name] = {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}[name]
    if values.get("pad_token_id") is None and "pad_token_id" in values:
        fields["pad_token_id"] = 1
    for name in ("head_dim", "num_key_value_heads", "num_experts_per_tok"):
        if name in values and values[name] is None:
            fields[name] = SIZES[name]
    if values.get("qk_rope_head_dim"):  # keys of several heads are made of one latent
        fields |= {"head_dim": SIZES["qk_rope_head_dim"], "num_key_value_heads": SIZES["num_attention_heads"]}
    if values.get("is_encoder_decoder") and values.get("decoder_start_token_id") is None:
        fields["decoder_start_token_id"] = 0
    fields |= _layers(values)
    for name in own.sub_configs or {}:
        if isinstance(part := values.get(name), PretrainedConfig):
            fields[name] = {"model_type": part.model_type, **_fields(type(part))}
    return fields | hints


def _layers(values: dict[str, Any]) -> dict[str, Any]:
    """How many layers there are, and the lists that say something of each."""
    counts = {name: values[name] for name in LAYERS if isinstance(values.get(name), int)}
    if not counts:
        return {}
    before = next(iter(counts.values()))
    lists = {n: v for n, v in values.items() if isinstance(v, list) and len(v) == before and before > 2}
    kinds = [kind for kind in lists.values() if all(isinstance(x, str) for x in kind)]
    count = min(2, before)
    while count < min(before, MOST_LAYERS) and any({*kind[:count]} < {*kind} for kind in kinds):
        count += 1
    return {**dict.fromkeys(counts, count), **{name: value[:count] for name, value in lists.items()}}
