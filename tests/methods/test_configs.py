"""Configs: PEFT's names and defaults, files, and sizes read off the base model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
from tests.families import CAUSAL_LM, METHODS, SEQ_2_SEQ_LM, base_model

import softtune
from softtune import ConfigError, PeftConfig, PeftType, PrefixTuningConfig, PromptTuningConfig, get_peft_model

SHARED = ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig", "CartridgeConfig"]
BY_FIELDS = [*SHARED, "CPTConfig", "MultitaskPromptTuningConfig"]
"""Configs that are PEFT's, field by field."""
OTHER_DEFAULTS = {"prompt_tuning_init": "softtune starts from the vocabulary", "num_virtual_tokens": "PEFT has none"}


@pytest.mark.parametrize("name", BY_FIELDS)
def test_fields_and_defaults_are_pefts(name: str) -> None:
    theirs = {f.name: f.default for f in dataclasses.fields(getattr(peft, name))}
    ours = {f.name: f for f in dataclasses.fields(getattr(softtune, name))}
    assert {n for n, f in ours.items() if not f.metadata.get("ours")} <= theirs.keys()
    for field in ours.values():
        if (
            field.name in theirs
            and field.name not in OTHER_DEFAULTS
            and field.name not in ("peft_type", "init_weights")
        ):
            default = theirs[field.name]
            assert field.default == default or default is dataclasses.MISSING, field.name


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_read(method: str, tmp_path: Path) -> None:
    config = METHODS[method](task_type=CAUSAL_LM)
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert PeftConfig.from_dict(config.to_dict()) == config
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = {f.name for f in dataclasses.fields(config) if f.metadata.get("ours")}
    assert not ours & written.keys()


@pytest.mark.parametrize("name", SHARED)
def test_peft_reads_the_file(name: str, tmp_path: Path) -> None:
    fields = {"num_virtual_tokens": 7, "task_type": CAUSAL_LM}
    getattr(softtune, name)(**fields).save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert type(config).__name__ == name
    assert config.num_virtual_tokens == 7


@pytest.mark.parametrize(
    ("family", "task", "sizes"),
    [
        (
            "llama",
            CAUSAL_LM,
            {"token_dim": 16, "num_attention_heads": 2, "num_layers": 2, "num_transformer_submodules": 1},
        ),
        (
            "qwen3",
            CAUSAL_LM,
            {"token_dim": 24, "num_attention_heads": 2, "num_layers": 2, "num_transformer_submodules": 1},
        ),
        (
            "t5",
            SEQ_2_SEQ_LM,
            {"token_dim": 48, "num_attention_heads": 4, "num_layers": 2, "num_transformer_submodules": 2},
        ),
    ],
)
def test_sizes_come_from_the_base_model(family: str, task: str, sizes: dict[str, int]) -> None:
    config = get_peft_model(base_model(family, task), PrefixTuningConfig()).peft_config["default"]
    assert {name: getattr(config, name) for name in sizes} == sizes


@pytest.mark.parametrize("method", METHODS)
def test_values_of_a_wrong_type_are_named(method: str) -> None:
    for field, value in (("task_type", "CHAT"), ("inference_mode", "maybe"), ("modules_to_save", 3)):
        with pytest.raises(ConfigError, match=field):
            METHODS[method](**{field: value})


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("PromptEncoderConfig", "encoder_dropout", 1.0),
        ("PromptEncoderConfig", "encoder_reparameterization_type", "GRU"),
        ("PromptEncoderConfig", "encoder_num_layers", 0),
        ("PromptTuningConfig", "placement", "infix"),
        ("PromptTuningConfig", "prompt_tuning_init", "ZERO"),
        ("PrefixTuningConfig", "placement", "suffix"),
        ("PrefixTuningConfig", "init_weights", "ones"),
        ("PTuningV2Config", "prefix_dropout", -0.1),
        ("BitFitConfig", "roles", ["bias"]),
        ("BitFitConfig", "roles", []),
    ],
)
def test_values_out_of_range_are_named(name: str, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        getattr(softtune, name)(**{field: value})


@pytest.mark.parametrize("field", [{"layers": "last:1"}, {"sites": ["decoder"]}, {"shift_positions": False}])
def test_embedding_only_has_no_layers(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="embedding_only"):
        PrefixTuningConfig(embedding_only=True, **field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_tuning_init_labels", ["good", "bad"]),
        ("prompt_tuning_init_file", "folder"),
        ("tokenizer_kwargs", {"use_fast": True}),
    ],
)
def test_a_start_that_has_no_use_for_a_field_refuses_it(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"RANDOM has no use for {field}"):
        PromptTuningConfig(prompt_tuning_init="RANDOM", **{field: value})


