"""Gradients through reentrant checkpointing, against those of the same layers without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softtune.backbone import Place, Site
from softtune.injection.reentrant import Anchor
from softtune.methods.prompt import KeyValue

LAYERS = 3
Prefixes = dict[Place, KeyValue]


def prefixes(frozen: tuple[int, ...] = ()) -> Prefixes:
    """Each layer's prefix of two virtual tokens; those of frozen layers need no gradients."""
    found = {}
    for number in range(LAYERS):
        needs = number not in frozen
        sizes = ((1, 2, 3), (1, 2, 4))
        pair = [torch.randn(size, dtype=torch.double, requires_grad=needs) for size in sizes]
        found[Site.DECODER, number] = KeyValue(*pair)
    return found


def layer(states: Tensor, prefix: KeyValue) -> Tensor:
    """Something of states [B, S, D] that depends on all of a prefix, and not linearly."""
    return (states * prefix.key.sum()).sin() + prefix.value.square().sum() * states


def plain(states: Tensor, given: Prefixes) -> Tensor:
    for prefix in given.values():
        states = layer(states, prefix)
    return states


def checkpointed(states: Tensor, given: Prefixes) -> Tensor:
    """The same layers, each of which reaches its prefix other than as an argument."""
    anchor = Anchor(given)
    states = anchor.tie(states)
    for prefix in anchor.prefixes.values():
        states = checkpoint(lambda x, prefix=prefix: layer(x, prefix), states, use_reentrant=True)
    return states


def gradients(given: Prefixes) -> list[Tensor | None]:
    """A copy of each part's gradient, which is then dropped."""
    parts = [part for prefix in given.values() for part in prefix]
    found = [None if part.grad is None else part.grad.clone() for part in parts]
    for part in parts:
        part.grad = None
    return found


def assert_same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert len(found) == len(expected) == 2 * LAYERS
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def states_of(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape, dtype=torch.double, **options)


@pytest.mark.parametrize("frozen", [(), (1,), (0, 2)])
@pytest.mark.parametrize("trains_input", [False, True])
def test_gradients_are_those_without_checkpointing(frozen: tuple[int, ...], trains_input: bool) -> None:
    given, states = prefixes(frozen), states_of(2, 3, 5, requires_grad=trains_input)
    expected_output = plain(states, given)
    expected_output.cos().sum().backward()
    expected, of_input = gradients(given), states.grad
    states.grad = None
    output = checkpointed(states, given)
    torch.testing.assert_close(output, expected_output)
    output.cos().sum().backward()
    assert_same(gradients(given), expected)
    if trains_input:
        torch.testing.assert_close(states.grad, of_input)
    else:
        assert states.grad is None


def test_gradients_reach_what_computes_the_prefixes() -> None:
    weight = states_of(2, 3, requires_grad=True)

    def computed() -> Prefixes:
        return {(Site.DECODER, n): KeyValue(weight[None] * (n + 1), weight.exp()[None]) for n in range(LAYERS)}

    states = states_of(1, 2, 3)
    (expected,) = torch.autograd.grad(plain(states, computed()).sum(), weight)
    checkpointed(states, computed()).sum().backward()
    torch.testing.assert_close(weight.grad, expected)


def test_each_backward_pass_gives_its_gradients_once() -> None:
    """Two steps that add their gradients up, as under gradient accumulation, and one that starts anew."""
    given = prefixes()
    batches = [states_of(1, 2, 3), states_of(2, 1, 3)]
    for states in batches:
        plain(states, given).sum().backward()
    expected = gradients(given)
    for states in batches:
        checkpointed(states, given).sum().backward()
    assert_same(gradients(given), expected)
    plain(batches[0], given).sum().backward()
    expected = gradients(given)
    checkpointed(batches[0], given).sum().backward()
    assert_same(gradients(given), expected)


def test_two_outputs_of_one_anchor_add_up() -> None:
    """A stack whose embeddings are looked up twice ties both."""
    given = prefixes()
    first, second = states_of(1, 2, 3), states_of(2, 1, 3)
    (plain(first, given).sum() + plain(second, given).sum()).backward()
    expected = gradients(given)
    anchor = Anchor(given)
    total = torch.zeros((), dtype=torch.double)
    for states in (first, second):
        states = anchor.tie(states)
        for prefix in anchor.prefixes.values():
            states = checkpoint(lambda x, prefix=prefix: layer(x, prefix), states, use_reentrant=True)
        total = total + states.sum()
    total.backward()
    assert_same(gradients(given), expected)


def test_a_prefix_that_no_layer_reads_has_no_gradient() -> None:
    given = prefixes()
    anchor = Anchor(given)
    unread, *read = anchor.prefixes.values()
    states = anchor.tie(states_of(1, 2, 3))
    for prefix in read:
        states = checkpoint(lambda x, prefix=prefix: layer(x, prefix), states, use_reentrant=True)
    states.sum().backward()
    found = gradients(given)
    assert found[:2] == [None, None]
    assert all(gradient is not None for gradient in found[2:])
    assert unread.key.grad is unread.value.grad is None


def test_leaves_stand_in_for_the_prefixes() -> None:
    given = prefixes(frozen=(1,))
    anchor = Anchor(given)
    assert [*anchor.prefixes] == [*given]
    for place, leaves in anchor.prefixes.items():
        for leaf, part in zip(leaves, given[place], strict=True):
            assert torch.equal(leaf, part)
            assert leaf.is_leaf
            assert leaf.requires_grad is part.requires_grad
            assert leaf is not part
            assert leaf.data_ptr() == part.data_ptr()


def test_tied_states_are_the_same_and_need_a_gradient() -> None:
    states = states_of(1, 2, 3)
    for frozen in ((), (0, 1, 2)):
        tied = Anchor(prefixes(frozen)).tie(states)
        assert torch.equal(tied, states)
        assert tied.requires_grad
    assert not states.requires_grad
    assert Anchor({}).tie(states).requires_grad
