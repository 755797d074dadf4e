"""Tiny models that vLLM's kernels take, and adapters on them. Where vLLM is missing, its tests are not collected."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from softtune import PeftConfig, PrefixTuningConfig
from tests.families import CAUSAL_LM, METHODS, save_adapter
from tests.tiny import WORDS, save_models, tokenizer

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

os.environ |= {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, where a failure can be seen
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_CI_ENV": "1",  # nothing is compiled
    "TORCHDYNAMO_DISABLE": "1",
}

LENGTHS = (1, 31, 32, 33, 70)
"""Virtual tokens around the size of a block."""
POSITIONS = 256


def save_model(folder: Path, family: str) -> str:
    """A tiny model of random numbers with a tokenizer; its heads have a size that vLLM's kernels know."""
    if family == "llama":
        more = {"head_dim": 32, "max_position_embeddings": POSITIONS, "attention_dropout": 0.0}
        return save_models(folder, **more)["llama"]
    size = {"vocab_size": len(WORDS) + 3, "pad_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3}
    models: dict[str, Callable[[], Any]] = {
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(**size, n_embd=64, n_layer=3, n_head=2, n_positions=POSITIONS, attn_pdrop=0.0)
        ),
        "qwen3": lambda: Qwen3ForCausalLM(
            Qwen3Config(
                **size,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=6,
                num_key_value_heads=2,
                head_dim=32,
                intermediate_size=48,
                max_position_embeddings=POSITIONS,
            )
        ),
    }
    torch.manual_seed(0)
    models[family]().save_pretrained(folder / family)
    tokenizer(ends=False).save_pretrained(folder / family)
    return str(folder / family)


@pytest.fixture(scope="session", params=["llama", "gpt2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model's folder."""
    return save_model(tmp_path_factory.mktemp("models"), request.param)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama's folder."""
    return save_model(tmp_path_factory.mktemp("models"), "llama")


@pytest.fixture(scope="session")
def adapters(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prefixes of many lengths, and an adapter of each other method that vLLM takes."""
    folder = tmp_path_factory.mktemp("adapters")
    configs: dict[str, PeftConfig] = {
        **{f"prefix_{n}": PrefixTuningConfig(num_virtual_tokens=n, task_type=CAUSAL_LM) for n in LENGTHS},
        **{
            kind: METHODS[kind](task_type=CAUSAL_LM)
            for kind in ("prompt", "p_tuning_lstm", "p_tuning_v2", "prompt_suffix")
        },
    }
    for seed, (name, config) in enumerate(configs.items()):
        save_adapter(model, folder / name, config, seed)
    return folder
