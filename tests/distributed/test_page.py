"""The memory that docs/distributed.md tells is computed from the sizes of the model that transformers makes."""

from __future__ import annotations

from pathlib import Path

import torch
from benchmarks.large_models import LLAMA_70B, Sizes, table
from transformers import LlamaForCausalLM

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def test_the_sizes_are_those_of_the_model() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA_70B)
    sizes = Sizes(LLAMA_70B)
    assert sizes.total == sum(p.numel() for p in model.parameters())
    linear = [m.weight.numel() for m in model.model.layers[0].modules() if isinstance(m, torch.nn.Linear)]
    assert sizes.layer == sum(linear)


def test_the_page_has_the_table() -> None:
    assert table() in PAGE.read_text(encoding="utf-8")
