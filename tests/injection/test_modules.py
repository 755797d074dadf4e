"""Changed outputs and inputs of single modules, against those that are changed row by row."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softtune import UnsupportedModelError
from softtune.backbone.roles import BiasSlot
from softtune.compat import CHECKPOINT
from softtune.injection.modules import Additions, ModuleChanges, Scalings

WIDTH, ADAPTERS = 6, 3


class Returning(nn.Module):
    """A module that returns what it gets."""

    def forward(self, output: Any) -> Any:
        return output


class Model(nn.Module):
    """A module in a layer, and a head."""

    def __init__(self, part: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = nn.Sequential()
        self.layer.add_module("part", part or Returning())
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Any) -> Any:
        return self.layer(x)


class Base:
    """What is known of a base model: which modules keep rows in order, and which have heads before tokens."""

    def __init__(self, model: nn.Module, row_modules: tuple[str, ...] = ("layer.part", "head"), by_head: bool = False):
        self.model = model
        self.row_modules = self.row_inputs = frozenset(row_modules)
        self.by_head = by_head

    def is_by_head(self, name: str, *, is_input: bool = False) -> bool:
        return self.by_head


def changes(
    base: Base,
    biases: list[Additions] | None = None,
    heads: list[dict[str, nn.Module]] | None = None,
    rows: Tensor | None = None,
    scalings: list[Scalings] | None = None,
) -> ModuleChanges:
    backbone: Any = base
    return ModuleChanges(backbone, biases or [], heads or [], rows, scalings=scalings or [])


def slot(
    index: Tensor | None = None, role: str | None = None, width: int = WIDTH, *, is_input: bool = False
) -> BiasSlot:
    return BiasSlot("layer.part", role, width, True, index, is_input=is_input)


def added(width: int = WIDTH) -> Tensor:
    return torch.randn(width, requires_grad=True)


# Biases of one adapter


@pytest.mark.parametrize("shape", [(2, WIDTH), (2, 3, WIDTH), (1, 3, WIDTH), (2, 4, 3, WIDTH)])
def test_a_bias_is_added_to_every_token(shape: tuple[int, ...]) -> None:
    model, bias, x = Model(), added(), torch.randn(*shape)
    with changes(Base(model), [[(slot(), bias)]]).applied():
        found = model(x)
    for place in product(*map(range, shape)):
        assert found[place] == x[place] + bias[place[-1]]
    weights = torch.randn(*shape)
    (found * weights).sum().backward()
    torch.testing.assert_close(bias.grad, weights.flatten(0, -2).sum(0))
    assert torch.equal(model(x), x)


def test_biases_of_roles_are_added_to_their_features() -> None:
    """A fused projection whose features are in any order."""
    model, x = Model(), torch.randn(2, 3, WIDTH)
    roles = {"query": torch.tensor([4, 1]), "key": torch.tensor([0, 5, 2])}
    biases = {role: added(len(index)) for role, index in roles.items()}
    own: Additions = [(slot(index, role, len(index)), biases[role]) for role, index in roles.items()]
    with changes(Base(model), [own]).applied():
        found = model(x)
    expected = x.clone()
    for role, index in roles.items():
        for number, feature in enumerate(index.tolist()):
            expected[..., feature] += biases[role][number]
    assert torch.equal(found, expected)
    (found * x).sum().backward()
    for role, index in roles.items():
        torch.testing.assert_close(biases[role].grad, torch.stack([x[..., i].sum() for i in index.tolist()]))


@pytest.mark.parametrize("part", [nn.Conv1d(2, WIDTH, 1), nn.Conv2d(2, WIDTH, 1), nn.BatchNorm1d(WIDTH)])
def test_channels_first(part: nn.Module) -> None:
    shape = {"Conv1d": (2, 2, 5), "Conv2d": (2, 2, 3, 4), "BatchNorm1d": (2, WIDTH)}[type(part).__name__]
    model, bias, x = Model(part.eval()), added(), torch.randn(*shape)
    plain = model(x)
    with changes(Base(model), [[(slot(), bias)]]).applied():
        found = model(x)
    for feature in range(WIDTH):
        torch.testing.assert_close(found[:, feature], plain[:, feature] + bias[feature])


def test_a_bias_has_the_type_of_the_output() -> None:
    model, bias, x = Model(), added(), torch.randn(2, WIDTH).bfloat16()
    with changes(Base(model), [[(slot(), bias)]]).applied():
        found = model(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, x + bias.bfloat16())
    found.sum().backward()
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32


# Each row its own


def each_row(x: Tensor, biases: list[Tensor | None], rows: list[int]) -> Tensor:
    """Rows [B, ..., N] with each adapter's bias, one row after the other."""
    changed = []
    for row, number in zip(x, rows, strict=True):
        bias = biases[number]
        changed.append(row if bias is None else row + bias)
    return torch.stack(changed)


