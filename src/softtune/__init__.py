"""Soft-prompt parameter-efficient tuning of frozen Hugging Face transformers.

A script written for PEFT's prefix tuning, prompt tuning or P-tuning runs when it imports from here.
"""

from softtune import compat  # noqa: F401  # first, since it says in one line that transformers is too old
from softtune.errors import (
    AdapterError,
    AdapterMismatchError,
    CheckpointError,
    ConfigError,
    DataError,
    SofttuneError,
    TrainingError,
    UnsupportedModelError,
)
from softtune.methods import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    BitFitConfig,
    PeftConfig,
    PeftType,
    PrefixEncoder,
    PrefixTuningConfig,
    PromptEmbedding,
    PromptEncoder,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptLearningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    PTuningV2Config,
    TaskType,
)
from softtune.model import PeftModel
from softtune.peft_functions import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

__version__ = "0.1.0"

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "AdapterError",
    "AdapterMismatchError",
    "BitFitConfig",
    "CheckpointError",
    "ConfigError",
    "DataError",
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
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "set_peft_model_state_dict",
]
