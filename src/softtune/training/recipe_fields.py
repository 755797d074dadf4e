"""The fields of a recipe, with their types, defaults and help texts. Every field is also a flag.

Imports nothing that takes long, for the help text of commands.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from softtune.peft_types import PeftType, TaskType, known_task

Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _repository_name(name: str) -> str:
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # takes long to import

    validate_repo_id(name)
    return name


class RecipeFields(BaseModel):
    """The fields of a recipe, each valid by itself."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    model: str
    """Base model: a folder, a hub name, smollm2-135m or minilm."""
    task: Annotated[TaskType, AfterValidator(known_task)] = TaskType.CAUSAL_LM
    """CAUSAL_LM and SEQ_2_SEQ_LM write the label, a choice or a text; SEQ_CLS has a head for labels, TOKEN_CLS one for
    the tags of words, QUESTION_ANS one for parts of a text."""
    train: str | Annotated[list[str], Field(min_length=1)]
    """Training data: a CSV, TSV, JSONL, JSON or CoNLL file, one in an archive (zip://member::file), or a hub data
    set; or a list of them."""
    train_split: str = "train"
    """Split to train on, of a hub data set or a JSON file with splits."""
    evaluation: str | None = None
    """Evaluation data; by default rows are held out of the training data."""
    evaluation_split: str = "train"
    """Split to evaluate on, of a hub data set or a JSON file with splits."""
    evaluation_examples: Annotated[int, Field(ge=1)] | None = None
    """Evaluate on a random sample of this many rows."""
    columns: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of the columns, for files whose rows are cells without a header."""
    test_size: Annotated[int, Field(ge=0, strict=True)] | Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Rows (whole number) or share of them to hold out where there is no evaluation data; 0 for none."""
    examples: Annotated[int, Field(ge=1)] | None = None
    """Train on a random sample of this many rows."""
    shares: Annotated[dict[str, float], Field(min_length=1)] | None = None
    """Share of each label in that sample; by default as in the data."""
    shots: Annotated[int, Field(ge=1)] | None = None
    """Train on a random sample of this many rows of each label."""
    template: str = ""
    """How a record is formatted: {column} for a field, {prompt:N} for N virtual tokens. For TOKEN_CLS the column with
    the words, such as {tokens}; for QUESTION_ANS those with the question and the text, such as {question} {context}."""
    label_column: str = ""
    """The column with the label, the tags, the answers, the right choice, or one or several texts to write."""
    chat: bool = False
    """Put the template's text through the tokenizer's chat template as the user's turn, and the label, choice or text
    as the assistant's."""
    messages: str | Annotated[list[str], Field(min_length=2, max_length=2)] | None = None
    """Instead of a template: the column with a conversation, a list of {role, content}, or the two columns with its
    prompt and its completion. The assistant's turns are trained on, through the tokenizer's chat template."""
    system: str | None = None
    """System prompt for chat, and for messages that have none."""
    labels: list[str] | dict[str, str] | None = None
    """The labels or tags, or a word for each label; leave out to train on free text, choices or parts of a text."""
    choices: str | None = None
    """The column with each record's own choices, a list; one of them is right."""
    calibrate: bool = False
    """Divide each label's probability by its probability for a record without content (Zhao et al. 2021)."""
    stride: Annotated[int, Field(ge=0)] = 64
    """For QUESTION_ANS, tokens of overlap between neighbouring parts of a text that is longer than max_length."""
    unanswerable: bool = False
    """For QUESTION_ANS, whether there are questions without an answer."""
    max_length: Annotated[int, Field(ge=4)] = 128
    """Tokens of a record at most; fields are truncated to fit, template and label never. Conversations lose their
    oldest exchanges."""
    method: PeftType = PeftType.PREFIX_TUNING
    """The method; auto chooses it, its options, its start and its learning rate, by what did best on measured tasks."""
    options: dict[str, Any] = {}
    """Fields of the method's config, such as num_virtual_tokens."""
    start: Literal["method", "examples"] | None = None
    """What the prompt starts from: what the method's options say, or the training rows as examples in the context
    (context tuning, and CPT's demonstrations), as many virtual tokens as these have tokens. By default examples for
    PROMPT_TUNING and P_TUNING of decoders whose options name no start, up to 100 virtual tokens; else method."""
    leave_one_out: bool = True
    """With start: examples, hide the virtual tokens that start from a row while the prefix is trained on that row; CPT
    shows them."""
    example_separator: str | None = None
    """With start: examples, the text behind each example; by default an empty line, and nothing in conversations."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; by default the method's, and for BitFit a higher one where a head is trained."""
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    """How the learning rate falls."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.1
    """Steps until the learning rate has reached its peak; below 1 a share of all steps."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Passes over the training data."""
    max_steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """Steps to train, whatever epochs says."""
    batch_size: Annotated[int, Field(ge=1, le=10**6)] = 4
    """Rows of a forward and backward pass, of all processes together."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=10**6)] = 1
    """Batches of a step, whose gradients are added up: the loss is the mean over the labels of all of them."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "adafactor", "sgd"] | None = None
    """Optimiser, by the Trainer's names; by default transformers' choice, an AdamW. adamw_8bit needs bitsandbytes."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """The optimiser's weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each label's probability that is spread evenly over all classes or tokens."""
    group_by_length: bool = False
    """Put rows of similar length into one batch, against padding."""
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that prepare batches; 0 for this one."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop when metric_for_best_model on held-out training rows has not improved for so many evaluations, and keep the
    best checkpoint; by default all epochs run."""
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations on held-out training rows, of whose checkpoints the best one is kept, with or without
    patience; with patience save_steps by default."""
    metric_for_best_model: str = "loss"
    """What the best checkpoint is best by: loss, or one of the task's metrics, such as accuracy."""
    validation_size: Annotated[int, Field(ge=1, strict=True)] | Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Training rows (whole number) or share of them to hold out for patience and eval_steps."""
    bf16: bool = False
    """Compute in bfloat16 where autocast does; the adapter stays in float32."""
    gradient_checkpointing: bool = False
    """Keep only the layers' inputs for the backward pass and compute the rest again: less memory, more time."""
    compile: bool = False
    """Compile each layer of a decoder or encoder: some seconds once, for faster steps of a long run."""
    ensemble: Annotated[int, Field(ge=1)] = 1
    """Adapters to train for the task at once, from the seeds seed, seed + 1 and so on; their predictions are
    combined."""
    trunk_cache: Annotated[float, Field(ge=0)] = 0
    """Megabytes of memory to cache each text's states below the lowest layer with a prefix, so that later epochs start
    from them; needs options with layers, such as last:10. 0 for none."""
    trunk_cache_disk: Annotated[float, Field(ge=0)] = 0
    """Megabytes of a temporary file beside the checkpoints for the same, when that memory is full."""
    seed: Seed = 0
    """Seed of the sample, the held-out rows, the adapter's initialization and the order of rows."""
    data_seed: Seed | None = None
    """Another seed for the sample and the held-out rows."""
    save_steps: Annotated[int, Field(ge=1)] = 50
    """Steps between checkpoints; an interrupt writes one too."""
    save_total_limit: Annotated[int, Field(ge=1)] = 1
    """Newest checkpoints of an unfinished run to keep; the best one is kept beside them."""
    report_to: list[Literal["tensorboard", "wandb"]] = []
    """Trackers of losses, learning rates and speeds while training: TensorBoard in the folder logs of the output, W&B
    where its own settings say."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Tokens to write at most, where there are no labels."""
    output: str
    """The adapter's folder."""
    push_to_hub: bool = False
    """Upload the finished folder to the Hugging Face hub, with the login of hf auth login or HF_TOKEN."""
    hub_model_id: Annotated[str, AfterValidator(_repository_name)] | None = None
    """The repository to upload to, such as me/adapter; by default one's own of the output's name."""
    hub_private_repo: bool | None = None
    """Whether a new repository is private; by default as its owner has set it on the hub."""

    @property
    def is_validated(self) -> bool:
        """Whether training rows are held out to choose the best checkpoint by."""
        return self.patience is not None or self.eval_steps is not None
