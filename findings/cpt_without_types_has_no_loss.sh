#!/usr/bin/env bash
# The guess: CPTConfig of PEFT without further fields, or with token ids alone, trains: its types default to ones, and those
# of the input to labels. What happens: the input's types are raised by the prompt's highest, from 4 to 5, and 5 is no
# multiple of 4 and so no label. The loss is the mean of nothing, NaN, without an error, and so is one step's adapter. Types
# that the caller passes are raised in place: where the prompt's highest type is no multiple of 4, the same tensor in a second
# call has other labels, and another loss, than in the first.
# peft 0.21.2, transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11; seen 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.tensor([[5, 6, 7, 8]])
size = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def model(**fields):
    torch.manual_seed(0)
    return peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**size)), peft.CPTConfig(task_type="CAUSAL_LM", **fields))


print(f"peft {peft.__version__}, transformers {transformers.__version__}")
for fields in ({}, {"cpt_token_ids": [9, 10, 11]}):
    loss = model(**fields)(input_ids=ids, labels=ids).loss
    print(f"CPTConfig({fields}): the loss of a batch with labels is {loss.item()}")
    assert torch.isnan(loss), "the input's labels count now"
demonstrated = model(cpt_token_ids=[9, 10, 11], cpt_tokens_type_mask=[1, 2, 4])
types = torch.tensor([[1, 2, 3, 4]])
losses = []
for _ in range(2):
    before = types.tolist()
    losses.append(demonstrated(input_ids=ids, labels=ids, input_type_mask=types).loss.item())
    print(f"types {before}: loss {losses[-1]:.6f}; the caller's tensor is {types.tolist()} afterwards")
assert types.tolist() == [[9, 10, 11, 12]], "the caller's tensor stays as it is now"
odd = model(cpt_token_ids=[9, 10, 11, 12], cpt_tokens_type_mask=[1, 2, 4, 5])
types = torch.tensor([[1, 2, 3, 4]])
losses = [odd(input_ids=ids, labels=ids, input_type_mask=types).loss.item() for _ in range(2)]
print(f"a prompt whose types end with 5: the same call twice gives {losses[0]:.6f} and {losses[1]:.6f}")
assert losses[0] != losses[1], "both calls give one loss now"
PYTHON
