"""The kinds of tasks and methods. Imports nothing that takes long. Internal."""

from __future__ import annotations

from enum import Enum

from softtune.errors import ConfigError


class TaskType(str, Enum):
    """The task of a model, by PEFT's names."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

    @property
    def has_head(self) -> bool:
        """Whether the task's model class adds a head, which is trained with the adapter."""
        return self in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)


TRAINED_TASKS = (
    TaskType.CAUSAL_LM,
    TaskType.SEQ_2_SEQ_LM,
    TaskType.SEQ_CLS,
    TaskType.TOKEN_CLS,
    TaskType.QUESTION_ANS,
)
"""The tasks that base models are loaded for."""


def known_task(task: TaskType | str) -> TaskType:
    """Return the task with this name or value.

    Raises:
        ConfigError: no base model is loaded for it.
    """
    if task in TRAINED_TASKS:
        return TaskType(task)
    names = ", ".join(known.value for known in TRAINED_TASKS)
    raise ConfigError(f"no base model is loaded for task {getattr(task, 'value', task)}", f"use one of {names}")


class PeftType(str, Enum):
    """The methods, by PEFT's names where PEFT has them."""

    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    P_TUNING_V2 = "P_TUNING_V2"
    BITFIT = "BITFIT"
    CARTRIDGE = "CARTRIDGE"
    CPT = "CPT"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    PREFIX_MEMORY = "PREFIX_MEMORY"
    BEFT = "BEFT"
    IA3 = "IA3"
    COMBINED = "COMBINED"

    @classmethod
    def _missing_(cls, value: object) -> PeftType | None:
        """Accept the command line's spelling of a method, such as prefix-tuning."""
        name = str(value).upper().replace("-", "_")
        return next((member for member in cls if member.value == name), None)
