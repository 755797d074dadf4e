"""MPT: Wang et al. 2023, "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", arXiv 2303.02861.

Several tasks share the virtual tokens of prompt tuning, and each scales them by a matrix of low rank of its own. Rows
have their tasks by ``task_ids``: those of different tasks are rows of different adapters, which share parameters.
Letters: B rows, P virtual tokens, D embedding size, N tasks, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from softtune.backbone import Backbone
from softtune.errors import AdapterError, CheckpointError, ConfigError
from softtune.methods import initialization as init
from softtune.methods.base import PositiveInt, PromptLearningConfig
from softtune.methods.prompt import Prompt
from softtune.methods.prompt_tuning import settle_input
from softtune.peft_types import PeftType

COLS_KEY, ROWS_KEY = "prefix_task_cols", "prefix_task_rows"
"""PEFT's names of the two factors of the tasks' matrices."""
STD = 0.02
"""Standard deviation of their initial values, as in PEFT."""


class MultitaskPromptTuningInit(str, Enum):
    """How the shared virtual tokens and the tasks' factors are initialized."""

    TEXT = "TEXT"
    """The token embeddings of ``prompt_tuning_init_text``; random factors."""
    RANDOM = "RANDOM"
    """Drawn from N(0, 1), as in PEFT; random factors."""
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    """Those of a trained adapter, and the mean of its tasks' factors."""
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    """Those of a trained adapter, and the factors of its task ``prompt_tuning_init_task``."""
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"
    """Those of a trained adapter; random factors."""


_OF_ONE_TASK = (MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS, MultitaskPromptTuningInit.EXACT_SOURCE_TASK)
_NEEDS = {
    MultitaskPromptTuningInit.TEXT: "prompt_tuning_init_text",
    **dict.fromkeys(
        (*_OF_ONE_TASK, MultitaskPromptTuningInit.ONLY_SOURCE_SHARED), "prompt_tuning_init_state_dict_path"
    ),
}
_UNUSED = {"prompt_tuning_init_text": None, "prompt_tuning_init_state_dict_path": None}


