"""What is decided otherwise while a model is exported, and which graphs are refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softtune import UnsupportedModelError
from softtune.injection.graphs import check_graph, holds, is_exporting

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own

KNOWN: Any = SimpleNamespace(is_known=True)
UNKNOWN: Any = SimpleNamespace(is_known=False)


class Calling(nn.Module):
    """Calls a function while it runs."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        self.function(x)
        return x + 1


def exported(function: Callable[[Tensor], Any], x: Tensor, **options: Any) -> Any:
    """What a function returns while it is exported."""
    found = []
    torch.export.export(Calling(lambda x: found.append(function(x))), (x,), strict=False, **options)
    return found[0]


def test_exporting_is_noticed_while_it_lasts() -> None:
    assert not is_exporting()
    assert exported(lambda x: is_exporting(), torch.ones(2))
    assert not is_exporting()


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("default", [True, False])
def test_a_condition_is_looked_at_only_where_there_is_one_batch(value: bool, default: bool) -> None:
    assert holds(torch.tensor(value), when_exporting=default) is value
    x = torch.ones(2) if value else torch.zeros(2)
    assert exported(lambda x: holds((x > 0).all(), when_exporting=default), x) is default


@pytest.mark.parametrize("text", [None, torch.ones(2, 3), torch.ones(2, 3, 4)])
def test_a_call_that_is_not_traced_needs_no_check(text: Tensor | None) -> None:
    check_graph(KNOWN, text)
    check_graph(UNKNOWN, text)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4)])
def test_a_graph_of_one_shape(shape: tuple[int, ...]) -> None:
    assert exported(lambda x: check_graph(KNOWN, x), torch.ones(shape)) is None
    assert exported(lambda x: check_graph(KNOWN, None), torch.ones(shape)) is None


def test_the_size_of_a_vector_may_be_dynamic() -> None:
    size = torch.export.Dim("size", min=2)
    options = {"dynamic_shapes": ({2: size},)}
    assert exported(lambda x: check_graph(KNOWN, x), torch.ones(2, 3, 4), **options) is None


@pytest.mark.parametrize("dim", [0, 1])
def test_a_graph_of_many_shapes_is_refused(dim: int) -> None:
    options = {"dynamic_shapes": ({dim: torch.export.Dim("size", min=2)},)}
    with pytest.raises(UnsupportedModelError, match="a graph is for one shape: leave out dynamic_shapes"):
        exported(lambda x: check_graph(KNOWN, x), torch.ones(2, 3), **options)


def test_a_graph_of_a_model_that_has_not_run_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has not run yet: call it once, with any text, before"):
        exported(lambda x: check_graph(UNKNOWN, x), torch.ones(2, 3))


def test_tracing_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"keeps the shapes of one batch: use torch\.export"):
        torch.jit.trace(Calling(lambda x: check_graph(KNOWN, x)), torch.ones(2, 3))
