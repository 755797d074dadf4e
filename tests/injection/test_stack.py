"""Hooks around a stack: attached for a block, and outputs with one place for each of the caller's tokens."""

from __future__ import annotations

import pytest
import torch
from tests.families import CAUSAL_LM, SEQ_CLS, base_model
from tests.injection.samples import prefix, vectors
from torch import Tensor, nn

from softtune import UnsupportedModelError
from softtune.backbone import Backbone, model_session
from softtune.compat import cache_of
from softtune.injection.stack import StackInjection
from softtune.methods.prompt import Prompt

IDS = torch.tensor([[0, 0, 5, 6, 7, 0], [0, 8, 9, 5, 6, 0], [0, 4, 0, 0, 0, 0]])
MASK = (IDS != 0).long()


def injection(backbone: Backbone, prompt: Prompt, text_ends: Tensor | None = None) -> StackInjection:
    return StackInjection(backbone, backbone.stacks[0], [prompt], None, None, text_ends, True, None)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def llama() -> Backbone:
    return Backbone.shared(base_model("llama", CAUSAL_LM))


def test_hooks_live_as_long_as_the_block(llama: Backbone) -> None:
    there = injection(llama, vectors(llama))
    with model_session(llama.model), there.attached():
        assert hooks(llama.model)
    assert hooks(llama.model) == 0
    ready = torch.ones(3, 1, 6, 6, dtype=torch.bool)
    with pytest.raises(UnsupportedModelError), model_session(llama.model), there.attached():
        there.stack.module(IDS, attention_mask=ready)
    assert hooks(llama.model) == 0
    assert there.finished is None


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_outputs_have_the_callers_columns(llama: Backbone, use_cache: bool) -> None:
    """Each text alone, with its virtual tokens in front, gives the same."""
    prompt = vectors(llama)
    there = injection(llama, prompt)
    with model_session(llama.model), there.attached():
        output = llama.stacks[0].module(IDS, attention_mask=MASK, use_cache=use_cache, output_hidden_states=True)
    assert output.last_hidden_state.shape[:2] == IDS.shape
    for row, mask in enumerate(MASK.bool()):
        words = llama.stacks[0].embed(IDS[row][mask][None])
        alone = llama.stacks[0].module(inputs_embeds=torch.cat([prompt.vectors[None], words], dim=1))
        torch.testing.assert_close(output.last_hidden_state[row][mask], alone.last_hidden_state[0, 2:])
    assert there.running is None
    assert there.finished is not None


@torch.no_grad()
def test_texts_end_where_the_first_call_ended() -> None:
    """Decoding without a cache calls again with a longer text, behind the same suffix."""
    gpt2 = Backbone.shared(base_model("gpt2", CAUSAL_LM))
    prompt, longer = vectors(gpt2, after_text=True), torch.tensor([[5, 6, 7, 8, 9]])
    there = injection(gpt2, prompt)
    with model_session(gpt2.model), there.attached():
        there.stack.module(longer[:, :3], use_cache=False)
        found = there.stack.module(longer, use_cache=False).last_hidden_state
    words = gpt2.stacks[0].embed(longer)
    whole = torch.cat([words[:, :3], prompt.vectors[None], words[:, 3:]], dim=1)
    expected = gpt2.stacks[0].module(inputs_embeds=whole).last_hidden_state[:, [0, 1, 4, 5, 6]]
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_call_that_failed_leaves_nothing_to_the_next(llama: Backbone) -> None:
    prompt = vectors(llama)
    there = injection(llama, prompt)
    with model_session(llama.model), there.attached():
        expected = there.stack.module(IDS, attention_mask=MASK).last_hidden_state
        handle = llama.model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            there.stack.module(IDS[:, :4], attention_mask=MASK[:, :4])
        handle.remove()
        torch.testing.assert_close(there.stack.module(IDS, attention_mask=MASK).last_hidden_state, expected)


@torch.no_grad()
def test_the_first_column_is_the_first_slot_for_a_head_that_reads_it() -> None:
    bert = Backbone.shared(base_model("bert", SEQ_CLS))
    prompt = vectors(bert)
    there = injection(bert, prompt)
    with model_session(bert.model), there.attached():
        states = there.stack.module(IDS, attention_mask=MASK).last_hidden_state
    for row, mask in enumerate(MASK.bool()):
        words = bert.stacks[0].embed(IDS[row][mask][None])
        alone = there.stack.module(inputs_embeds=torch.cat([prompt.vectors[None], words], dim=1)).last_hidden_state[0]
        torch.testing.assert_close(states[row, 0], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(states[row, int(mask.int().argmax())], alone[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_mask_beside_the_virtual_tokens_of_an_encoder() -> None:
    bert = Backbone.shared(base_model("bert", SEQ_CLS))
    there = injection(bert, vectors(bert))
    assert there.with_virtual(None, torch.zeros(3, 8, 4)) is None
    extended = there.with_virtual(MASK, torch.zeros(3, 8, 4))
    assert extended is not None
    assert extended.tolist() == [[1] * 5 + [0] * 3, [1] * 6 + [0] * 2, [1] * 3 + [0] * 5]


@torch.no_grad()
def test_a_prefix_leaves_the_cache_of_the_text_alone(llama: Backbone) -> None:
    there = injection(llama, prefix(llama.attention_layers))
    with model_session(llama.model), there.attached():
        output = llama.model(IDS, attention_mask=MASK, use_cache=True)
    assert cache_of(output).get_seq_length() == IDS.shape[1]