ARRANGEMENTS: dict[str, tuple[bool, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "rows": (False, lambda x: x, lambda x: x),
    "one token": (False, lambda x: x[:, 0], lambda x: x[:, None]),
    "rows by head": (True, lambda x: x[:, None].repeat(1, 3, 1, 1), lambda x: x[:, 2]),
    "tokens behind one another": (False, lambda x: x.flatten(0, 1), lambda x: x),
    "one token a row, in one row": (False, lambda x: x[:, 0][None], lambda x: x[0][:, None]),
    "one token a row, in one row by head": (
        True,
        lambda x: x[:, 0][None, None].repeat(1, 3, 1, 1),
        lambda x: x[0, 2][:, None],
    ),
}
"""Whether heads stand before tokens; rows [B, T, N] as a module returns them, and back."""


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("rows", [[0, 1, 2, 1], [2, 2, 0, 1], [1]])
def test_every_row_gets_the_bias_of_its_adapter(arrangement: str, rows: list[int]) -> None:
    by_head, arrange, restore = ARRANGEMENTS[arrangement]
    tokens = 1 if arrangement.startswith("one token") else 5
    model, x = Model(), torch.randn(len(rows), tokens, WIDTH)
    biases = [added(), None, added()]
    own: list[Additions] = [[] if bias is None else [(slot(), bias)] for bias in biases]
    with changes(Base(model, by_head=by_head), own, rows=torch.tensor(rows)).applied():
        found = restore(model(arrange(x)))
    torch.testing.assert_close(found.view(x.shape), each_row(x, biases, rows))
    weights = torch.randn_like(x)
    (found.view(x.shape) * weights).sum().backward()
    for number in (0, 2):
        gradient = torch.zeros(WIDTH)
        for n, weight in zip(rows, weights, strict=True):
            gradient += weight.sum(0) if n == number else 0
        torch.testing.assert_close(biases[number].grad, gradient)  # type: ignore[union-attr]


def test_rows_of_adapters_with_other_roles() -> None:
    model, x, rows = Model(), torch.randn(3, 2, WIDTH), [1, 0, 2]
    query, key = torch.tensor([1, 3]), torch.tensor([0, 5])
    biases = [added(2), added(2), added(2)]
    own: list[Additions] = [
        [(slot(query, "query", 2), biases[0])],
        [(slot(query, "query", 2), biases[1]), (slot(key, "key", 2), biases[2])],
        [],
    ]
    with changes(Base(model), own, rows=torch.tensor(rows)).applied():
        found = model(x)
    expected = x.clone()
    expected[0][:, query] += biases[1]
    expected[0][:, key] += biases[2]
    expected[1][:, query] += biases[0]
    torch.testing.assert_close(found, expected)


def test_beams_multiply_rows() -> None:
    model, x = Model(), torch.randn(4, 3, WIDTH)
    biases = [added(), added()]
    with changes(Base(model), [[(slot(), bias)] for bias in biases], rows=torch.tensor([1, 0])).applied():
        found = model(x)
    torch.testing.assert_close(found, each_row(x, [*biases], [1, 1, 0, 0]))


# Factors


class Exponential(nn.Module):
    """A module that is not linear, whose argument may have a name."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def exponential(x: Tensor, factor: Tensor | None, *, is_input: bool) -> Tensor:
    """What ``Exponential`` returns where a factor scales its input or output."""
    factor = torch.ones(WIDTH) if factor is None else factor
    return (x * factor).exp() if is_input else x.exp() * factor


@pytest.mark.parametrize("is_input", [True, False])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_factor_scales_an_output_or_an_input(is_input: bool, by_name: bool) -> None:
    model, factor, x = Model(Exponential()), added(), torch.randn(2, 3, WIDTH)
    part = model.get_submodule("layer.part")
    with changes(Base(model), scalings=[[(slot(is_input=is_input), factor)]]).applied():
        found = part(x=x) if by_name else part(x)
    expected = exponential(x, factor, is_input=is_input)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), [factor])
    (found * weights).sum().backward()
    torch.testing.assert_close(factor.grad, gradient)
    assert torch.equal(part(x), x.exp())


def test_factors_of_roles_scale_their_features() -> None:
    model, x = Model(), torch.randn(2, 3, WIDTH)
    roles = {"key": torch.tensor([4, 1]), "value": torch.tensor([0, 5, 2])}
    factors = {role: added(len(index)) for role, index in roles.items()}
    own: Scalings = [(slot(index, role, len(index)), factors[role]) for role, index in roles.items()]
    with changes(Base(model), scalings=[own]).applied():
        found = model(x)
    expected = x.clone()
    for role, index in roles.items():
        for number, feature in enumerate(index.tolist()):
            expected[..., feature] *= factors[role][number].detach()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("part", [nn.Conv1d(2, WIDTH, 1), nn.Conv2d(2, WIDTH, 1)])
def test_factors_of_channels(part: nn.Module) -> None:
    shape = {"Conv1d": (2, 2, 5), "Conv2d": (2, 2, 3, 4)}[type(part).__name__]
    model, factor, x = Model(part), added(), torch.randn(*shape)
    plain = model(x)
    with changes(Base(model), scalings=[[(slot(), factor)]]).applied():
        found = model(x)
    for feature in range(WIDTH):
        torch.testing.assert_close(found[:, feature], plain[:, feature] * factor[feature])


def test_an_output_is_scaled_before_its_bias_is_added_and_a_copy_has_the_last_word() -> None:
    model, x = Model(), torch.randn(2, WIDTH)
    bias, factor, scaling = added(), added(), added()
    own: list[Scalings] = [[(slot(is_input=True), scaling), (slot(), factor)]]
    with changes(Base(model), [[(slot(), bias)]], scalings=own).applied():
        torch.testing.assert_close(model(x), x * scaling * factor + bias)
    copy = nn.Linear(WIDTH, WIDTH)
    with changes(Base(model), [[(slot(), bias)]], [{"layer.part": copy}], scalings=own).applied():
        torch.testing.assert_close(model(x), copy(x * scaling))


@pytest.mark.parametrize("is_input", [True, False])
def test_a_factor_is_multiplied_in_single_precision(is_input: bool) -> None:
    model, factor, x = Model(), added(), torch.randn(2, WIDTH).bfloat16()
    with changes(Base(model), scalings=[[(slot(is_input=is_input), factor)]]).applied():
        found = model(x)
    assert torch.equal(found, (x.float() * factor).bfloat16())
    found.sum().backward()
    assert factor.grad is not None
    assert factor.grad.dtype == torch.float32


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("is_input", [True, False])
@pytest.mark.parametrize("rows", [[0, 1, 2, 1], [2, 2, 0, 1], [2]])
def test_every_row_gets_the_factor_of_its_adapter(arrangement: str, is_input: bool, rows: list[int]) -> None:
    by_head, arrange, restore = ARRANGEMENTS[arrangement]
    tokens = 1 if arrangement.startswith("one token") else 5
    model, x = Model(Exponential()), torch.randn(len(rows), tokens, WIDTH)
    factors = [added(), None, added()]
    place = slot(is_input=is_input)
    own: list[Scalings] = [[] if factor is None else [(place, factor)] for factor in factors]
    with changes(Base(model, by_head=by_head), rows=torch.tensor(rows), scalings=own).applied():
        found = restore(model(arrange(x))).view(x.shape)
    each = [exponential(row, factors[n], is_input=is_input) for row, n in zip(x, rows, strict=True)]
    torch.testing.assert_close(found, torch.stack(each))
    given = [factor for factor in factors if factor is not None]
    weights = torch.randn_like(x)
    expected = torch.autograd.grad((torch.stack(each) * weights).sum(), given, allow_unused=True)
    gradients = torch.autograd.grad((found * weights).sum(), given, allow_unused=True)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(_or_zero(gradient), _or_zero(other))


def _or_zero(gradient: Tensor | None) -> Tensor:
    return torch.zeros(WIDTH) if gradient is None else gradient


def test_rows_of_an_input_that_does_not_keep_them_apart_are_refused() -> None:
    model, x = Model(), torch.randn(2, WIDTH)
    base = Base(model)
    base.row_inputs = frozenset({"head"})
    own: list[Scalings] = [[(slot(is_input=True), added())], []]
    with (
        changes(base, rows=torch.tensor([0, 1]), scalings=own).applied(),
        pytest.raises(UnsupportedModelError, match=r"layer\.part does not compute row by row"),
    ):
        model(x)
    with changes(base, scalings=own[:1]).applied():
        assert model(x).shape == x.shape


@pytest.mark.parametrize("is_input", [True, False])
def test_factors_reach_parts_and_leave_nothing_behind(is_input: bool) -> None:
    model, x = Model(), torch.randn(2, WIDTH)
    some = changes(Base(model), scalings=[[(slot(is_input=is_input), added())]])
    assert some.reach(model.layer)
    assert not some.reach(model.head)
    with some.applied():
        assert not torch.equal(model(x), x)
    assert torch.equal(model(x), x)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# Heads


def test_a_copy_answers_in_the_heads_place() -> None:
    model, copy, x = Model(), nn.Linear(WIDTH, 4), torch.randn(2, 3, WIDTH)
    with changes(Base(model), heads=[{"head": copy}]).applied():
        found = model.head(x)
    assert torch.equal(found, copy(x))
    found.sum().backward()
    assert copy.weight.grad is not None
    assert model.head.weight.grad is None
    assert model.head(x).shape == (2, 3, 2)


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 0], [1, 1, 1]])
def test_every_row_has_the_head_of_its_adapter(rows: list[int]) -> None:
    """The second adapter has none of its own, and the third another one than the first."""
    model, x = Model(), torch.randn(len(rows), 4, WIDTH)
    copies = {0: nn.Linear(WIDTH, 2), 2: nn.Linear(WIDTH, 2)}
    own = [{"head": copies[number]} if number in copies else {} for number in range(ADAPTERS)]
    with changes(Base(model), heads=own, rows=torch.tensor(rows)).applied():
        found = model.head(x)
    expected = torch.stack([copies.get(n, model.head)(row) for n, row in zip(rows, x, strict=True)])
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    for number, copy in copies.items():
        own_rows = [row for n, row in zip(rows, x, strict=True) if n == number]
        gradient = sum(row.sum(0) for row in own_rows) if own_rows else torch.zeros(WIDTH)
        torch.testing.assert_close(copy.weight.grad, torch.stack([gradient] * 2))  # type: ignore[list-item]


def test_heads_of_beams() -> None:
    model, copy, x = Model(), nn.Linear(WIDTH, 2), torch.randn(4, WIDTH)
    with changes(Base(model), heads=[{"head": copy}, {}], rows=torch.tensor([1, 0])).applied():
        found = model.head(x)
    torch.testing.assert_close(found, torch.cat([model.head(x[:2]), copy(x[2:])]))


def test_a_head_stays_in_single_precision() -> None:
    """By whatever argument it gets its states."""
    model = Model().bfloat16()
    copy, x = nn.Linear(WIDTH, 2), torch.randn(3, WIDTH).bfloat16()
    with changes(Base(model), heads=[{"head": copy}]).applied():
        found, by_name = model.head(x), model.head(input=x)
    assert found.dtype == by_name.dtype == torch.bfloat16
    assert torch.equal(found, copy(x.float()).bfloat16())
    assert torch.equal(by_name, found)


def test_numbers_of_a_head_are_not_raised() -> None:
    model = Model(nn.Embedding(9, WIDTH).bfloat16())
    copy, ids = nn.Embedding(9, WIDTH), torch.tensor([[1, 8]])
    with changes(Base(model), heads=[{"layer.part": copy}]).applied():
        assert torch.equal(model(ids), copy(ids).bfloat16())


def test_a_module_that_returns_several_tensors_is_refused() -> None:
    model, copy = Model(), Returning()
    with (
        changes(Base(model), heads=[{"layer.part": copy}]).applied(),
        pytest.raises(UnsupportedModelError, match="Returning returns more than one tensor, name one inside it"),
    ):
        model((torch.zeros(2), torch.zeros(2)))


def test_a_copy_has_the_last_word_over_a_bias() -> None:
    model, copy, x = Model(), nn.Linear(WIDTH, WIDTH), torch.randn(2, WIDTH)
    with changes(Base(model), [[(slot(), added())]], [{"layer.part": copy}]).applied():
        assert torch.equal(model(x), copy(x))


# Where changes are made


@pytest.mark.parametrize("kind", ["bias", "head"])
def test_rows_of_a_module_that_does_not_keep_them_apart_are_refused(kind: str) -> None:
    model, x = Model(), torch.randn(2, WIDTH)
    base = Base(model, row_modules=("head",))
    biases: list[Additions] = [[(slot(), added())], []] if kind == "bias" else [[], []]
    heads: list[dict[str, nn.Module]] = [{"layer.part": Returning()}, {}] if kind == "head" else [{}, {}]
    with changes(base, biases, heads, torch.tensor([0, 1])).applied():
        message = (
            r"layer\.part does not compute row by row: run rows of adapters that change it in batches of their own"
        )
        with pytest.raises(UnsupportedModelError, match=message):
            model(x)
        assert model.head(x).shape == (2, 2)
    with changes(base, biases[:1], heads[:1]).applied():
        assert model(x).shape == x.shape


def test_parts_that_a_change_reaches() -> None:
    model = Model()
    some = changes(Base(model), [[(slot(), added())]])
    assert some.reach(model)
    assert some.reach(model.layer)
    assert some.reach(model.layer.part)
    assert not some.reach(model.head)
    assert not changes(Base(model), [[]], [{}]).reach(model)


@pytest.mark.parametrize("fails", [True, False])
def test_nothing_is_left_behind(fails: bool) -> None:
    model, x = Model(), torch.randn(2, WIDTH)
    some = changes(Base(model), [[(slot(), added())]], [{"head": nn.Linear(WIDTH, 2)}])
    for _ in range(2):
        try:
            with some.applied():
                assert not torch.equal(model(x), x)
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        assert torch.equal(model(x), x)
        assert not any(module._forward_hooks for module in model.modules())


class Checkpointed(nn.Module):
    """A layer that runs again in the backward pass, as transformers' layers do."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.part = nn.Linear(WIDTH, WIDTH)
        vars(self)[CHECKPOINT] = lambda run, *args: checkpoint(run, *args, use_reentrant=use_reentrant)

    def run(self, x: Tensor) -> Tensor:
        return self.part(x).sin()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = vars(self)[CHECKPOINT](self.run, x)
        return output


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_layer_is_scaled_again_when_it_runs_again(use_reentrant: bool) -> None:
    model = Model(Checkpointed(use_reentrant=use_reentrant))
    factors, x = [added(), added()], torch.randn(2, WIDTH, requires_grad=True)
    places = [BiasSlot("layer.part.part", None, WIDTH, True, is_input=is_input) for is_input in (True, False)]
    base = Base(model, row_modules=("layer.part.part",))
    own: list[Scalings] = [[*zip(places, factors, strict=True)], []]
    layer: Any = model.layer.part
    with changes(base, rows=torch.tensor([1, 0]), scalings=own).applied():
        output = model(x)
    expected = torch.stack([layer.part(x[0]), layer.part(x[1] * factors[0]) * factors[1]]).sin()
    torch.testing.assert_close(output, expected)
    given = [x, layer.part.weight, *factors]
    gradients = torch.autograd.grad(expected.cos().sum(), given)
    output.cos().sum().backward()
    for part, gradient in zip(given, gradients, strict=True):
        torch.testing.assert_close(part.grad, gradient)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_layer_is_changed_again_when_it_runs_again(use_reentrant: bool) -> None:
    """The block has ended by then."""
    model = Model(Checkpointed(use_reentrant=use_reentrant))
    bias, x = added(), torch.randn(2, WIDTH, requires_grad=True)
    place = BiasSlot("layer.part.part", None, WIDTH, True)
    base = Base(model, row_modules=("layer.part.part",))
    rows = torch.tensor([1, 0])
    layer: Any = model.layer.part
    plain = vars(layer)[CHECKPOINT]
    with changes(base, [[(place, bias)], []], rows=rows).applied():
        output = model(x)
    assert vars(layer)[CHECKPOINT] is plain
    expected = torch.stack([layer.part(x[0]), layer.part(x[1]) + bias]).sin()
    torch.testing.assert_close(output, expected)
    given = [x, layer.part.weight, bias]
    gradients = torch.autograd.grad(expected.cos().sum(), given)
    output.cos().sum().backward()
    for part, gradient in zip(given, gradients, strict=True):
        torch.testing.assert_close(part.grad, gradient)
    assert not layer.part._forward_hooks
