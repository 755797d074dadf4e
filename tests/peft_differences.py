"""PEFT's tests that are not run, and those that are expected to fail with softtune; read by ``tests/peft_suite.py``.

A key is a regular expression that is searched for in a test's id, such as
``peft_tests/test_config.py::TestPeftConfig::test_to_dict[PromptTuningConfig-mandatory_kwargs26]``. Its value is the
reason.
"""

from __future__ import annotations

LEFT_OUT: dict[str, str] = {
    r"test_gpu_examples\.py": "needs a GPU, and models of the hub",
    r"test_config\.py.*(test_from_pretrained(_cache_dir)?|test_save_pretrained_with_runtime_config)\[": (
        "reads a LoRA adapter of the hub, whatever config class it is a parameter of"
    ),
}
"""Tests that are not run."""

EXPECTED: dict[str, str] = {
    r"test_seq_classifier\.py.*test_modules_to_save_correctly_set": (
        "the base model's own classifier stays in its place, without a wrapper around it"
    ),
    r"test_encoder_decoder_models\.py.*test_generate_pos_args": "generate takes the input by position too",
    r"test_decoder_models\.py.*test_set_requires_grad_prompt_learning_raises": "set_requires_grad works for prompts",
    r"test_initialization\.py.*TestLoadPeftKeyMapping": "for models that are no transformers",
    r"test_config\.py.*test_set_attributes": "a method that there is not is refused",
    r"test_config\.py.*test_from_json_file\[(PrefixTuning|PromptTuning|PromptEncoder|Cartridge)Config": (
        "fields that PEFT lacks are not in the file that PEFT reads"
    ),
    r"test_config\.py.*test_prompt_encoder_warning_num_layers": "the config warns, when it is made",
    r"test_decoder_models\.py.*test_prefix_tuning_gemma4_(raises|warns)": (
        "every layer of Gemma 4 takes its prefix: none is skipped"
    ),
    r"test_decoder_models\.py.*test_prefix_tuning_offsets_position_ids_in_forward": (
        "replaces the base model's forward, which then passes its layers by"
    ),
    r"test_cartridge\.py.*test_cartridge_offsets_position_ids_in_forward": (
        "replaces the base model's forward, which then passes its layers by"
    ),
    r"test_cartridge\.py.*test_cartridge_prefill_4d_mask_uses_cache_position": (
        "looks at how PEFT makes its inputs: softtune's prefix joins them in the stack"
    ),
    r"test_cartridge\.py.*test_cartridge_gradient_checkpointing_raises": "gradient checkpointing works with prefixes",
    r"test_decoder_models\.py.*test_prompt_tuning_config_invalid_args": "says the same in other words",
    r"test_initialization\.py.*test_use_prompt_tuning_init_text_raises": "the base model's tokenizer reads the text",
    r"test_decoder_models\.py.*test_prompt_tuning_prepare_inputs_for_generation_4d_attention_mask": (
        "looks at how PEFT makes its inputs: softtune's vectors join them in the stack"
    ),
    r"test_decoder_models\.py.*test_prompt_tuning_trust_remote_code": (
        "a config that would let a downloaded tokenizer run code is refused rather than cut"
    ),
}
"""Tests that pass with PEFT and must fail with softtune, which deliberately does otherwise. The run fails where such a
test passes, as it does where any other test fails."""
