#!/usr/bin/env bash
# The guess: transformers' Trainer with label_smoothing_factor smooths the loss of the next token for a causal language
# model, whether it is trained itself or through PEFT's prefix tuning. What happens: to learn whether labels have to be
# shifted, the Trainer asks base_model.model for the name of its class. That is the base model under PEFT's LoRA; PEFT's
# prompts have the base model as base_model, so that on a Llama the name is the inner model's, which is in no list of
# language models: each position is scored against the token that it has just read, without a message. On a GPT-2, which
# has no attribute of that name, the same call ends in an AttributeError.
# transformers 5.24.0, peft 0.21.2, torch 2.13.0 (CPU); seen 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet torch==2.13.0 numpy
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet transformers==5.24.0 peft==0.21.2 accelerate==1.15.0
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import peft
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

print(f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
smoothing, ids = 0.1, torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(1))
rows = [{"input_ids": row, "labels": row} for row in ids]


def smoothed(logits, labels):
    log = torch.log_softmax(logits.float(), -1)
    own = -log.gather(-1, labels[..., None])[..., 0]
    return float(((1 - smoothing) * own - smoothing * log.mean(-1)).mean())


def evaluated(model):
    arguments = TrainingArguments(
        "out", label_smoothing_factor=smoothing, per_device_eval_batch_size=4, report_to="none", use_cpu=True
    )
    return Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes, initializer_range=0.5)).eval()


base = llama()
with torch.no_grad():
    logits = base(input_ids=ids).logits
plain = evaluated(base)
shares = [smoothed(logits[:, :-1], ids[:, 1:]) * share for share in (1, 8 / 9)]
assert min(abs(plain - share) for share in shares) < 1e-3, "the base model alone is not shifted either"
prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
model = peft.get_peft_model(llama(), prefix).eval()
with torch.no_grad():
    logits = model(input_ids=ids).logits
found, unshifted, shifted = evaluated(model), smoothed(logits, ids), smoothed(logits[:, :-1], ids[:, 1:])
print(f"Llama alone {plain:.4f}, with PEFT's prefix {found:.4f}; by hand {shifted:.4f} shifted, {unshifted:.4f} unshifted")
assert abs(found - unshifted) < 1e-3 < abs(found - shifted), "the labels are shifted now"
torch.manual_seed(0)
gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2))
try:
    evaluated(peft.get_peft_model(gpt2, prefix))
except AttributeError as error:
    print(f"GPT-2: AttributeError: {error}")
else:
    raise SystemExit("GPT-2 has an answer now")
PYTHON
