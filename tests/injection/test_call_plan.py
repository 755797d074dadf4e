"""Plans of calls: what the layers get, seen before they run; and that planning changes nothing."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from tests.families import CAUSAL_LM, SEQ_CLS, base_model
from tests.injection.samples import prefix, vectors
from torch import Tensor

from softtune import DataError, UnsupportedModelError
from softtune.backbone import Backbone, model_session
from softtune.backbone.interface import WRAPPER
from softtune.compat import DynamicCache
from softtune.injection.call_plan import CallPlanner, OuterCall
from softtune.injection.columns import Columns
from softtune.injection.pack import Pack, PackedAttention
from softtune.injection.trim import Trim
from softtune.methods.prompt import Prompt

IDS = torch.tensor([[0, 0, 5, 6, 7, 0], [0, 8, 9, 5, 6, 0], [0, 4, 0, 0, 0, 0]])
MASK = (IDS != 0).long()
NOWHERE = Columns(None, None)


def planner(backbone: Backbone, *prompts: Prompt, rows: Tensor | None = None, packs: bool = True) -> CallPlanner:
    with model_session(backbone.model):
        return CallPlanner(backbone, backbone.stacks[0], prompts, rows, packs, None)


def call(**others: Any) -> dict[str, Any]:
    return {"input_ids": IDS, "attention_mask": MASK, **others}


@pytest.fixture
def llama() -> Backbone:
    return Backbone.shared(base_model("llama", CAUSAL_LM))


@pytest.mark.parametrize("make", [lambda llama: prefix(llama.attention_layers), vectors])
@pytest.mark.parametrize("packs", [False, True])
def test_a_plan_is_frozen_and_leaves_the_call_as_it_was(llama: Backbone, make: Any, packs: bool) -> None:
    given = call(use_cache=False, position_ids=(MASK.cumsum(1) - 1).clamp(min=0))
    before = {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}
    plan = planner(llama, make(llama), packs=packs).plan(given, NOWHERE, OuterCall())
    assert given.keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in given.items() if isinstance(x, Tensor))
    with pytest.raises(FrozenInstanceError):
        plan.depth = 3  # type: ignore[misc]


def test_a_call_that_is_refused_leaves_the_cache_as_it_was() -> None:
    gpt2 = Backbone.shared(base_model("gpt2", CAUSAL_LM))
    limit, cache = gpt2.stacks[0].table_size, DynamicCache(config=gpt2.model.config)
    layers = list(cache.layers)
    assert limit is not None
    with pytest.raises(DataError, match="exceed"):
        planner(gpt2, vectors(gpt2)).plan(
            {"input_ids": IDS[:1, 2:3].expand(1, limit), "cache": cache}, NOWHERE, OuterCall()
        )
    assert cache.layers == layers
    assert not hasattr(cache, "softtune_virtual")


def test_the_same_call_has_the_same_plan(llama: Backbone) -> None:
    """Nothing of one plan is in the next."""
    plans, prompt = planner(llama, vectors(llama)), call(use_cache=False)
    first = plans.plan(prompt, NOWHERE, OuterCall())
    plans.plan({"input_ids": IDS[:1, 2:5]}, NOWHERE, OuterCall(has_positions=False))
    again = plans.plan(prompt, NOWHERE, OuterCall())
    for name in ("inputs_embeds", "attention_mask", "position_ids"):
        assert torch.equal(first.call[name], again.call[name])


def test_a_batch_without_a_cache_is_packed(llama: Backbone) -> None:
    plan = planner(llama, prefix(llama.attention_layers)).plan(call(use_cache=False), NOWHERE, OuterCall())
    assert isinstance(plan.shortened, Pack)
    assert isinstance(plan.call[WRAPPER], PackedAttention)
    tokens = zip(plan.call["input_ids"][0].tolist(), plan.call["position_ids"][0].tolist(), strict=True)
    assert sorted(tokens) == sorted([(5, 2), (6, 3), (7, 4), (8, 2), (9, 3), (5, 4), (6, 5), (4, 2)])


def test_what_may_not_be_packed_is_cut(llama: Backbone) -> None:
    plan = planner(llama, prefix(llama.attention_layers), packs=False).plan(call(use_cache=False), NOWHERE, OuterCall())
    assert plan.shortened == Trim(left=1, right=1)
    assert torch.equal(plan.call["input_ids"], IDS[:, 1:5])
    assert plan.starts.tolist() == [2, 1, 1]


def test_a_call_with_a_cache_keeps_its_columns(llama: Backbone) -> None:
    plan = planner(llama, prefix(llama.attention_layers)).plan(call(use_cache=True), NOWHERE, OuterCall())
    assert plan.shortened is None
    assert torch.equal(plan.call["input_ids"], IDS)
    real = plan.call["position_ids"][MASK != 0]
    assert real.tolist() == [2, 3, 4, 2, 3, 4, 5, 2]


def test_virtual_tokens_stand_right_before_the_text(llama: Backbone) -> None:
    prompt = vectors(llama)
    plan = planner(llama, prompt).plan(call(use_cache=True), NOWHERE, OuterCall())
    words = llama.stacks[0].embed(IDS)
    for row, start in enumerate((2, 1, 1)):
        expected = torch.cat([words[row, :start], prompt.vectors, words[row, start:]])
        assert torch.equal(plan.call["inputs_embeds"][row], expected)
        mask = MASK[row].tolist()
        assert plan.call["attention_mask"][row].tolist() == [*mask[:start], 1, 1, *mask[start:]]
    assert plan.call["input_ids"] is None


def test_an_encoders_rows_move_to_the_left() -> None:
    bert = Backbone.shared(base_model("bert", SEQ_CLS))
    plan = planner(bert, Prompt()).plan({"input_ids": IDS, "attention_mask": MASK}, NOWHERE, OuterCall())
    for row, text in enumerate(([5, 6, 7], [8, 9, 5, 6], [4])):
        assert plan.call["input_ids"][row, : len(text)].tolist() == text
        assert plan.call["attention_mask"][row].tolist() == [1] * len(text) + [0] * (4 - len(text))


def test_the_mask_of_the_model_around_shows_padding(llama: Backbone) -> None:
    ready = MASK[:, None, None, :].bool() & torch.ones(6, 6, dtype=torch.bool).tril()
    plan = planner(llama, prefix(llama.attention_layers)).plan(
        call() | {"attention_mask": ready}, NOWHERE, OuterCall(MASK)
    )
    assert plan.starts.tolist() == [2, 1, 1]
    assert planner(llama, prefix(llama.attention_layers)).plan(
        call() | {"attention_mask": ready}, NOWHERE, OuterCall()
    ).starts.tolist() == [0, 0, 0]
    with pytest.raises(UnsupportedModelError, match="need the 2-D attention mask"):
        planner(llama, vectors(llama)).plan(call() | {"attention_mask": ready}, NOWHERE, OuterCall(MASK))


def test_a_mask_of_something_else_is_refused(llama: Backbone) -> None:
    with pytest.raises(UnsupportedModelError, match="patches says what each token sees"):
        planner(llama, vectors(llama)).plan(call(patches=torch.ones(3, 1, 6, 9)), NOWHERE, OuterCall())


def test_nothing_acts_where_no_prompt_is_for_the_stack(llama: Backbone) -> None:
    idle = planner(llama, Prompt())
    assert not idle.acts
    plan = idle.plan(call(use_cache=True), NOWHERE, OuterCall())
    assert plan.wrapper is None
    assert WRAPPER not in plan.call
    assert planner(llama, prefix(llama.attention_layers)).acts
    assert planner(llama, vectors(llama)).acts


def test_rows_have_the_prompts_of_their_adapters(llama: Backbone) -> None:
    one, other = prefix(llama.attention_layers), prefix(llama.attention_layers, 3)
    plan = planner(llama, one, other, rows=torch.tensor([1, 0, 1])).plan(call(use_cache=True), NOWHERE, OuterCall())
    assert plan.arrangement.prompts.shift.tolist() == [3, 2, 3]
    beams = {name: x.repeat_interleave(2, dim=0) for name, x in call().items()}
    plan = planner(llama, one, other, rows=torch.tensor([1, 0, 1])).plan(beams, NOWHERE, OuterCall())
    assert plan.arrangement.prompts.shift.tolist() == [3, 3, 2, 2, 3, 3]