@dataclass(kw_only=True, eq=False)
class MultitaskPromptTuningConfig(PromptLearningConfig):
    """Config of multitask prompt tuning.

    Raises:
        ConfigError: a value is out of range, the chosen initialization lacks its text or source, or it starts one task
            and there are several.
    """

    peft_type: PeftType = PeftType.MULTITASK_PROMPT_TUNING
    learning_rate: ClassVar[float] = 3e-2
    is_for_any_rows: ClassVar[bool] = False
    prompt_tuning_init: MultitaskPromptTuningInit = MultitaskPromptTuningInit.RANDOM
    """How the virtual tokens and the factors are initialized."""
    prompt_tuning_init_text: str | None = None
    """The text for TEXT; its tokens are cut or repeated to ``num_virtual_tokens``."""
    tokenizer_name_or_path: str | None = None
    """Tokenizer for the text, by default the base model's."""
    tokenizer_kwargs: dict[str, Any] | None = None
    """Arguments for ``AutoTokenizer.from_pretrained``."""
    prompt_tuning_init_state_dict_path: str | None = None
    """The trained adapter to start from: its safetensors file, folder or hub name."""
    prompt_tuning_init_task: Annotated[int, Field(ge=0)] = 0
    """The source's task for EXACT_SOURCE_TASK."""
    num_ranks: PositiveInt = 1
    """R, the rank of a task's matrix."""
    num_tasks: PositiveInt = 1
    """N, the number of tasks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        start, needed = self.prompt_tuning_init, _NEEDS.get(self.prompt_tuning_init)
        if needed and not getattr(self, needed):
            raise ConfigError(f"prompt_tuning_init = {start.value} needs {needed}", "set it")
        if self.inference_mode:
            return
        if start in _OF_ONE_TASK and self.num_tasks > 1:
            raise ConfigError(
                f"prompt_tuning_init = {start.value} starts one task, and num_tasks is {self.num_tasks}",
                "set num_tasks=1, or start from ONLY_SOURCE_SHARED",
            )
        if self.tokenizer_kwargs and start is not MultitaskPromptTuningInit.TEXT:
            raise ConfigError(f"prompt_tuning_init = {start.value} has no use for tokenizer_kwargs", "drop one of them")
        unused: dict[str, Any] = {name: default for name, default in _UNUSED.items() if name != needed}
        if start is not MultitaskPromptTuningInit.EXACT_SOURCE_TASK:
            unused["prompt_tuning_init_task"] = 0
        self._leave_out(f"left out: prompt_tuning_init = {start.value} has no use for it", **unused)

    @property
    def num_prompt_tasks(self) -> int:
        return self.num_tasks

    def build(self, backbone: Backbone) -> MultitaskPromptEmbedding:
        """See ``PeftConfig.build``."""
        settle_input(self, backbone)
        return MultitaskPromptEmbedding(self)

    def initialize(self, module: MultitaskPromptEmbedding, backbone: Backbone) -> None:
        """See ``PeftConfig.initialize``.

        Raises:
            CheckpointError: the source is missing, damaged, pickled or of other sizes.
            AdapterMismatchError: the source was trained on another base model.
            ConfigError: the text has no tokens or no tokenizer, or the source has no such task.
        """
        if self.prompt_tuning_init is MultitaskPromptTuningInit.TEXT:
            name = self.tokenizer_name_or_path or backbone.model.name_or_path
            tokenizer = init.load_tokenizer(name, self.tokenizer_kwargs)
            (ids,) = init.text_ids(self.prompt_tuning_init_text or "", tokenizer)
            module.embedding.weight.data.copy_(init.word_vectors(backbone, init.fill(ids, self.num_virtual_tokens)))
        elif source := self.prompt_tuning_init_state_dict_path:
            own = module.inference_state()
            for name, tensor in self._from_source(source, backbone).items():
                if tensor.shape != own[name].shape:
                    raise CheckpointError(
                        f"{source} has {name} {list(tensor.shape)}, the config asks for {list(own[name].shape)}",
                        "change num_virtual_tokens, num_ranks or the source",
                    )
                own[name].copy_(tensor)

    def _from_source(self, source: str, backbone: Backbone) -> dict[str, Tensor]:
        """The tensors of the source that this adapter starts from, the factors with one task [1, ...]."""
        saved = init.tensors_in(source)
        names = (init.PROMPT_KEY, COLS_KEY, ROWS_KEY)
        if init.OWN_KEY in saved:
            saved[init.PROMPT_KEY] = saved.pop(init.OWN_KEY)
        if missing := [name for name in names if name not in saved]:
            raise CheckpointError(f"{source} has no {missing[0]}", "name an adapter of multitask prompt tuning")
        is_pefts = init.notes_of_base(source, backbone) is None and backbone.is_encoder_decoder
        if is_pefts and len(saved[init.PROMPT_KEY]) == 2 * self.num_virtual_tokens:
            saved = self._of_encoder({**saved, init.PROMPT_KEY: saved[init.PROMPT_KEY][: self.num_virtual_tokens]})
        if self.prompt_tuning_init is MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
            return {init.PROMPT_KEY: saved[init.PROMPT_KEY]}
        tasks, task = len(saved[COLS_KEY]), self.prompt_tuning_init_task
        if task >= tasks:
            raise ConfigError(f"prompt_tuning_init_task is {task}, the source has {tasks} tasks", "count them from 0")
        is_mean = self.prompt_tuning_init is MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS
        factors = {name: saved[name] for name in (COLS_KEY, ROWS_KEY)}
        picked = {name: x.mean(0, keepdim=True) if is_mean else x[task : task + 1] for name, x in factors.items()}
        return {init.PROMPT_KEY: saved[init.PROMPT_KEY], **picked}

    def is_readable_by_peft(self, backbone: Backbone) -> bool:
        return backbone.has_plain_words

    def others_from_peft(self, others: dict[str, Tensor]) -> dict[str, Tensor]:
        """See ``PeftConfig.others_from_peft``: of an encoder-decoder's 2·P rows, those of the encoder."""
        is_double = self.num_transformer_submodules == 2 and COLS_KEY in others
        return self._of_encoder(others) if is_double else others

    def _of_encoder(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with the factors [N, P, R] of an encoder's virtual tokens alone."""
        return {**tensors, COLS_KEY: tensors[COLS_KEY][:, : self.num_virtual_tokens]}

    @classmethod
    def implied_by_peft(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """See ``PeftConfig.implied_by_peft``: PEFT reads text and source for their own starts only."""
        needed = _NEEDS.get(values.get("prompt_tuning_init"))  # type: ignore[arg-type]
        return {name: default for name, default in _UNUSED.items() if name != needed}


class MultitaskPromptEmbedding(nn.Module):
    """The shared virtual tokens, and the factors of each task's matrix.

    Args:
        config: ``num_virtual_tokens``, ``token_dim``, ``num_tasks`` and ``num_ranks``.
        word_embeddings: unused, for PEFT's signature; ``MultitaskPromptTuningConfig.initialize`` sets initial values.
    """

    def __init__(self, config: MultitaskPromptTuningConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        assert config.token_dim
        size, dim, tasks, ranks = config.num_virtual_tokens, config.token_dim, config.num_tasks, config.num_ranks
        self.embedding = nn.Embedding(size, dim)
        self.prefix_task_cols = nn.Parameter(STD * torch.randn(tasks, size, ranks))
        self.prefix_task_rows = nn.Parameter(STD * torch.randn(tasks, ranks, dim))

    def forward(self, indices: Tensor, task_ids: Tensor) -> Tensor:
        """Vectors [B, P, D] of all virtual tokens, by ``indices`` [B, P] or [P], for the tasks [B]."""
        vectors: Tensor = self.embedding(indices)
        return vectors * (self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids])

    def prompt(self, task: int | None = None) -> Prompt:
        """The contribution to rows of a task; the only one by default.

        Raises:
            AdapterError: there are several, and none is named.
        """
        if task is None and len(self.prefix_task_cols) > 1:
            raise AdapterError(
                f"the adapter has {len(self.prefix_task_cols)} tasks, and none is named",
                "make one an adapter of its own by softtune.add_task_adapter",
            )
        number = task or 0
        vectors = self.embedding.weight * (self.prefix_task_cols[number] @ self.prefix_task_rows[number])
        return Prompt(num_virtual_tokens=len(vectors), vectors=vectors)

    def inference_state(self) -> dict[str, Tensor]:
        factors = {COLS_KEY: self.prefix_task_cols.detach(), ROWS_KEY: self.prefix_task_rows.detach()}
        return {init.PROMPT_KEY: self.embedding.weight.detach(), **factors}
