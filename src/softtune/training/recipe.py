"""The recipe: everything that a training run needs to know, as YAML, with defaults. Every field is also a flag.

The recipe is kept in the adapter's folder, so that prediction meets the same template and labels as training did.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from softtune.data import Task, Template, Verbalizer
from softtune.errors import CheckpointError, ConfigError
from softtune.methods import PeftConfig, PeftType, TaskType
from softtune.methods.base import CONFIG_NAME

RECIPE_NAME = "recipe.yaml"
CHECKPOINTS = "checkpoints"
"""Folder in the adapter's where an unfinished run keeps its state."""

LEARNING_RATES = {
    PeftType.PREFIX_TUNING: 1e-2,
    PeftType.P_TUNING_V2: 1e-2,
    PeftType.PROMPT_TUNING: 3e-2,
    PeftType.P_TUNING: 1e-3,
    PeftType.BITFIT: 1e-3,
}
"""Where ``learning_rate`` is left out."""


NOT_OPTIONS = {
    "peft_type": "set method instead",
    "task_type": "set task instead",
    "inference_mode": "drop it, a recipe trains",
    "base_model_name_or_path": "set model instead",
    "revision": "drop it, and set model to a folder with that revision",
}
"""Fields of the method's config that are not for ``options``, and what to do instead."""


