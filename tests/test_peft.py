"""Parity with PEFT where PEFT is right: logits, gradients, and folders in both directions.

PEFT returns logits of the virtual tokens too; softtune's begin at the caller's first token.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from torch import Tensor

import softtune
from softtune import ConfigError, PeftModel, PromptTuningConfig, get_peft_model
from softtune.compat import INSTALLED
from tests.families import (
    CAUSAL_LM,
    FAMILIES,
    METHODS,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    P,
    adapted,
    answers,
    base_model,
    batch,
    scramble,
    takes,
    texts,
    trained,
)

CONFIGS = {
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=P),
    "p_tuning_mlp": lambda task: peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=P, encoder_hidden_size=11),
    "p_tuning_lstm": lambda task: peft.PromptEncoderConfig(
        task_type=task,
        num_virtual_tokens=P,
        encoder_hidden_size=7,
        encoder_reparameterization_type="LSTM",
        encoder_num_layers=2,
    ),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P),
    "prefix_projection": lambda task: peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=9
    ),
    "cartridge": lambda task: peft.CartridgeConfig(task_type=task, num_virtual_tokens=P),
}
INPUT = ("prompt", "p_tuning_mlp", "p_tuning_lstm")
EVEN = {  # what PEFT needs of an encoder-decoder: equal depths and heads, d_kv = d_model / heads
    "t5": {"d_kv": 8, "num_layers": 2},
    **{family: {"encoder_layers": 3, "decoder_attention_heads": 4} for family in ("bart", "mbart")},
}
PREFIX = ("prefix", "prefix_projection", "cartridge")
PEFT_CANNOT = {
    # It finds no sizes in the config.
    **dict.fromkeys(("mpt", "mamba", "encoder_decoder"), tuple(CONFIGS)),
    # It takes the hidden size for that of the embedding.
    **dict.fromkeys(("opt", "electra"), INPUT),
    # It does not multiply words as the encoder does.
    **dict.fromkeys(("marian", "pegasus"), INPUT),
    # It does not save the whole head; no prefix either in DistilBERT and ModernBERT.
    **dict.fromkeys(("distilbert", "modernbert", "deberta", "deberta_v2"), tuple(CONFIGS)),
    # It gives every layer the same number of key heads of the same size, alike for keys and values.
    **dict.fromkeys(("falcon_multi_query", "deepseek_v3", "gemma4", "gemma4_small"), PREFIX),
    # It gives layers without attention a prefix too.
    **dict.fromkeys(("qwen3_next", "granitemoehybrid", "lfm2"), PREFIX),
    # It hands a prefix to models with a cache alone.
    "layoutlm": PREFIX,
    # Both: the embedding's size, and a prefix for layers that are one.
    "albert": tuple(CONFIGS),
}
PEFT_SEES_CACHES = Version("5.24") > INSTALLED
"""Whether PEFT 0.21.2 finds a cache among what an encoder takes, by the name that it had before."""
if not PEFT_SEES_CACHES:
    for encoder in ("bert", "roberta", "electra"):
        PEFT_CANNOT[encoder] = (*PEFT_CANNOT.get(encoder, ()), *PREFIX)
CASES = [
    (family, task, method)
    for family, row in FAMILIES.items()
    for task in row.tasks[:1]
    for method in (INPUT if task == SEQ_2_SEQ_LM else CONFIGS)
    if takes(family, method) and method not in PEFT_CANNOT.get(family, ())
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    # What PEFT 0.21.2 calls by names of before transformers 5.24.
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Both .past_key_values. and .cache. are set:FutureWarning"),
]


def in_peft(family: str, task: str, method: str) -> peft.PeftModel:
    return scramble(peft.get_peft_model(base_model(family, task, **EVEN.get(family, {})), CONFIGS[method](task))).eval()


def in_softtune(family: str, task: str, method: str) -> PeftModel:
    base = base_model(family, task, **EVEN.get(family, {}))
    return scramble(get_peft_model(base, METHODS[method](task_type=task))).eval()


def inputs_for(family: str, task: str) -> dict[str, Tensor]:
    rows = (
        texts(family, task, (3, 2, 1)) if FAMILIES[family].window else texts(family, task)
    )  # PEFT's prefix leaves the window
    return {**batch(rows), **answers(task, len(rows))}


def real_logits(model: torch.nn.Module, task: str, inputs: dict[str, Tensor]) -> Tensor:
    logits = model(**inputs).logits
    if task != CAUSAL_LM:
        return logits
    return logits[:, -inputs["input_ids"].shape[1] :][inputs["attention_mask"].bool()]


# Of an encoder-decoder's prompt, PEFT runs the LSTM over 2P tokens and uses P.
@pytest.mark.promise(6)
@pytest.mark.parametrize(("family", "task", "method"), [c for c in CASES if c[1:] != (SEQ_2_SEQ_LM, "p_tuning_lstm")])
def test_logits_and_gradients(family: str, task: str, method: str) -> None:
    theirs, ours = in_peft(family, task, method), in_softtune(family, task, method)
    encoder = theirs.prompt_encoder["default"].state_dict()
    if task == SEQ_2_SEQ_LM:  # PEFT trains 2P rows and uses P
        encoder["embedding.weight"] = encoder["embedding.weight"][:P]
    ours.prompt_encoder["default"].load_state_dict(encoder)
    if task == SEQ_CLS:
        ours.heads["default"]["classifier"].load_state_dict(theirs.classifier.modules_to_save["default"].state_dict())
    inputs = inputs_for(family, task)
    logits, expected = real_logits(ours, task, inputs), real_logits(theirs, task, inputs)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, parameter in ours.prompt_encoder["default"].named_parameters():
        gradient = theirs.prompt_encoder["default"].get_parameter(name).grad[: len(parameter)]
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.promise(4)
@pytest.mark.parametrize(("family", "task", "method"), CASES)
def test_peft_saves_softtune_loads(family: str, task: str, method: str, tmp_path: Path) -> None:
    theirs = in_peft(family, task, method)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(base_model(family, task, **EVEN.get(family, {})), tmp_path)
    inputs = inputs_for(family, task)
    torch.testing.assert_close(real_logits(ours, task, inputs), real_logits(theirs, task, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.promise(4)
@pytest.mark.parametrize(("family", "task", "method"), CASES)
def test_softtune_saves_peft_loads(family: str, task: str, method: str, tmp_path: Path) -> None:
    ours = in_softtune(family, task, method)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base_model(family, task, **EVEN.get(family, {})), tmp_path).eval()
    inputs = inputs_for(family, task)
    torch.testing.assert_close(real_logits(ours, task, inputs), real_logits(theirs, task, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.promise(4)
@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("method", ["prefix", "prefix_projection", "cartridge"])
def test_encoder_decoder_prefix_of_peft(family: str, method: str, tmp_path: Path) -> None:
    """PEFT gives the decoder's own attention a prefix, and no other site."""
    theirs = in_peft(family, SEQ_2_SEQ_LM, method)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(base_model(family, SEQ_2_SEQ_LM, **EVEN[family]), tmp_path)
    inputs = inputs_for(family, SEQ_2_SEQ_LM)
    expected = theirs(**inputs).logits
    torch.testing.assert_close(ours(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    ours.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(base_model(family, SEQ_2_SEQ_LM, **EVEN[family]), tmp_path / "again")
    torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.promise(4)
@pytest.mark.parametrize(
    ("family", "task", "method"),
    [
        ("gpt2", CAUSAL_LM, "prompt_suffix"),
        ("gpt2", CAUSAL_LM, "prefix_last"),
        ("gpt2", CAUSAL_LM, "infix"),
        ("gpt2", CAUSAL_LM, "embedding_only"),
        ("gpt2", CAUSAL_LM, "p_tuning_v2"),
        ("gpt2", CAUSAL_LM, "bitfit"),
        ("t5", SEQ_2_SEQ_LM, "prefix"),
        ("t5", SEQ_2_SEQ_LM, "prompt"),
        *((f, FAMILIES[f].tasks[0], m) for f, methods in PEFT_CANNOT.items() for m in methods if takes(f, m)),
    ],
)
def test_peft_computes_the_same_or_fails_loudly(family: str, task: str, method: str, tmp_path: Path) -> None:
    ours = scramble(get_peft_model(base_model(family, task), METHODS[method](task_type=task))).eval()
    ours.save_pretrained(tmp_path)
    inputs = inputs_for(family, task)
    try:
        theirs = peft.PeftModel.from_pretrained(base_model(family, task), tmp_path).eval()
        expected = real_logits(theirs, task, inputs)
    except (KeyError, ValueError, TypeError, RuntimeError):
        assert method != "prompt" or family in PEFT_CANNOT
        return
    torch.testing.assert_close(real_logits(ours, task, inputs), expected, atol=1e-5, rtol=1e-5)


def test_a_script_for_peft_runs_under_softtune(tmp_path: Path) -> None:
    """The calls of PEFT's own quick tour."""
    for library in (peft, softtune):
        config = library.PrefixTuningConfig(task_type=library.TaskType.CAUSAL_LM, num_virtual_tokens=P)
        model = library.get_peft_model(base_model("llama", CAUSAL_LM), config)
        assert model.get_nb_trainable_parameters()[0] == P * 2 * 2 * 16
        model.print_trainable_parameters()
        assert model.active_adapter == "default"
        assert model.peft_config["default"].num_virtual_tokens == P
        with model.disable_adapter():
            model(**batch(texts("llama", CAUSAL_LM)))
        model.save_pretrained(tmp_path / library.__name__)
        loaded = library.PeftModel.from_pretrained(base_model("llama", CAUSAL_LM), tmp_path / library.__name__)
        loaded.add_adapter("other", config)
        loaded.set_adapter("other")
        assert loaded.get_prompt_embedding_to_save("default").shape == (P, 2 * 2 * 16)
        assert (
            library.PeftConfig.from_pretrained(tmp_path / library.__name__).peft_type == library.PeftType.PREFIX_TUNING
        )
        loaded.set_adapter("default")
        loaded.delete_adapter("other")


def test_options_of_pefts_calls(tmp_path: Path) -> None:
    """PEFT's own defaults may be written out; what a soft prompt has no use for is refused."""
    config = softtune.PrefixTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=P)
    model = softtune.get_peft_model(
        base_model("gpt2", CAUSAL_LM), config, **defaults(peft.get_peft_model) | {"revision": "main"}
    )
    assert model.peft_config["default"].revision == "main"
    assert config.revision is None
    assert softtune.PeftModel(model.get_base_model(), config, **defaults(peft.PeftModel.__init__)).active_adapter
    model.add_adapter("other", config, **defaults(peft.PeftModel.add_adapter))
    model.set_adapter("other", **defaults(peft.PeftModel.set_adapter))
    state = softtune.get_peft_model_state_dict(model, **defaults(peft.get_peft_model_state_dict))
    softtune.set_peft_model_state_dict(model, state, **defaults(peft.set_peft_model_state_dict))
    model.save_pretrained(tmp_path, **defaults(peft.PeftModel.save_pretrained))
    model.load_adapter(tmp_path, "third", **defaults(peft.PeftModel.load_adapter))
    softtune.PeftModel.from_pretrained(model.get_base_model(), tmp_path, **defaults(peft.PeftModel.from_pretrained))
    calls: list[tuple[str, Any]] = [
        ("mixed=True", lambda: softtune.get_peft_model(model.get_base_model(), config, mixed=True)),
        ("size=1", lambda: model.add_adapter("fourth", config, size=1)),
        (
            "ignore_mismatched_sizes=True",
            lambda: softtune.set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True),
        ),
    ]
    for option, call in calls:
        with pytest.raises(ConfigError, match=f"{option}.*: (leave it out|use one of)") as refusal:
            call()
        assert "\n" not in str(refusal.value)


