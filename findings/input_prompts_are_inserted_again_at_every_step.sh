#!/usr/bin/env bash
# The guess: generate of PEFT's prompt tuning puts the virtual tokens in front of the text once, and greedy decoding with a
# cache gives what forward calls over the growing text give. What happens with transformers 5.24: the cache goes by another
# name than PEFT looks for, so that each step takes itself for the first one, and the virtual tokens are inserted again in
# front of every new token. The tokens are others than without a cache, without an error. P-tuning, CPT and multitask prompt
# tuning go the same way; use_cache=False is right.
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

P, STEPS = 4, 5
ids = torch.tensor([[5, 6, 7]])
size = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
print(f"peft {peft.__version__}, transformers {transformers.__version__}")
for config, fields in (
    (peft.PromptTuningConfig, {"num_virtual_tokens": P}),
    (peft.PromptEncoderConfig, {"num_virtual_tokens": P}),
    (peft.CPTConfig, {"cpt_token_ids": [9, 8, 4, 3], "cpt_tokens_type_mask": [1, 2, 3, 4]}),
):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**size, initializer_range=1.0, pad_token_id=0, eos_token_id=None)).eval()
    model = peft.get_peft_model(base, config(task_type="CAUSAL_LM", **fields)).eval()
    read = []
    base.model.register_forward_pre_hook(
        lambda _, args, call: read.append(call["inputs_embeds"].shape[1]), with_kwargs=True
    )
    found = {}
    with torch.no_grad():
        for use_cache in (True, False):
            read.clear()
            tokens = model.generate(input_ids=ids, max_new_tokens=STEPS, do_sample=False, use_cache=use_cache)
            found[use_cache] = tokens[0, 3:].tolist()
            print(f"{config.__name__}, use_cache={use_cache}: steps read {read} vectors, and write {found[use_cache]}")
            if use_cache:
                assert read == [P + 3, *[P + 1] * (STEPS - 1)], "the prompt is inserted once now"
        text = ids
        for _ in range(STEPS):
            text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], dim=1)
    assert found[False] == text[0, 3:].tolist()
    print(f"{config.__name__}: with a cache the tokens are {'the same' if found[True] == found[False] else 'others'}")
PYTHON
