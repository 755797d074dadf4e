"""The methods, one file per paper. Internal: import from ``softtune``."""

from softtune.methods.adaption_prompt import AdaptionPromptConfig
from softtune.methods.base import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PromptLearningConfig
from softtune.methods.beft import BeftConfig
from softtune.methods.bitfit import BitFitConfig
from softtune.methods.cartridge import CartridgeConfig, CartridgeEncoder
from softtune.methods.combined import CombinedConfig
from softtune.methods.cpt import CPTConfig, CPTEmbedding
from softtune.methods.ia3 import IA3Config
from softtune.methods.multitask_prompt_tuning import (
    MultitaskPromptEmbedding,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
)
from softtune.methods.p_tuning import PromptEncoder, PromptEncoderConfig, PromptEncoderReparameterizationType
from softtune.methods.p_tuning_v2 import PTuningV2Config
from softtune.methods.prefix_memory import PrefixMemoryConfig
from softtune.methods.prefix_tuning import PrefixEncoder, PrefixTuningConfig
from softtune.methods.prompt_tuning import PromptEmbedding, PromptTuningConfig, PromptTuningInit
from softtune.peft_types import PeftType, TaskType

PEFT_TYPE_TO_CONFIG_MAPPING.update(
    {
        PeftType.PREFIX_TUNING: PrefixTuningConfig,
        PeftType.PROMPT_TUNING: PromptTuningConfig,
        PeftType.P_TUNING: PromptEncoderConfig,
        PeftType.P_TUNING_V2: PTuningV2Config,
        PeftType.BITFIT: BitFitConfig,
        PeftType.CARTRIDGE: CartridgeConfig,
        PeftType.CPT: CPTConfig,
        PeftType.MULTITASK_PROMPT_TUNING: MultitaskPromptTuningConfig,
        PeftType.ADAPTION_PROMPT: AdaptionPromptConfig,
        PeftType.PREFIX_MEMORY: PrefixMemoryConfig,
        PeftType.BEFT: BeftConfig,
        PeftType.IA3: IA3Config,
        PeftType.COMBINED: CombinedConfig,
    }
)

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "AdaptionPromptConfig",
    "BeftConfig",
    "BitFitConfig",
    "CPTConfig",
    "CPTEmbedding",
    "CartridgeConfig",
    "CartridgeEncoder",
    "CombinedConfig",
    "IA3Config",
    "MultitaskPromptEmbedding",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "PTuningV2Config",
    "PeftConfig",
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
    "TaskType",
]