class Recipe(BaseModel):
    """A training run."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )

    model: str
    """Base model: a folder, a hub name, smollm2-135m or minilm."""
    task: TaskType = TaskType.CAUSAL_LM
    """CAUSAL_LM and SEQ_2_SEQ_LM write the label, SEQ_CLS trains a head."""
    train: str
    """Training data: a CSV, TSV or JSONL file, or a data set on the hub."""
    train_split: str = "train"
    """Split of a hub data set to train on."""
    evaluation: str | None = None
    """Evaluation data; by default rows are held out of the training data."""
    evaluation_split: str = "train"
    """Split of a hub data set to evaluate on."""
    test_size: int | float = 0.2
    """Rows (whole number) or share of them to hold out where there is no evaluation data; 0 for none."""
    examples: Annotated[int, Field(ge=1)] | None = None
    """Train on a random sample of this many rows."""
    shares: Annotated[dict[str, float], Field(min_length=1)] | None = None
    """Share of each label in that sample; by default as in the data."""
    template: str
    """How a record reads: {column} fields, {prompt:N} virtual tokens."""
    label_column: str
    """The column with the label or the text to write."""
    labels: list[str] | dict[str, str] | None = None
    """The labels, or a word for each; leave out to train on free text."""
    max_length: Annotated[int, Field(ge=4)] = 128
    """Tokens of a record; longer fields are cut, template and label never."""
    method: PeftType = PeftType.PREFIX_TUNING
    """The method."""
    options: dict[str, Any] = {}
    """Fields of the method's config, such as num_virtual_tokens."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; by default the method's."""
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    """How the learning rate falls."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.1
    """Steps until the learning rate has reached its peak; below 1 a share of all steps."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training data."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """Rows of a step."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop when the loss on held-out training rows has not fallen for so many checkpoints, and keep the best one; by
    default all epochs run."""
    validation_size: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Training rows (whole number) or share of them to hold out for patience."""
    bf16: bool = False
    """Compute in bfloat16 where autocast does; the adapter stays in float32."""
    gradient_checkpointing: bool = False
    """Keep only the layers' inputs for the backward pass and compute the rest again: less memory, more time."""
    compile: bool = False
    """Compile each layer of a decoder or encoder: some seconds once, for faster steps of a long run."""
    ensemble: Annotated[int, Field(ge=1)] = 1
    """Adapters to train for the task at once, from the seeds seed, seed + 1 and so on; they answer together."""
    trunk_cache: Annotated[float, Field(ge=0)] = 0
    """Megabytes of memory to keep in what the layers below the prefix make of each text, so that later epochs begin
    above them; needs options with layers, such as last:10. 0 for none."""
    trunk_cache_disk: Annotated[float, Field(ge=0)] = 0
    """Megabytes of a temporary file beside the checkpoints for the same, when memory is full."""
    seed: int = 0
    """Seed of the sample, the held-out rows, the start and the order."""
    save_steps: Annotated[int, Field(ge=1)] = 50
    """Steps between checkpoints; an interrupt writes one too."""
    report_to: list[Literal["tensorboard", "wandb"]] = []
    """Where losses, learning rates and speeds go while training: TensorBoard's in the folder logs of the output, W&B's
    where its own settings say."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Tokens to write at most, where there are no labels."""
    output: str
    """The adapter's folder."""

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.task is TaskType.SEQ_CLS and not self.labels:
            raise ValueError("SEQ_CLS needs labels: list them")
        if twice := [label for label, count in Counter(list(self.labels or ())).items() if count > 1]:
            raise ValueError(f"labels has {twice[0]!r} more than once: list every label once")
        if self.shares and self.examples is None:
            raise ValueError("shares needs examples: say how many rows to sample")
        places, tokens = Template(self.template).num_virtual_tokens, self.options.get("num_virtual_tokens")
        if places and tokens not in (None, places):
            raise ValueError(f"the template has places for {places} virtual tokens, num_virtual_tokens is {tokens}")
        if places and self.options.get("placement") == "suffix":
            raise ValueError("the template says where virtual tokens stand: drop placement, or the template's places")
        if fixed := NOT_OPTIONS.keys() & self.options:
            raise ValueError(f"options has {min(fixed)}: {NOT_OPTIONS[min(fixed)]}")
        if self.evaluation is not None and self.test_size and "test_size" in self.model_fields_set:
            raise ValueError("test_size holds rows out where there is no evaluation data: drop one of the two")
        if self.evaluation is None and self.evaluation_split != "train":
            raise ValueError("evaluation_split needs evaluation: name the data set there too")
        if missing := [name for name in self.report_to if find_spec(name) is None]:
            raise ValueError(f"report_to needs the package {missing[0]}: pip install {missing[0]}")
        if self.compile and (self.trunk_cache or self.trunk_cache_disk):
            raise ValueError("compile does not go with the trunk cache, which leaves layers out: drop one of the two")
        if self.ensemble > 1 and "wandb" in self.report_to:
            raise ValueError("wandb takes one run of a process: report an ensemble to tensorboard")
        self.config()
        _ = self.definition
        if places and self.method not in (PeftType.PROMPT_TUNING, PeftType.P_TUNING):
            raise ValueError("only PROMPT_TUNING and P_TUNING have virtual tokens that a template can place")
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Read a YAML file, some of its fields replaced.

        Raises:
            ConfigError: there is no such file, it is no YAML mapping, or a field is unknown, missing or out of range.
        """
        try:
            fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"no recipe at {path}: check the path") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no YAML ({' '.join(str(error).split())}): correct it") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"{path} holds no fields: write lines such as 'model: smollm2-135m'")
        return cls.of({**fields, **(overrides or {})})

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Recipe:
        """A recipe of these fields. Raises ConfigError where one is unknown, missing or out of range."""
        try:
            return cls.model_validate(dict(fields))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            reason = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                reason = f"no such field: use one of {', '.join(cls.model_fields)}"
            raise ConfigError(": ".join(filter(None, ("recipe", name, reason)))) from None

    @classmethod
    def of_adapter(cls, folder: str | os.PathLike[str]) -> Recipe:
        """The recipe that an adapter was trained by.

        Raises:
            CheckpointError: there is no such folder, its run is unfinished, or it has no recipe.
        """
        check_finished(folder)
        if not (Path(folder) / RECIPE_NAME).is_file():
            raise CheckpointError(f"{folder} has no {RECIPE_NAME}: name the folder of an adapter that softtune trained")
        return cls.load(Path(folder) / RECIPE_NAME)

    def save(self, path: Path) -> None:
        """Write all fields as YAML, but for a ``test_size`` that nothing uses."""
        unused = {"test_size"} if self.evaluation is not None and self.test_size else None
        fields = self.model_dump(mode="json", exclude=unused)
        path.write_text(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True), encoding="utf-8")

    @property
    def num_labels(self) -> int | None:
        """Classes of a trained head; None where there is none."""
        return len(self.labels) if self.labels and self.task is TaskType.SEQ_CLS else None

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """The fields that differ, with this recipe's value and the other's."""
        own, others = self.model_dump(mode="json"), other.model_dump(mode="json")
        return {name: (own[name], others[name]) for name in own if own[name] != others[name]}

    @property
    def adapter_names(self) -> list[str]:
        """What the adapters are called: an ensemble's are numbered from 1, and are in folders of these names."""
        return ["default"] if self.ensemble == 1 else [str(i + 1) for i in range(self.ensemble)]

    def checkpoints(self, adapter_name: str = "default") -> Path:
        """The folder where an unfinished run keeps its state, or that of an ensemble's member."""
        folder = Path(self.output) / CHECKPOINTS
        return folder if adapter_name == "default" else folder / adapter_name

    def config(self) -> PeftConfig:
        """The method's config. Raises ConfigError where ``options`` has an unknown key or a value out of range."""
        places = Template(self.template).num_virtual_tokens
        tokens = {"num_virtual_tokens": places} if places else {}
        return PeftConfig.from_dict({"peft_type": self.method, "task_type": self.task, **tokens, **self.options})

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate or LEARNING_RATES[self.method]

    @property
    def definition(self) -> Task:
        """What prediction needs to know of the recipe."""
        return Task(
            kind=self.task,
            template=Template(self.template),
            label_column=self.label_column,
            verbalizer=None if self.labels is None else _verbalizer(self.labels),
            max_length=self.max_length,
            max_new_tokens=self.max_new_tokens,
        )


def holds_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether there is an adapter in a folder, or an ensemble."""
    return any((Path(folder) / name).is_file() for name in (CONFIG_NAME, RECIPE_NAME))


def check_finished(folder: str | os.PathLike[str]) -> None:
    """Raise CheckpointError where there is no such folder, or only an unfinished run in it."""
    if not Path(folder).is_dir():
        raise CheckpointError(f"there is no folder {folder}: check the path")
    if (Path(folder) / CHECKPOINTS).is_dir() and not holds_adapter(folder):
        raise CheckpointError(f"the run in {folder} is unfinished: go on with softtune train --resume, or train anew")


def _verbalizer(labels: list[str] | dict[str, str]) -> Verbalizer:
    return Verbalizer(labels) if isinstance(labels, dict) else Verbalizer.from_labels(labels)
