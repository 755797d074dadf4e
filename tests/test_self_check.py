"""A model that was not tested is checked before its first use, and one that was tested is not."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RemBertConfig,
)
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama

from softtune import (
    BitFitConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    UnsupportedModelError,
    compat,
    get_peft_model,
    self_check,
)
from softtune.backbone.stack import _sees_nothing_later, is_causal
from softtune.promises import PROMISES, Broken
from softtune.serving import prompt_export
from tests.families import CAUSAL_LM, FAMILIES, LLAMA, METHODS, PAD, SEQ_CLS, VOCABULARY, adapted, base_model

SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2}
PREFIX = PrefixTuningConfig(task_type=CAUSAL_LM)


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is known of any model yet."""
    monkeypatch.setattr(self_check, "notes_folder", lambda: tmp_path / "notes")
    monkeypatch.setattr(self_check, "_passed", set())
    return tmp_path / "notes"


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """No class is tested in the installed version, and llamas are in another."""
    monkeypatch.setattr(compat, "tested", lambda: {"5.18.0": ["LlamaForCausalLM"]})
    monkeypatch.setattr(self_check, "tested", compat.tested)


def renamed(tmp_path: Path, old: str, new: str, original: ModuleType = modeling_llama) -> ModuleType:
    """A copy of a model's file in which the model takes an argument under another name."""
    text = Path(original.__file__).read_text(encoding="utf-8")
    boundary = r"(?=class LlamaModel|class LlamaForCausalLM|class GPT2Model|class GPT2LMHeadModel)"
    layers, stack, heads = re.split(boundary, text, maxsplit=2)
    stack = re.sub(rf"\b{old}\b", new, stack).replace(f"{new}={new}", f"{old}={new}")  # what it calls stays as it was
    text = layers + stack + re.sub(rf"\b{old}\b", new, heads)
    text = (
        text.replace("from ... import", "from transformers import")
        .replace("from ...", "from transformers.")
        .replace("from .conf", f"from {original.__package__}.conf")
    )
    file = tmp_path / "modeling_renamed.py"
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def llama(own: type[PreTrainedModel] = LlamaForCausalLM) -> PreTrainedModel:
    torch.manual_seed(0)
    model = own(LlamaConfig(**LLAMA, **SPECIAL))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def forwards(model: nn.Module) -> list[None]:
    """Filled with every call of the model's layers from now on."""
    calls: list[None] = []
    model.get_decoder().layers[0].register_forward_hook(lambda *_: calls.append(None))
    return calls


def test_a_renamed_argument_is_refused(notes: Path, tmp_path: Path) -> None:
    """As transformers 5.24 renamed another one: who passes the old name is not heard, and nothing fails."""
    module = renamed(tmp_path, "position_ids", "places")
    model = llama(module.LlamaForCausalLM)
    with pytest.raises(UnsupportedModelError) as refusal:
        get_peft_model(model, PREFIX)
    message = str(refusal.value)
    assert message.count("\n") == 0
    assert f"LlamaForCausalLM with transformers {compat.INSTALLED} breaks a promise for PrefixTuningConfig" in message
    assert "padded left" in message
    assert "use BitFitConfig, for which all hold here" in message
    assert not list(notes.glob("*"))
    get_peft_model(model, BitFitConfig(task_type=CAUSAL_LM, add_missing=True))


@pytest.mark.parametrize("config", [PREFIX, PromptTuningConfig(task_type=CAUSAL_LM)])
def test_a_rename_is_not_taken_for_a_fault_of_the_base_model(config: Any, notes: Path, tmp_path: Path) -> None:
    """GPT-2 looks positions up: padded on the left, and without an argument for them, it is wrong alone too."""
    module = renamed(tmp_path, "position_ids", "places", modeling_gpt2)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = module.GPT2LMHeadModel(GPT2Config(**sizes, **SPECIAL)).eval()
    with pytest.raises(UnsupportedModelError, match=r"padded left .*\(its positions come from a table"):
        get_peft_model(model, config)


def test_a_renamed_argument_that_a_prompt_needs_is_refused(notes: Path, tmp_path: Path) -> None:
    module = renamed(tmp_path, "inputs_embeds", "vectors")
    with pytest.raises(UnsupportedModelError, match="use PrefixTuningConfig"):
        get_peft_model(llama(module.LlamaForCausalLM), PromptTuningConfig(task_type=CAUSAL_LM, placement="suffix"))


