"""LLaMA-Adapter: the same as PEFT's in the models of which PEFT computes the paper's, and in every other by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.families import (
    CAUSAL_LM,
    FAMILIES,
    SEQ_CLS,
    adapted,
    assert_same_gradients,
    base_model,
    batch,
    cases,
    scramble,
    sides,
    texts,
)
from tests.reference import prefixes
from tests.test_reference import answers, rows_of, with_head
from torch import Tensor

from softtune import (
    AdapterMismatchError,
    AdaptionPromptConfig,
    ConfigError,
    PeftModel,
    UnsupportedModelError,
    get_peft_model,
)
from softtune.methods import adaption_prompt

SIZES = {"adapter_len": 4, "adapter_layers": 1}


@pytest.mark.parametrize(("family", "task"), [("llama", CAUSAL_LM), ("mistral", CAUSAL_LM), ("llama", SEQ_CLS)])
def test_outputs_and_gradients_are_pefts(family: str, task: str) -> None:
    ours = scramble(get_peft_model(base_model(family, task), AdaptionPromptConfig(task_type=task, **SIZES))).eval()
    theirs = peft.get_peft_model(base_model(family, task), peft.AdaptionPromptConfig(task_type=task, **SIZES)).eval()
    module = ours.adapter("default").module
    (attention,) = [m for m in theirs.modules() if hasattr(m, "adaption_prompt")]
    with torch.no_grad():
        attention.adaption_prompt.copy_(module.vectors[0][None])
        attention.adaption_gate.copy_(module.gates[0])
    for name, head in ours.adapter("default").heads.items():
        theirs.base_model.model.get_submodule(name).load_state_dict(head.state_dict(), strict=False)
    rows = texts(family, task)
    own, other = (rows_of(model, task, rows, "right") for model in (ours, theirs))
    weights = [torch.randn_like(x) for x in own]
    found = []
    for outputs, tensors in (
        (own, [module.vectors[0], module.gates[0]]),
        (other, [attention.adaption_prompt, attention.adaption_gate]),
    ):
        total = sum((w * x).sum() for w, x in zip(weights, outputs, strict=True))
        gradients = torch.autograd.grad(total, tensors)
        found.append({"prompt": gradients[0].reshape(4, -1), "gate": gradients[1]})
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert_same_gradients(*found, 1e-5)


@pytest.mark.parametrize("options", [SIZES, {}], ids=["sizes", "defaults"])
def test_folders_go_both_ways(options: dict[str, int], tmp_path: Path) -> None:
    inputs = batch(texts("llama", CAUSAL_LM))
    config = AdaptionPromptConfig(task_type=CAUSAL_LM, **options)
    ours = scramble(get_peft_model(base_model("llama", CAUSAL_LM), config))
    ours.eval().save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base_model("llama", CAUSAL_LM), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(**inputs).logits, ours(**inputs).logits, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = PeftModel.from_pretrained(base_model("llama", CAUSAL_LM), tmp_path / "theirs")
    assert torch.equal(back(**inputs).logits, ours(**inputs).logits)


def test_what_peft_would_misread_it_cannot_read(tmp_path: Path) -> None:
    """PEFT adds the term behind the output projection of GPT-2, and has no gates for heads."""
    for family, options in (("gpt2", {}), ("llama", {"gate": "head"})):
        config = AdaptionPromptConfig(task_type=CAUSAL_LM, **SIZES, **options)
        get_peft_model(base_model(family, CAUSAL_LM), config).save_pretrained(tmp_path / family)
        assert all(name.startswith("softtune.") for name in load_file(tmp_path / family / "adapter_model.safetensors"))
    theirs = peft.get_peft_model(base_model("gpt2", CAUSAL_LM), peft.AdaptionPromptConfig(task_type=CAUSAL_LM, **SIZES))
    theirs.save_pretrained(str(tmp_path / "pefts"))
    with pytest.raises(AdapterMismatchError, match="behind the output projection"):
        PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM), tmp_path / "pefts")


@pytest.mark.promise(6)
@pytest.mark.parametrize(("family", "task", "method"), cases(("adaption_prompt",)))
def test_attention_apart_times_a_gate(family: str, task: str, method: str) -> None:
    """One query and one head at a time, with the keys and values that the layer's projections make of the vectors."""
    model, base = adapted(family, task, method), base_model(family, task)
    with_head(model, base)
    of, rows, module = FAMILIES[family], texts(family, task), model.adapter("default").module
    decoder = answers(task, len(rows))
    paths = [path for path, _ in of.layers()]
    gated = model.adapter("default").module.prompt().gated
    places = [(site, i) for site in of.attention for i in range(len(of.layers(site)))]
    by_path = {path: gated[place] for path, place in zip(paths, places, strict=True)}
    terms = {path: partial(attended, kv, scaling_of(base, path)) for path, kv in by_path.items() if path}
    with prefixes.naive_prefixes(base, {}, terms=terms) as naive, torch.no_grad():
        theirs = []
        for i, row in enumerate(rows):
            inputs = {"input_ids": row[None], **{k: v[i : i + 1] for k, v in decoder.items()}}
            theirs.append(naive(**inputs, **({"use_cache": False} if "decoder" in of.attention else {})).logits[0])
    assert all(bool(gate.any()) for gate in module.gates)
    for side in sides(family, task):
        for own, other in zip(rows_of(model, task, rows, side, **decoder), theirs, strict=True):
            torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)


def attended(kv: tuple[Tensor, Tensor, Tensor], scaling: float | None, head: int, query: Tensor) -> Tensor:
    """[V] one query's attention to the virtual tokens alone."""
    key, value, gate = kv
    own = head * len(key) // len(gate)
    scores = key[own] @ query * (len(query) ** -0.5 if scaling is None else scaling)
    return gate[head] * (torch.softmax(scores, dim=0) @ value[own])


def scaling_of(base: torch.nn.Module, path: str) -> float | None:
    """The factor of a layer's scores, by families' names for it; DeBERTa's and OPT's queries have it already."""
    attention = base.base_model.get_submodule(path)
    if type(attention).__name__ in ("DisentangledSelfAttention", "OPTAttention"):
        return 1.0
    return getattr(attention, "scaling", None)


def test_too_many_layers_and_other_names_are_told() -> None:
    base = base_model("llama", CAUSAL_LM)
    for options, reason in (
        ({"adapter_layers": 9}, "adapter_layers = 9"),
        ({"target_modules": "mlp"}, "'mlp' names no"),
    ):
        with pytest.raises(ConfigError, match=reason):
            get_peft_model(base, AdaptionPromptConfig(task_type=CAUSAL_LM, adapter_len=2, **options))


def test_a_sharded_base_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the adapter is made, and where the model is sharded behind it."""
    model = adapted("llama", CAUSAL_LM, "adaption_prompt")
    monkeypatch.setattr(adaption_prompt, "is_sharded", lambda base: base is model.get_base_model())
    for run in (
        lambda: model(torch.tensor([[5, 6]])),
        lambda: model.add_adapter("other", AdaptionPromptConfig(task_type=CAUSAL_LM)),
    ):
        with pytest.raises(UnsupportedModelError, match="sharded, outside of their layers: use Prefix") as refusal:
            run()
        assert "\n" not in str(refusal.value)
