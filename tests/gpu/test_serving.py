"""A server's engine on a device writes what ``generate`` writes there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from softtune import TaskType
from softtune.pretrained import LoadOptions
from softtune.serving.bases import Bases
from tests.families import CAUSAL_LM, METHODS, save_adapter
from tests.serving.stepping import Served
from tests.tiny import save_models

TEXTS = ["the sky is blue", "good text : bad", "red", "cold warm cold warm the green sky label : is"]
METHODS_SERVED = ("prompt", "prompt_suffix", "prefix", "infix", "bitfit_added")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_models(tmp_path_factory.mktemp("models"), attention_dropout=0.0)["llama"]


@pytest.fixture(scope="module")
def adapters(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, method in enumerate(METHODS_SERVED):
        save_adapter(llama, folder / method, METHODS[method](task_type=CAUSAL_LM), seed)
    return folder


def test_texts_of_many_adapters(device: torch.device, llama: str, adapters: Path, tmp_path: Path) -> None:
    served = Served(llama, adapters, tmp_path, device=device)
    asked = [(name, text, 3 + 5 * (i % 3)) for i, text in enumerate(TEXTS) for name in served.names]
    jobs = [served.write(name, text, max_tokens=tokens) for name, text, tokens in asked]
    served.finish()
    for (name, text, tokens), (job, _, failures) in zip(asked, jobs, strict=True):
        assert not failures
        assert job.output_ids == served.expected(name, text, tokens), (name, text)


def test_a_base_of_a_server_is_on_the_device(device: torch.device, llama: str) -> None:
    bases = Bases(llama, LoadOptions(device=device.type))
    assert bases.model(TaskType.CAUSAL_LM).device.type == device.type
