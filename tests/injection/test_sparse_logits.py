"""The head's skipped rows: losses, logits and gradients of transformers' own, less work, and no trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

import softtune.adapter_context
from softtune import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from softtune.compat import ForCausalLMLoss
from softtune.injection.sparse_logits import _sparse_loss, sparse_logits

WORDS, ROWS, LENGTH = 50, 4, 12
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)).eval()


def phi() -> Any:
    """A model whose head has a bias."""
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SIZES)).eval()
    nn.init.normal_(model.lm_head.bias)
    return model


def batch(side: str) -> dict[str, Tensor]:
    """Rows of 3 to 12 tokens, of which the last two have labels."""
    columns, lengths = torch.arange(LENGTH), torch.tensor([[12], [3], [7], [5]])
    mask = (columns >= LENGTH - lengths if side == "left" else columns < lengths).long()
    ids = torch.randint(1, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)) * mask
    ends = (mask * (columns + 1)).amax(dim=1, keepdim=True)
    is_answer = (columns < ends) & (columns >= ends - 2)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~is_answer, -100)}


class Products(TorchDispatchMode):
    """Notes the number of rows of each product with the head's weights."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mm and WORDS in args[1].shape:
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def found(model: Any, given: dict[str, Any], loss_of: Callable[[Any], Tensor] | None = None) -> dict[str, Any]:
    """A call's loss and logits, and the gradients of the adapter."""
    output = model(**given)
    loss = output.loss if loss_of is None else loss_of(output)
    model.zero_grad()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return {"loss": loss.detach(), "logits": output.logits.detach(), "gradients": gradients}


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Turns off what is tested here."""
    return lambda: monkeypatch.setattr(softtune.adapter_context, "sparse_logits", lambda model: nullcontext())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
@pytest.mark.parametrize("make", [llama, phi])
def test_losses_logits_and_gradients_are_as_without(
    make: Any, config: Any, side: str, plainly: Callable[[], None]
) -> None:
    model = get_peft_model(make(), config(task_type="CAUSAL_LM", num_virtual_tokens=3)).train()
    calls: list[dict[str, Any]] = [
        batch(side),
        {**batch(side), "num_items_in_batch": torch.tensor(20)},
        {**batch(side), "logits_to_keep": 4},
        {**batch(side), "shift_labels": batch(side)["labels"].roll(-1, dims=1)},
    ]
    ours = [found(model, call) for call in calls]
    own_loss = found(model, batch(side), lambda output: output.logits[:, -3:].square().mean())
    plainly()
    expected = [found(model, call) for call in calls]
    expected.append(found(model, batch(side), lambda output: output.logits[:, -3:].square().mean()))
    torch.testing.assert_close([*ours, own_loss], expected)


def test_padding_and_tokens_without_labels_take_no_part() -> None:
    model, given = (
        get_peft_model(llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        batch("left"),
    )
    model.train()  # where no cache is wanted, padding is left out
    with Products() as products:
        found(model, given)
    assert products.rows == [int(given["attention_mask"].sum()), int((given["labels"] != -100).sum())]


def test_no_label_is_no_number_as_in_transformers() -> None:
    base, given = llama(), {**batch("left"), "labels": torch.full((ROWS, LENGTH), -100)}
    expected = base(**given).loss
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).train()
    assert bool(expected.isnan())
    assert bool(model(**given).loss.isnan())


def test_a_loss_of_the_users_own_is_kept() -> None:
    base = llama()
    base.loss_function = own = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + 7
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).train()
    assert float(model(**batch("left")).loss.detach()) == 7
    assert base.loss_function is own


@pytest.mark.parametrize("is_training", [True, False])
def test_labels_that_do_not_fit_the_logits_are_told(is_training: bool) -> None:
    model = get_peft_model(llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).train(is_training)
    given = {**batch("left"), "shift_labels": batch("left")["labels"].roll(-1, dims=1), "logits_to_keep": 4}
    with pytest.raises(ValueError, match=r"Expected input batch_size \(16\) to match target batch_size \(48\)"):
        model(**given)


def test_logits_need_not_be_contiguous() -> None:
    logits, labels = torch.randn(2, 8, WORDS).bfloat16()[:, 1:-1], torch.randint(WORDS, (2, 6))
    ours = _sparse_loss(ForCausalLMLoss)(logits, labels, vocab_size=WORDS)
    torch.testing.assert_close(ours, ForCausalLMLoss(logits, labels, vocab_size=WORDS))


def test_autocast_may_begin_within_the_models_forward() -> None:
    base = llama().train()
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    base.forward = torch.autocast("cpu", torch.bfloat16)(base.forward)
    output = model.train()(**batch("left"))
    output.loss.backward()
    assert output.logits.dtype is torch.bfloat16


def test_nothing_stays_behind() -> None:
    base = llama().train().requires_grad_(False)
    before, of_head = {*vars(base)}, {*vars(base.lm_head)}
    with sparse_logits(base):
        assert "forward" in vars(base.lm_head)
    with pytest.raises(RuntimeError, match="some error"), sparse_logits(base):
        raise RuntimeError("some error")
    assert ({*vars(base)}, {*vars(base.lm_head)}) == (before, of_head)


def other_class(base: Any) -> None:
    base.lm_head = type("Quantised", (nn.Linear,), {})(16, WORDS, bias=False)


def offloaded(base: Any) -> None:
    base.lm_head.forward = base.lm_head.forward


@pytest.mark.parametrize("change", [other_class, offloaded, lambda base: base.lm_head.requires_grad_()])
def test_other_heads_are_left_alone(change: Callable[[Any], Any]) -> None:
    base = llama().train().requires_grad_(False)
    change(base)
    before = vars(base.lm_head).get("forward")
    with sparse_logits(base):
        assert vars(base.lm_head).get("forward") == before


def test_evaluation_and_autocast_have_the_whole_product() -> None:
    base = llama().requires_grad_(False)
    with sparse_logits(base):
        assert "forward" not in vars(base.lm_head)
    base.train()
    states = torch.randn(2, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), sparse_logits(base):
        assert base.lm_head(states).grad_fn.name() != "_SparseProductBackward"
    with sparse_logits(base):
        assert "_SparseProduct" in base.lm_head(states).grad_fn.next_functions[0][0].name()
