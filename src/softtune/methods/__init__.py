"""The methods, one file per paper. Internal: import from ``softtune``."""

from softtune.methods.base import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftType, PromptLearningConfig, TaskType
from softtune.methods.bitfit import BitFitConfig
from softtune.methods.cpt import CPTConfig, CPTEmbedding
from softtune.methods.multitask_prompt_tuning import (
    MultitaskPromptEmbedding,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
)
from softtune.methods.p_tuning import PromptEncoder, PromptEncoderConfig, PromptEncoderReparameterizationType
from softtune.methods.p_tuning_v2 import PTuningV2Config
from softtune.methods.prefix_tuning import PrefixEncoder, PrefixTuningConfig
from softtune.methods.prompt_tuning import PromptEmbedding, PromptTuningConfig, PromptTuningInit

PEFT_TYPE_TO_CONFIG_MAPPING.update(
    {
        PeftType.PREFIX_TUNING: PrefixTuningConfig,
        PeftType.PROMPT_TUNING: PromptTuningConfig,
        PeftType.P_TUNING: PromptEncoderConfig,
        PeftType.P_TUNING_V2: PTuningV2Config,
        PeftType.BITFIT: BitFitConfig,
        PeftType.CPT: CPTConfig,
        PeftType.MULTITASK_PROMPT_TUNING: MultitaskPromptTuningConfig,
    }
)

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "BitFitConfig",
    "CPTConfig",
    "CPTEmbedding",
    "MultitaskPromptEmbedding",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "PTuningV2Config",
    "PeftConfig",
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
    "TaskType",
]
