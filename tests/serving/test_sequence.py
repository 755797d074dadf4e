"""Texts of many adapters in one pool give the logits that each has alone, however they are cut into steps."""

from __future__ import annotations

import random

import pytest
import torch

from softtune import PeftModel, UnsupportedModelError
from softtune.injection.kv_pool import KVPool
from softtune.methods.base import Prompt
from softtune.serving.prompt_export import export_prompt
from softtune.serving.sequence import LoadedPrompt, ScheduledChunk, TokenSequence, run_chunks
from tests.families import CAUSAL_LM, FAMILIES, KINDS, base_model, texts
from tests.test_rows import mixed

DECODERS = [f for f, row in FAMILIES.items() if CAUSAL_LM in row.tasks]
SLOTS = 400


def held(model: PeftModel, pool: KVPool, name: str) -> LoadedPrompt:
    return LoadedPrompt.from_prompt(
        pool, Prompt() if name == "__base__" else export_prompt(model.backbone, model.adapter(name))
    )


@pytest.mark.parametrize("family", DECODERS)
def test_logits_are_those_of_each_text_alone(family: str) -> None:
    base = base_model(family, CAUSAL_LM)
    try:
        pool = KVPool(PeftModel(base).backbone, SLOTS)
    except UnsupportedModelError:
        assert not PeftModel(base).backbone.packs
        return
    model, names = mixed(family, CAUSAL_LM, KINDS, base)
    names = [*names, names[0], names[1]]
    words = [row.tolist() for row in texts(family, CAUSAL_LM, [7, 4, 2, 5, 3, 6, 9, 1, 8, 6][: len(names)])]
    by_name = {name: held(model, pool, name) for name in names}
    rows = [TokenSequence.from_input_ids(by_name[name], own) for name, own in zip(names, words, strict=True)]
    expected = []
    for name, own in zip(names, words, strict=True):
        with torch.no_grad():
            expected.append(model(torch.tensor([own]), adapter_names=[name]).logits[0])
    draw = random.Random(0)
    while left := [number for number, text in enumerate(rows) if text.num_pending_tokens]:
        chosen = draw.sample(left, draw.randint(1, len(left)))
        counts = [draw.randint(1, rows[number].num_pending_tokens) for number in chosen]
        readings = [ScheduledChunk(rows[i], count, keep=1) for i, count in zip(chosen, counts, strict=True)]
        for number, logits in zip(chosen, run_chunks(model.backbone, pool, readings), strict=True):
            if not rows[number].num_pending_tokens:
                torch.testing.assert_close(logits[-1], expected[number][-1], atol=1e-4, rtol=1e-4)
