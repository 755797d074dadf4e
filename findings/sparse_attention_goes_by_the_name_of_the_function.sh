#!/usr/bin/env bash
# The guess: an attention function that one registers with transformers and that only calls the stock sdpa function leaves a
# model's outputs as they are. What happens: DeepSeek V3.2 applies the mask of its sparse indexer only where the config's
# attention function is called "eager" or "sdpa"; under any other name it hands the indices to the function as a keyword
# argument instead, which the stock function ignores. Attention is dense then, in texts longer than index_topk, without a
# word.
# transformers 5.24.0, torch 2.13.0 (CPU), Python 3.11; seen 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet torch==2.13.0 transformers==5.24.0
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DeepseekV32Config, DeepseekV32ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

AttentionInterface.register("same", sdpa_attention_forward)
AttentionMaskInterface.register("same", sdpa_mask)
config = DeepseekV32Config(
    vocab_size=60, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=8, head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    first_k_dense_replace=2, index_topk=2, index_n_heads=2, index_head_dim=16, initializer_range=0.5,
)
torch.manual_seed(0)
model = DeepseekV32ForCausalLM(config).eval()
ids = torch.arange(5, 17)[None]
with torch.no_grad():
    expected = model(ids, use_cache=False).logits
    model.set_attn_implementation("same")
    found = model(ids, use_cache=False).logits
moved = float((found - expected).abs().max())
print(f"transformers {transformers.__version__}: sdpa under another name moves the logits by {moved:.3g}")
assert moved > 1e-3, "the name makes no difference now"
PYTHON