def defaults(call: Any) -> dict[str, Any]:
    """The keyword options of a call, as they are by default."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(call).parameters.items()
        if parameter.default is not parameter.empty
    }


def test_loss_leaves_out_the_first_token() -> None:
    """PEFT's prompt tuning also asks the last virtual token for the caller's first one; its logits are the same."""
    theirs, ours = in_peft("gpt2", CAUSAL_LM, "prompt"), in_softtune("gpt2", CAUSAL_LM, "prompt")
    ours.prompt_encoder["default"].load_state_dict(theirs.prompt_encoder["default"].state_dict())
    ids = torch.stack(texts("gpt2", CAUSAL_LM, (7, 7)))
    first_masked = ids.clone()
    first_masked[:, 0] = -100
    expected = theirs(input_ids=ids, labels=first_masked).loss
    torch.testing.assert_close(ours(input_ids=ids, labels=ids).loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(input_ids=ids, labels=first_masked).loss, expected, rtol=1e-5, atol=1e-6)


def test_state_dicts_have_the_same_names() -> None:
    method = "prefix" if PEFT_SEES_CACHES else "prompt"
    theirs, ours = in_peft("bert", SEQ_CLS, method), in_softtune("bert", SEQ_CLS, method)
    own, other = softtune.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in other.items()}
    softtune.set_peft_model_state_dict(ours, other)
    inputs = inputs_for("bert", SEQ_CLS)
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(PEFT_SEES_CACHES, reason="PEFT's prefixes act there")
@pytest.mark.parametrize("family", ["llama", "qwen3", "bloom"])
def test_a_prefix_that_peft_loses_acts_here(family: str) -> None:
    """The cache that PEFT hands to ``generate`` goes by a name that nobody reads."""
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    inputs = batch(texts(family, CAUSAL_LM, (5,)))
    models = base_model(family, CAUSAL_LM), in_peft(family, CAUSAL_LM, "prefix"), adapted(family, CAUSAL_LM, "prefix")
    plain, theirs, ours = (torch.stack(model.generate(**inputs, **settings, pad_token_id=1).logits) for model in models)
    torch.testing.assert_close(theirs, plain, atol=1e-5, rtol=1e-5)
    assert (ours - plain).abs().max() > 0.1


def test_training_goes_on_from_a_folder_of_peft(tmp_path: Path) -> None:
    theirs = in_peft("gpt2", CAUSAL_LM, "prefix")
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM), tmp_path, is_trainable=True)
    assert ours.training
    (parameter,) = trained(ours).values()
    assert torch.equal(parameter, theirs.prompt_encoder["default"].embedding.weight)


@pytest.mark.parametrize("method", ["p_tuning_mlp", "p_tuning_lstm", "prefix_projection"])
def test_an_encoder_that_peft_did_not_save_is_no_silent_loss(method: str, tmp_path: Path) -> None:
    in_peft("gpt2", CAUSAL_LM, method).save_pretrained(tmp_path)
    with pytest.raises(softtune.CheckpointError, match="is_trainable=False"):
        PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM), tmp_path, is_trainable=True)


def test_a_prompt_of_peft_starts_another(tmp_path: Path) -> None:
    theirs = in_peft("gpt2", CAUSAL_LM, "p_tuning_mlp")
    theirs.save_pretrained(tmp_path)
    config = PromptTuningConfig(num_virtual_tokens=P, prompt_tuning_init="FILE", prompt_tuning_init_file=str(tmp_path))
    model = get_peft_model(base_model("gpt2", CAUSAL_LM), config)
    expected = theirs.get_prompt_embedding_to_save("default")
    torch.testing.assert_close(model.get_prompt_embedding_to_save("default"), expected)
