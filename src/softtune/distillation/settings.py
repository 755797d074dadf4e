"""What is distilled, by which model and how long. Knows nothing about how models are loaded, nor about files."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from softtune.errors import ConfigError
from softtune.load_options import OF_THE_MACHINE, LoadOptions
from softtune.methods import CartridgeConfig

HOLDS_OUT = "holds_out"
"""Whether conversations are held out of training, for lack of questions with known answers."""
Count = Annotated[int, Field(ge=1)]


class Distillation(BaseModel):
    """The settings of a distillation.

    Raises:
        ConfigError: a field is unknown or out of range, or neither or both of ``corpus`` and ``text`` are given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str
    """Base model: a folder, a hub name or smollm2-135m."""
    output: str
    """Folder for the cartridge; what an interrupted distillation has done is kept there."""
    corpus: str | None = None
    """The text: a file (.txt, .md, or records as in a recipe), or a folder of such files."""
    text: str | None = None
    """The text itself instead, such as a system prompt to be distilled (self-distillation, arXiv 2412.14964)."""
    role: Literal["user", "system"] | None = None
    """Whose message has the text in the teacher's chat template: before the question in the user's turn, or a system
    prompt. By default user for a corpus, system for a text."""
    tokens: Count = 512
    """P, the virtual tokens of the cartridge."""
    teacher: str | None = None
    """Another model that asks, answers and is imitated, with the same vocabulary; by default the base model itself."""
    questions: str | None = None
    """Records with a ``question`` and its known ``answer``, by which the report measures quality."""
    seed_prompts: str | None = None
    """A text file with one instruction a line, by which the model writes questions, such as "Ask about a number. => How
    many" where they are to begin so; by default eight general ones."""
    num_questions: Count = 128
    """Questions that the model asks itself."""
    steps: Count = 200
    """Updates of the cartridge."""
    batch_size: Count = 4
    """Questions of one update."""
    learning_rate: Annotated[float, Field(gt=0)] = CartridgeConfig.learning_rate
    """Highest learning rate, which falls to 0 linearly after a warm-up of a tenth of the steps."""
    top_k: Count = 20
    """Log-probabilities of the teacher that are kept for each token of an answer."""
    chunk_tokens: Count = 1024
    """Tokens of the text that the teacher has in its context at most; fewer where the model has fewer positions."""
    max_answer_tokens: Count = 96
    """Tokens of an answer at most."""
    cache_mb: Annotated[float, Field(gt=0)] = 1024
    """Megabytes on the disk for the teacher's log-probabilities at most."""
    save_steps: Count = 50
    """Updates between two checkpoints."""
    seed: int = 0
    """Seed of the questions and of the order of training."""
    load: LoadOptions = LoadOptions()
    """How the models are loaded."""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{name}: {first['msg']}", "correct this field of the distillation") from None
        if (self.corpus is None) == (self.text is None):
            raise ConfigError("a distillation takes a corpus or a text", "give one of the two")

    @property
    def text_role(self) -> Literal["user", "system"]:
        """``role``, or its default."""
        return self.role or ("user" if self.text is None else "system")

    @property
    def decisive(self) -> dict[str, Any]:
        """The fields that a distillation must keep while it is interrupted, as JSON; the text has its own hash."""
        free = {"output", "corpus", "text", "role", "questions", "seed_prompts", "cache_mb", "save_steps", "load"}
        loading = self.load.model_dump(mode="json", exclude={*OF_THE_MACHINE, "trust_remote_code"})
        kept = {"role": self.text_role, HOLDS_OUT: self.questions is None}
        return {**self.model_dump(mode="json", exclude=free), **kept, **loading}
