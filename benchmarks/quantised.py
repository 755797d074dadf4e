"""Memory of base models quantised by other packages: of their weights, and of a training step.

A Llama of 105 million random weights, 90 million of which are in layers that are quantised; a prefix of 30 virtual
tokens is trained on eight rows of 64 tokens. Run alone: ``make bench-quant``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from memory import apart, resident
from step import LENGTH, ROWS, forward_backward
from timing import measure, report
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from softtune import PrefixTuningConfig, get_peft_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.quantised import QUANTISATIONS, load, tensors_of

MEGA = 10**6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = (*DTYPES, *QUANTISATIONS)
SIZE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 7000}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SIZE, **HEADS)).save_pretrained(folder)
        measures = []
        for kind in KINDS:
            measures += [measure(f"{kind}: {what}", apart(__file__, what, kind, folder), None) for what in MEASURES]
    report("quantised", measures)


def base_of(kind: str, folder: str) -> PreTrainedModel:
    return load(folder).to(DTYPES[kind]) if kind in DTYPES else QUANTISATIONS[kind].load(folder)


def step_of(kind: str, folder: str) -> Any:
    """A training step of a prefix, which has run once."""
    model = get_peft_model(base_of(kind, folder), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30))
    ids = torch.randint(3, SIZE["vocab_size"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    step = forward_backward(model.train(), {"input_ids": ids, "labels": ids})
    step()
    return step


def base_bytes(kind: str, folder: str) -> float:
    return sum(tensor.nbytes for tensor in tensors_of(base_of(kind, folder)).values()) / MEGA


def step_bytes(kind: str, folder: str) -> float:
    """Bytes that a step needs beyond those resident before."""
    before, most = resident(step_of(kind, folder))
    return (most - before) / MEGA


MEASURES = {"MB of weights": base_bytes, "MB of a step beyond them": step_bytes}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        what, *arguments = sys.argv[1:]
        print(MEASURES[what](*arguments))
    else:
        main()
