#!/usr/bin/env bash
# The guess: a boolean attention mask [B, 1, T, S], which transformers' sdpa functions take, hides keys from eager attention
# too. What happens: eager_attention_forward of the model files adds the mask to the scores, so that True counts 1 and
# False 0: nothing is hidden, and nobody complains. A ready 4-D mask of truth values handed to a model loaded with
# attn_implementation="eager" is such a mask.
# transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11; seen 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet torch==2.13.0 transformers==5.24.0
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ids, other = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 6, 7, 8]])
mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
mask[..., 0] = False
mask[..., 0, 0] = True  # the first token is seen by itself alone
moved = {}
for attention in ("sdpa", "eager"):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=1.0, attn_implementation=attention)).eval()
    with torch.no_grad():
        first, second = (model(x, attention_mask=mask, use_cache=False).logits[0, 1:] for x in (ids, other))
    moved[attention] = float((first - second).abs().max())
    print(f"transformers {transformers.__version__}, {attention}: a hidden token moves the others by {moved[attention]:.3g}")
assert moved["sdpa"] < 1e-5, "sdpa sees the hidden token now"
assert moved["eager"] > 1e-2, "eager attention hides it now"
PYTHON
