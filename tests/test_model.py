"""The model that people hold: adapters added, chosen, removed and switched off, and PEFT's names."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import softtune
from softtune import (
    AdapterError,
    BitFitConfig,
    ConfigError,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningV2Config,
    get_peft_model,
)
from tests.families import (
    CAUSAL_LM,
    KINDS,
    METHODS,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    P,
    adapted,
    answers,
    base_model,
    batch,
    cases,
    scramble,
    texts,
    trained,
)

PUBLIC = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "AdapterError",
    "AdapterMismatchError",
    "AdaptionPromptConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BeftConfig",
    "BitFitConfig",
    "CPTConfig",
    "CPTEmbedding",
    "CartridgeConfig",
    "CartridgeEncoder",
    "CheckpointError",
    "CombinedConfig",
    "ConfigError",
    "DataError",
    "IA3Config",
    "MultitaskPromptEmbedding",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "PTuningV2Config",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PrefixEncoder",
    "PrefixMemoryConfig",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "SofttuneError",
    "TaskType",
    "TrainingError",
    "UnsupportedModelError",
    "add_task_adapter",
    "compose_cartridge_adapters",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "prompt_embeddings_from_past_key_values",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
]
HEAVY = ("matplotlib", "fastapi", "uvicorn", "typer")


def test_exported_members() -> None:
    assert softtune.__all__ == PUBLIC
    assert all(hasattr(softtune, name) for name in PUBLIC)


def loaded_by(statement: str) -> list[str]:
    code = f"{statement}\nimport sys\nprint(*[m for m in {HEAVY} if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_is_light() -> None:
    assert loaded_by("import softtune") == []


def test_a_heavy_import_is_noticed() -> None:
    assert loaded_by("import typer") == ["typer"]


@pytest.mark.promise(1)
@pytest.mark.parametrize(("family", "task", "method"), cases())
@torch.no_grad()  # torch chooses other kernels for a base model that is not frozen
def test_disabled_is_the_base_model(family: str, task: str, method: str) -> None:
    model = adapted(family, task, method)
    base = base_model(family, task).requires_grad_(False)  # convolutions round otherwise where they need gradients
    inputs = {**batch(texts(family, task)), **answers(task, 3)}
    expected = base(**inputs).logits
    before = model(**inputs).logits
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, expected)
        if task != SEQ_CLS and method in KINDS:
            settings = {"max_new_tokens": 3, "do_sample": False}
            ids = batch(texts(family, task), "left")
            assert torch.equal(model.generate(**ids, **settings), base.generate(**ids, **settings))
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert torch.equal(model(**inputs).logits, before)
    if method not in ("bitfit", "bitfit_added"):
        assert torch.equal(model.get_base_model()(**inputs).logits, expected)


def test_disabling_is_counted() -> None:
    model, ids = adapted("gpt2", CAUSAL_LM, "prefix"), torch.tensor([[5, 6, 7]])
    model.add_adapter("b", PrefixTuningConfig(num_virtual_tokens=2))
    base = base_model("gpt2", CAUSAL_LM)(ids).logits
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, base)
        assert model.active_adapters == []
        assert model.active_peft_config is model.peft_config["default"]
    assert not torch.equal(model(ids).logits, base)


def test_an_adapter_that_is_chosen_while_none_acts_stays_chosen() -> None:
    model, ids = adapted("gpt2", CAUSAL_LM, "prefix"), torch.tensor([[5, 6, 7]])
    model.add_adapter("b", PrefixTuningConfig(num_virtual_tokens=2))
    with model.disable_adapter():
        model.set_adapter("b")
        assert torch.equal(model(ids).logits, base_model("gpt2", CAUSAL_LM)(ids).logits)
    assert model.active_adapter == "b"
    assert trained(model).keys() == {"prompt_encoder.b.embedding.weight"}
    assert torch.equal(model(ids).logits, model(ids, adapter_names=["b"]).logits)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("entry", ["add_adapter", "load_adapter", "from_pretrained"])
def test_an_adapter_has_the_mode_of_its_model(entry: str, training: bool, tmp_path: Path) -> None:
    config = PTuningV2Config(num_virtual_tokens=3, prefix_dropout=0.5, task_type=SEQ_CLS)
    base = base_model("roberta", SEQ_CLS, classifier_dropout=0.5)
    get_peft_model(base, config).save_pretrained(tmp_path)
    if entry == "from_pretrained":
        model = PeftModel.from_pretrained(base, tmp_path, is_trainable=training)
    else:
        model = PeftModel(base).train(training)
        model.add_adapter("default", config) if entry == "add_adapter" else model.load_adapter(tmp_path, "default")
    assert {module.training for module in model.modules()} == {training}
    inputs = batch(texts("roberta", SEQ_CLS))
    assert torch.equal(model(**inputs).logits, model(**inputs).logits) is not training


@pytest.mark.parametrize("first", ["prompt", "prefix_projection", "p_tuning_v2", "bitfit"])
@pytest.mark.parametrize("second", ["p_tuning_lstm", "prefix_last", "bitfit"])
def test_switching_between_adapters(first: str, second: str) -> None:
    inputs = batch(texts("gpt2", SEQ_CLS))
    model = adapted("gpt2", SEQ_CLS, first)
    model.add_adapter("second", METHODS[second](task_type=SEQ_CLS))
    assert model.active_adapters == ["default"]
    alone = model(**inputs).logits
    assert torch.equal(alone, adapted("gpt2", SEQ_CLS, first)(**inputs).logits)

    model.set_adapter("second")
    assert all(".second." in name for name in trained(model))
    scramble(model, seed=4).eval()
    other = model(**inputs).logits
    single = scramble(get_peft_model(base_model("gpt2", SEQ_CLS), METHODS[second](task_type=SEQ_CLS), "second"), seed=4)
    assert torch.equal(other, single.eval()(**inputs).logits)

    model.set_adapter("default")
    assert all(".default." in name for name in trained(model))
    assert torch.equal(model(**inputs).logits, alone)
    model.delete_adapter("default")
    assert model.active_adapter == "second"
    assert list(model.peft_config) == ["second"]
    assert not any("default" in name for name, _ in model.named_parameters())
    assert torch.equal(model(**inputs).logits, other)


def test_an_adapter_for_inference_is_not_trained_when_chosen(tmp_path: pytest.TempPathFactory) -> None:
    model = adapted("gpt2", CAUSAL_LM, "prefix")
    model.save_pretrained(str(tmp_path))
    model.load_adapter(str(tmp_path), "frozen")
    model.set_adapter("frozen")
    assert not trained(model)
    model.set_adapter("default")
    assert trained(model).keys() == {"prompt_encoder.default.embedding.weight"}


def test_an_adapter_may_be_chosen_without_training_it() -> None:
    model = adapted("gpt2", CAUSAL_LM, "prefix")
    model.set_adapter("default", inference_mode=True)
    assert not trained(model)
    model.set_adapter("default")
    assert trained(model)


def test_an_adapter_is_chosen_by_a_list_of_one_name() -> None:
    model = adapted("gpt2", CAUSAL_LM, "prefix")
    model.add_adapter("b", PrefixTuningConfig(num_virtual_tokens=2))
    model.set_adapter(["b"])
    assert model.active_adapter == "b"
    for names in (["default", "b"], []):
        with pytest.raises(AdapterError, match=r"one adapter acts on a batch, not \[.*: name it"):
            model.set_adapter(names)
    assert model.active_adapter == "b"


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_pickled_model_runs_in_another_process(family: str, tmp_path: Path) -> None:
    task = {"llama": CAUSAL_LM, "t5": SEQ_2_SEQ_LM}[family]
    model, inputs = adapted(family, task, "prefix"), {**batch(texts(family, task)), **answers(task, 3)}
    expected = model(**inputs).logits
    torch.save((model, inputs, expected), tmp_path / "model.pt")
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, expected)
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "model, inputs, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "print(torch.equal(model(**inputs).logits, expected))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True\n"


@pytest.mark.parametrize("assign", [False, True])
def test_the_state_of_a_module_around_the_model(assign: bool) -> None:
    class Around(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.inner = adapted("bert", SEQ_CLS, "prefix", seed=seed)

    source, target = Around(1), Around(2)
    base = [id(p) for p in target.inner.base_model.parameters()]
    state = source.state_dict()
    assert not any("base_model" in name for name in state)
    target.load_state_dict(state, assign=assign)
    torch.testing.assert_close(dict(target.state_dict()), dict(state), rtol=0, atol=0)
    assert [id(p) for p in target.inner.base_model.parameters()] == base
    name = next(iter(state))
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        target.load_state_dict({n: x for n, x in state.items() if n != name})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"inner\.other"'):
        target.load_state_dict({**state, "inner.other": torch.zeros(1)})


def test_deleting_another_adapter_keeps_the_active_one() -> None:
    model = adapted("gpt2", CAUSAL_LM, "bitfit")
    model.add_adapter("other", PrefixTuningConfig(num_virtual_tokens=2))
    expected = model(**batch(texts("gpt2", CAUSAL_LM))).logits
    model.delete_adapter("other")
    assert torch.equal(model(**batch(texts("gpt2", CAUSAL_LM))).logits, expected)


def test_the_config_of_the_caller_is_left_alone() -> None:
    config = PrefixTuningConfig(num_virtual_tokens=2)
    before = config.to_dict()
    get_peft_model(base_model("gpt2", CAUSAL_LM), config)
    assert config.to_dict() == before


def test_printing_shows_the_prompt_encoder() -> None:
    text = str(adapted("gpt2", CAUSAL_LM, "prefix_projection"))
    assert "(prompt_encoder): ModuleDict" in text
    assert "(default): PrefixEncoder" in text
    assert "(transform): Sequential" in text
    assert "GPT2LMHeadModel" in text


def test_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted("gpt2", CAUSAL_LM, "prefix")
    total = sum(p.numel() for p in base_model("gpt2", CAUSAL_LM).parameters())
    assert model.get_nb_trainable_parameters() == (720, total + 720)
    model.print_trainable_parameters()
    share = 100 * 720 / (total + 720)
    assert (
        capsys.readouterr().out == f"trainable params: 720 || all params: {total + 720:,} || trainable%: {share:.4f}\n"
    )


def test_the_head_is_trained_where_the_task_has_one() -> None:
    for task_type, heads in ((SEQ_CLS, {"score"}), (None, set())):
        model = get_peft_model(base_model("llama", SEQ_CLS), PromptTuningConfig(task_type=task_type))
        assert set(model.heads["default"].keys()) == heads
    named = get_peft_model(base_model("llama", SEQ_CLS), PromptTuningConfig(modules_to_save=["score", "norm"]))
    assert set(named.heads["default"].keys()) == {"score", "model/norm"}


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_attributes_are_the_base_models(family: str) -> None:
    model = adapted(family, SEQ_2_SEQ_LM, "prompt")
    assert model.config is model.get_base_model().config
    assert model.device == torch.device("cpu")
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = model.no_such_attribute


def test_every_config_is_in_the_map() -> None:
    assert {c.__name__ for c in softtune.PEFT_TYPE_TO_CONFIG_MAPPING.values()} == {
        "PromptTuningConfig",
        "PromptEncoderConfig",
        "PrefixTuningConfig",
        "PTuningV2Config",
        "BitFitConfig",
        "CartridgeConfig",
        "CPTConfig",
        "MultitaskPromptTuningConfig",
        "AdaptionPromptConfig",
        "PrefixMemoryConfig",
        "BeftConfig",
        "IA3Config",
        "CombinedConfig",
    }
    for peft_type, config in softtune.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        assert config(task_type=CAUSAL_LM).peft_type is peft_type


def test_bitfit_roles() -> None:
    model = get_peft_model(base_model("bert", SEQ_CLS), BitFitConfig(roles=["query", "intermediate"]))
    names = {n.split("changes.")[1] for n in trained(model) if "changes" in n}
    ends = ("attention/self/query", "intermediate/dense")
    assert names == {f"bert/encoder/layer/{i}/{end}" for i in (0, 1) for end in ends}


def test_arguments_in_the_wrong_order_are_told(tmp_path: Path) -> None:
    base, config = base_model("gpt2", CAUSAL_LM), PromptTuningConfig(num_virtual_tokens=P)
    with pytest.raises(ConfigError, match=r"the base model comes first: get_peft_model\(model, config\)"):
        get_peft_model(config, base)
    with pytest.raises(ConfigError, match=r"the base model comes first: PeftModel\.from_pretrained\(model, folder\)"):
        PeftModel.from_pretrained(str(tmp_path), base)
    with pytest.raises(ConfigError, match=r"PromptTuningConfig is a class: give a config of it"):
        get_peft_model(base, PromptTuningConfig)
