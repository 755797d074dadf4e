"""Graphs of a model with adapters: what ``torch.export`` makes is right for other texts too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softtune import UnsupportedModelError
from tests.families import CAUSAL_LM, SEQ_CLS, VOCABULARY, adapted, batch, texts

METHODS = ["prefix", "prompt", "prompt_suffix", "p_tuning_v2", "bitfit_added"]
MODELS = {"bert": SEQ_CLS, "llama": CAUSAL_LM, "gpt2": CAUSAL_LM}


class Logits(nn.Module):
    """A model with two inputs and one output."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask, **self.options).logits
        return logits


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", MODELS)
def test_a_graph_computes_the_same_of_other_texts(family: str, method: str) -> None:
    task = MODELS[family]
    options = {"use_cache": False} if task == CAUSAL_LM else {}
    model = Logits(adapted(family, task, method), **options).eval()
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        model(ids, mask)
        graph = torch.export.export(model, (ids, mask)).module()
        torch.testing.assert_close(graph(ids.flip(0), mask), model(ids.flip(0), mask), atol=1e-5, rtol=1e-4)
        for side in ("left", "right"):
            padded = batch(texts(family, task, (7, 4)), side)
            call = (padded["input_ids"], padded["attention_mask"])
            shown = padded["attention_mask"] != 0 if task == CAUSAL_LM else slice(None)
            torch.testing.assert_close(graph(*call)[shown], model(*call)[shown], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_graphs_that_cannot_be_right_are_refused() -> None:
    model = Logits(adapted("llama", CAUSAL_LM, "bitfit_added"), use_cache=False)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(UnsupportedModelError, match="call it once, with any text, before"):
        torch.export.export(model, (ids, torch.ones_like(ids)))
    model(ids, torch.ones_like(ids))
    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},) * 2
    with pytest.raises(UnsupportedModelError, match="leave out dynamic_shapes"):
        torch.export.export(model, (ids, torch.ones_like(ids)), dynamic_shapes=shapes)
    with pytest.raises(UnsupportedModelError, match=r"use torch\.export"):
        torch.jit.trace(model, (ids, torch.ones_like(ids)))
