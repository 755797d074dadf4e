"""What an engine computes with: as many threads as it is told, or the fastest, and prepacked weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from softtune.backbone import Backbone
from softtune.backbone.prepacked_weights import PrepackedLinear
from softtune.serving import threads
from softtune.serving.engine_config import EngineConfig
from softtune.serving.service import Service
from softtune.serving.threads import fastest_num_threads
from tests.injection.test_sparse_logits import llama
from tests.tiny import save_models


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("most", [1, 2, 3, 8, 12])
def test_the_fastest_of_the_powers_of_two_and_the_most(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(most)
    tried, limits = list[int](), list[float]()

    def seconds(weights: Any, number: int, limit: float) -> float:
        tried.append(number)
        limits.append(limit)
        return abs(number - 3)

    monkeypatch.setattr(threads, "_seconds", seconds)
    expected = {1: [], 2: [1, 2], 3: [1, 2, 3], 8: [1, 2, 4, 8], 12: [1, 2, 4, 8, 12]}
    found = fastest_num_threads(Backbone(llama()))
    assert tried == expected[most]
    assert sum(limits) == pytest.approx(0.5 if tried else 0)
    assert found == min(tried or [1], key=lambda number: abs(number - 3))
    assert torch.get_num_threads() == most


def test_it_takes_no_longer_than_it_is_given() -> None:
    torch.set_num_threads(2)
    start = threads.time.perf_counter()
    assert fastest_num_threads(Backbone(llama()), seconds=0.1) in (1, 2)
    assert threads.time.perf_counter() - start < 2


def test_a_model_elsewhere_is_not_tried() -> None:
    torch.set_num_threads(2)
    backbone = Backbone(llama())
    backbone.model.to("meta")
    assert fastest_num_threads(backbone) == 2


@pytest.mark.parametrize(("given", "taken"), [(None, 3), (2, 2), (0, 1)])
def test_an_engine_takes_what_it_is_told(
    given: int | None, taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softtune.serving.service.fastest_num_threads", lambda backbone: 1)
    torch.set_num_threads(3)
    service = Service(save_models(tmp_path)["llama"], EngineConfig(threads=given))
    assert torch.get_num_threads() == taken
    service.close(0)


@pytest.mark.parametrize("prepack", [True, False])
def test_an_engine_computes_from_prepacked_weights_until_it_is_closed(prepack: bool, tmp_path: Path) -> None:
    service = Service(save_models(tmp_path)["llama"], EngineConfig(prepack_weights=prepack))
    head = service.engine.backbone.model.lm_head
    assert isinstance(vars(head).get("forward"), PrepackedLinear) is prepack
    service.close(0)
    assert "forward" not in vars(head)