IGNORED = [
    ("PrefixTuningConfig", {"encoder_hidden_size": 9}, "set prefix_projection=True"),
    ("PrefixTuningConfig", {"encoder_hidden_size": 9, "token_dim": 16}, "set prefix_projection=True"),
    ("PromptEncoderConfig", {"encoder_num_layers": 3}, "encoder_num_layers of PromptEncoderConfig: for the LSTM"),
    (
        "PromptEncoderConfig",
        {"encoder_num_layers": 5, "encoder_dropout": 0.1},
        "encoder_num_layers and encoder_dropout",
    ),
    ("PromptTuningConfig", {"prompt_tuning_init_text": "the movie"}, "SAMPLE_VOCAB has no use for it"),
]
"""What PEFT accepts and ignores."""


@pytest.mark.parametrize(("name", "fields", "message"), IGNORED)
def test_a_field_that_peft_ignores_is_left_out_with_a_warning_and_kept_in_a_saved_config(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    own, kept = getattr(softtune, name), {key: value for key, value in fields.items() if key == "token_dim"}
    with pytest.warns(UserWarning, match=message) as warned:
        assert own(**fields) == own(**kept)
    assert [Path(warning.filename).name for warning in warned] == ["test_configs.py"]
    saved = own(**fields, inference_mode=True)
    saved.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == saved


def test_a_field_without_use_is_refused() -> None:
    with pytest.raises(ConfigError, match="is for init_text"):
        PrefixTuningConfig(tokenizer_name_or_path="folder")


def test_the_line_of_the_tutorials() -> None:
    kind = softtune.PromptEncoderReparameterizationType.MLP
    with pytest.warns(UserWarning, match="the MLP has no use for it"):
        config = softtune.PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=10,
            encoder_reparameterization_type=kind,
            encoder_dropout=0.1,
            encoder_num_layers=5,
            encoder_hidden_size=1024,
        )
    assert (config.encoder_hidden_size, config.encoder_dropout, config.encoder_num_layers) == (1024, 0.0, 2)


def test_fields_with_a_use_are_taken() -> None:
    assert PrefixTuningConfig(encoder_hidden_size=9, prefix_projection=True).encoder_hidden_size == 9
    PrefixTuningConfig(tokenizer_name_or_path="folder", init_text="some words")
    PrefixTuningConfig(encoder_hidden_size=768, token_dim=768)  # as PEFT's documentation and folders have it
    softtune.PromptEncoderConfig(
        encoder_reparameterization_type="LSTM", encoder_num_layers=3, encoder_dropout=0.1, encoder_hidden_size=7
    )


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize(("name", "fields"), [(name, fields) for name, fields, _ in IGNORED])
def test_peft_may_have_saved_what_it_ignored(
    name: str, fields: dict[str, Any], inference_mode: bool, tmp_path: Path
) -> None:
    theirs = getattr(peft, name)(num_virtual_tokens=7, **fields, inference_mode=inference_mode)
    theirs.save_pretrained(str(tmp_path))
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.num_virtual_tokens == 7
    assert all(getattr(config, field) != value for field, value in fields.items() if field.startswith("encoder"))


def test_only_virtual_tokens_are_prompt_learning() -> None:
    """PEFT's attribute, by which other libraries tell the two kinds of method apart."""
    for name in SHARED:
        assert getattr(softtune, name)().is_prompt_learning
        assert getattr(peft, name)(num_virtual_tokens=7).is_prompt_learning
    assert softtune.PTuningV2Config().is_prompt_learning
    assert not softtune.BitFitConfig().is_prompt_learning
    assert not peft.LoraConfig().is_prompt_learning


def test_a_word_for_a_method_is_enough() -> None:
    for peft_type in PeftType:
        task = {"task_type": CAUSAL_LM} if peft_type is PeftType.CPT else {}  # as in PEFT, for this task alone
        assert softtune.get_peft_config({"peft_type": peft_type.value, **task}).peft_type is peft_type


def test_a_config_class_of_ones_own_leaves_the_methods_alone() -> None:
    @dataclasses.dataclass(kw_only=True, eq=False)
    class OwnConfig(PrefixTuningConfig):
        pass

    assert type(PeftConfig.from_dict({"peft_type": PeftType.PREFIX_TUNING})) is PrefixTuningConfig
    assert OwnConfig().peft_type is PeftType.PREFIX_TUNING