def test_the_refusal_names_a_version_that_is_tested(
    notes: Path, untested: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = PROMISES["padding"]._replace(check=lambda probe: "off by 1")
    monkeypatch.setitem(PROMISES, "padding", broken)
    with pytest.raises(UnsupportedModelError, match=r"\(off by 1\): install transformers 5.18.0, .* or set SOFTTUNE_"):
        get_peft_model(llama(), PREFIX)


def test_it_runs_once(notes: Path, untested: None, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    check = self_check.check
    monkeypatch.setattr(self_check, "check", lambda *args, **kwargs: runs.append(1) or check(*args, **kwargs))
    get_peft_model(llama(), PREFIX)
    get_peft_model(llama(), PrefixTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=3, layers="last:1"))
    assert len(runs) == 1
    assert len(list(notes.glob("LlamaForCausalLM-*"))) == 1
    monkeypatch.setattr(self_check, "_passed", set())  # another process
    get_peft_model(llama(), PREFIX)
    assert len(runs) == 1
    get_peft_model(llama(), PromptTuningConfig(task_type=CAUSAL_LM))
    get_peft_model(llama().to(torch.bfloat16), PREFIX)
    assert len(runs) == 3
    monkeypatch.setenv("SOFTTUNE_SELF_CHECK", "0")
    get_peft_model(llama(), PromptTuningConfig(task_type=CAUSAL_LM, placement="suffix"))
    assert len(runs) == 3


def test_a_folder_that_cannot_be_written(notes: Path, untested: None) -> None:
    notes.write_text("a file")
    get_peft_model(llama(), PREFIX)


@pytest.mark.parametrize("method", ["prefix", "prompt", "bitfit_added"])
def test_a_tested_model_runs_no_more_often(method: str, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for switch in ("0", "1"):
        monkeypatch.setenv("SOFTTUNE_SELF_CHECK", switch)
        model = base_model("llama", CAUSAL_LM)
        calls = forwards(model)
        get_peft_model(model, METHODS[method](task_type=CAUSAL_LM))
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 3
    assert not notes.exists()


def test_what_is_tested_is_what_the_matrix_covers() -> None:
    tested = json.loads(compat.TESTED.read_text(encoding="utf-8"))
    assert compat.OLDEST in {".".join(version.split(".")[:2]) for version in tested}
    if str(compat.INSTALLED) in tested:
        for family, row in FAMILIES.items():
            for task in row.tasks:
                assert compat.is_tested(base_model(family, task))


def test_random_numbers_and_the_model_are_left_as_they_were(notes: Path, untested: None) -> None:
    base, ids = llama(), torch.tensor([[5, 6, 7]])
    expected, state = base(ids).logits, torch.get_rng_state()
    numbers = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = PeftModel(base)
    random = []
    for switch in (True, False):
        torch.set_rng_state(state)
        if switch:
            self_check.ensure(model.backbone, PREFIX, PeftModel.with_adapter)
        random.append(torch.rand(3))
    assert torch.equal(*random)
    assert torch.equal(base(ids).logits, expected)
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in base.state_dict().items())
    assert not model.peft_config


class Detached(LlamaForCausalLM):
    """Remote code whose layers take no gradient."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.detach()
        return output


class Restless(LlamaForCausalLM):
    """Remote code that changes itself where it is trained."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            self.lm_head.weight.requires_grad_(True)
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(("own", "promise"), [(Detached, "gradients"), (Restless, "frozen")])
def test_remote_code_that_breaks_a_promise(own: type[PreTrainedModel], promise: str, notes: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=PROMISES[promise].text):
        get_peft_model(llama(own), PREFIX)


@pytest.mark.parametrize("decoder", ["bert", "rembert"])
def test_a_model_of_two_is_tested_as_these_two(decoder: str) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    parts = [BertConfig(**sizes), {"bert": BertConfig, "rembert": RemBertConfig}[decoder](**sizes)]
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    assert compat.is_tested(EncoderDecoderModel(config)) is (decoder == "bert")


def test_a_file_that_changes_is_checked_again(notes: Path, tmp_path: Path) -> None:
    for name in ("places", "spots"):
        module = renamed(tmp_path, "labels", name)
        get_peft_model(llama(module.LlamaForCausalLM), PREFIX)
    assert len(list(notes.glob("*LlamaForCausalLM-*"))) == 2


def test_each_way_of_a_prefix_is_checked_on_its_own(notes: Path, untested: None) -> None:
    for shift in (True, False):
        get_peft_model(llama(), PrefixTuningConfig(task_type=CAUSAL_LM, shift_positions=shift))
    assert len(list(notes.glob("LlamaForCausalLM-*"))) == 2


def test_remote_code_that_works(notes: Path) -> None:
    class Own(LlamaForCausalLM):
        pass

    model = get_peft_model(llama(Own), PREFIX)
    assert model(torch.tensor([[5, 6]])).logits.shape[:2] == (1, 2)
    assert len(list(notes.glob("*Own*"))) == 1


@pytest.mark.parametrize(
    ("promise", "spoil"),
    [
        ("acts", "embedding"),
        ("padding", "starts"),
        ("cache", "cached"),
        ("gradients", "detached"),
        ("frozen", "hooks"),
    ],
)
def test_every_promise_can_fail(promise: str, spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is seen to break where softtune is broken in one place."""
    import softtune.injection.cache
    import softtune.injection.step
    from softtune.injection.attention_wrapper import PrefixAttention
    from softtune.injection.call_plan import CallPlanner
    from softtune.injection.stack import StackInjection
    from softtune.methods.prefix_tuning import PrefixEncoder

    model = PeftModel(llama())
    if spoil == "embedding":
        monkeypatch.setattr(CallPlanner, "_prefix_attention", lambda *args: None)
    if spoil == "starts":
        monkeypatch.setattr(softtune.injection.step, "row_starts", lambda mask, rows, device: torch.zeros(rows).long())
    if spoil == "cached":
        call = PrefixAttention.__call__

        def forget(self: Any, attend: Any, module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            if query.shape[2] == 1 and key.shape[2] > 1:
                self.reached.add(id(module))
                return attend(module, query, key[:, :, 1:], args[0][:, :, 1:], None, **kwargs)
            return call(self, attend, module, query, key, *args, **kwargs)

        monkeypatch.setattr(PrefixAttention, "__call__", forget)
    if spoil == "detached":
        own = PrefixEncoder.forward
        monkeypatch.setattr(PrefixEncoder, "forward", lambda self: own(self).detach())
    if spoil == "hooks":
        attached = StackInjection.attached

        def leave_one(self: StackInjection) -> Any:
            self.stack.module.register_forward_hook(lambda *_: None)
            return attached(self)

        monkeypatch.setattr(StackInjection, "attached", leave_one)
    found = self_check.check(model.backbone, PREFIX, PeftModel.with_adapter, thorough=True)
    assert isinstance(found[promise], Broken)


@pytest.mark.parametrize("family", [f for f, row in FAMILIES.items() if "SEQ_2_SEQ_LM" not in row.tasks])
def test_what_modules_say_of_their_causality_is_what_is_seen(family: str) -> None:
    """Tested models are believed, others are looked at."""
    for task in FAMILIES[family].tasks:
        model = base_model(family, task)
        stack = PeftModel(model).backbone.stacks[0].module
        assert is_causal(model, stack) is _sees_nothing_later(stack)


def test_accelerators_are_not_seeded(notes: Path, untested: None, monkeypatch: pytest.MonkeyPatch) -> None:
    base, seeded = llama(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    get_peft_model(base, PREFIX)
    assert not seeded


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode(made_inside: bool, notes: Path, untested: None) -> None:
    base = None if made_inside else llama()
    with torch.inference_mode():
        model = get_peft_model(base or llama(), PREFIX)
        assert model(torch.tensor([[5, 6]])).logits.shape[:2] == (1, 2)


@pytest.mark.filterwarnings("error")
def test_a_refusal_comes_without_warnings(notes: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=PROMISES["gradients"].text):
        get_peft_model(llama(Detached), PREFIX)


def test_what_is_served_is_checked(notes: Path, untested: None, tmp_path: Path) -> None:
    base = llama()
    get_peft_model(base, PREFIX).save_pretrained(tmp_path / "adapter")
    for note in notes.glob("*"):
        note.unlink()
    self_check._passed.clear()
    prompt_export.load_adapter(PeftModel(base).backbone, tmp_path / "adapter")
    assert len(list(notes.glob("LlamaForCausalLM-*"))) == 1


def test_a_lora_that_is_trained_along_is_left_alone(notes: Path, untested: None) -> None:
    base = llama()
    lora = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    before = {name: (p.clone(), p.requires_grad) for name, p in lora.named_parameters()}
    model = PeftModel(lora)
    found = self_check.check(model.backbone, PREFIX, PeftModel.with_adapter, thorough=True)
    assert not any(isinstance(outcome, Broken) for outcome in found.values())
    for name, parameter in lora.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_no_gradients_are_left(notes: Path, untested: None) -> None:
    model = get_peft_model(base_model("bert", SEQ_CLS), METHODS["p_tuning_v2"](task_type=SEQ_CLS))
    assert all(p.grad is None for p in model.parameters())
    assert adapted("bert", SEQ_CLS, "prefix").training is False
