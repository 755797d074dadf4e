#!/usr/bin/env bash
# The guess: a tensor that says is_contiguous() is multiplied as fast as any other. What happens: the last of several
# tokens, states[:, -1:] of one row, is contiguous by the rules (dimensions of size 1 do not count) but keeps the strides
# of the text. In bfloat16 on a CPU, torch's linear then does not take oneDNN's kernel, and a language head's product
# takes tens of times as long; clone() and contiguous() keep the strides and do not help, a view to two dimensions does.
# That is the call of transformers' generate for the first token behind a prompt. In float32 both are as fast.
# torch 2.13.0 (CPU), Python 3.11, AMD EPYC with avx512_bf16; seen 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet torch==2.13.0 numpy
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import time

import torch
from torch.nn.functional import linear


def seconds(states, weight):
    linear(states, weight)
    start = time.perf_counter()
    for _ in range(3):
        linear(states, weight)
    return (time.perf_counter() - start) / 3


torch.manual_seed(0)
ratios = {}
for dtype in (torch.bfloat16, torch.float32):
    text, head = torch.randn(1, 3, 2048, dtype=dtype), torch.randn(16000, 2048, dtype=dtype)
    last = text[:, -1:]
    assert last.is_contiguous()
    assert last.contiguous().stride() == last.clone().stride() == last.stride() == (6144, 2048, 1)
    plain = last.view(-1, 2048).view(last.shape)
    assert plain.stride() == (2048, 2048, 1)
    ratios[dtype] = seconds(last, head) / seconds(plain, head)
    print(f"torch {torch.__version__}, {dtype}: sliced {ratios[dtype]:.1f} times as long as laid out anew")
assert ratios[torch.bfloat16] > 5, "bfloat16 is as fast now"
assert ratios[torch.float32] < 3, "float32 is slow too now"
PYTHON
