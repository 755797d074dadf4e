"""Requests to adapters of any kind on one base model. Knows nothing about HTTP.

Coroutines submit requests to the engine thread and await their results. A request keeps its adapter's version from its
beginning to its end, however it ends.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from softtune import checkpoint
from softtune.backbone import Backbone
from softtune.data import Template
from softtune.data.encoding import has_places_within
from softtune.errors import (
    AdapterError,
    AdapterMismatchError,
    CheckpointError,
    ConfigError,
    RequestError,
    SofttuneError,
    TooLongError,
    UnsupportedModelError,
)
from softtune.evaluation.answers import fitted_beside
from softtune.methods import PeftConfig, PrefixTuningConfig
from softtune.peft_types import TaskType
from softtune.pretrained import DEFAULT_OPTIONS, LoadOptions
from softtune.serving import prompt_export
from softtune.serving.bases import Bases
from softtune.serving.engine_config import EngineConfig
from softtune.serving.engine_thread import Engine, EngineThread, TextEngine
from softtune.serving.head_engine import OUTPUTS, HeadEngine
from softtune.serving.registry import AdapterInfo, Registry, Version
from softtune.serving.request_queue import RequestHandle
from softtune.serving.requests import GenerationRequest
from softtune.serving.sampling import IncrementalDetokenizer, SampledToken, SamplingParams
from softtune.serving.threads import fastest_num_threads
from softtune.serving.transformers_engine import TransformersEngine
from softtune.tasks import Task
from softtune.training.recipe import RECIPE_NAME, Recipe

Result = TypeVar("Result")


def asks_for(task: Task | None) -> str:
    """What an adapter answers with, as error messages call it."""
    return "texts" if task is None else task.asks_for


@dataclass(frozen=True)
class TokenDelta:
    """A generated token, with the text that it adds."""

    choice: SampledToken
    """The token."""
    text: str
    """Text that is certain to be output; a token's text may come with a later one."""
    reason: str | None
    """Finish reason of the last token, stop or length; None where more follow."""


class Service:
    """A base model with its registry of adapters and its engines.

    Args:
        model: the base model's name, see ``load_base_model``.
        config: limits of each engine.
        engine: creates the decoder's engine from the base model, the config and the folder of inference forms.
        options: how the base model is loaded.

    Raises:
        ConfigError: there is no such base model, or it cannot be loaded so.
        MissingExtraError: the package of a quantisation is not installed.
    """

    def __init__(
        self,
        model: str,
        config: EngineConfig | None = None,
        engine: Callable[[Backbone, EngineConfig, Path], TextEngine] = lambda backbone, config, _: TransformersEngine(
            backbone, config
        ),
        options: LoadOptions = DEFAULT_OPTIONS,
    ) -> None:
        self.name = model
        self.bases = Bases(model, options)
        self.config = config or EngineConfig()
        self.thread = EngineThread([])
        self._folder = Path(tempfile.mkdtemp(prefix="softtune-"))
        self._remove_folder = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self.registry = Registry(self._export, self._folder, lambda version: self.thread.wake(), model, self._compose)
        self._heads: dict[tuple[TaskType, int | None], HeadEngine] = {}
        self._exporting, self._encoding = Lock(), Lock()
        self._engine = self._made(engine)

    def start(self) -> None:
        """Start the engine thread."""
        self.thread.start()

    def close(self, grace: float) -> None:
        """Refuse new requests, and wait for the others to end; after ``grace`` seconds the remaining ones fail."""
        self.thread.close(grace)
        if not isinstance(self._engine, SofttuneError):
            self._engine.close()
        self._remove_folder()

    def _made(self, engine: Callable[[Backbone, EngineConfig, Path], TextEngine]) -> TextEngine | SofttuneError:
        """The decoder's engine, or the reason why there is none."""
        try:
            made = engine(self.bases.model(TaskType.CAUSAL_LM).backbone, self.config, self._folder)
        except UnsupportedModelError as error:
            return error
        except ConfigError as error:
            if not self.bases.is_there:
                raise
            return error
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads or fastest_num_threads(made.backbone))
        self.thread.add(made)
        return made

    @property
    def engine(self) -> TextEngine:
        """The engine for generation and log-likelihoods.

        Raises:
            UnsupportedModelError: the base model generates no text, or cannot batch several sequences.
        """
        if isinstance(self._engine, SofttuneError):
            raise UnsupportedModelError(self._engine.what, self._engine.remedy) from self._engine
        return self._engine

    @property
    def is_alive(self) -> bool:
        """Whether the thread and the engine can run requests."""
        return self.thread.is_alive and (isinstance(self._engine, SofttuneError) or self._engine.is_alive)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return self.bases.tokenizer

    @contextmanager
    def lease(self, name: str) -> Iterator[Version]:
        """Lease the current version of an adapter for the length of the block.

        Raises:
            AdapterError, SofttuneError: see ``Registry.lease``.
        """
        version = self.registry.lease(name)
        try:
            yield version
        finally:
            self.registry.release(version)

    def with_tokenizer(self, encode: Callable[[PreTrainedTokenizerBase], Result]) -> Result:
        """Call a function with the tokenizer. Calls do not overlap, since a tokenizer keeps its truncation settings."""
        with self._encoding:
            return encode(self.tokenizer)

    def tokenize(self, text: str) -> list[int]:
        """Tokenize a text."""
        return self.with_tokenizer(lambda tokenizer: list(tokenizer(text, verbose=False)["input_ids"]))

    def tokenize_prompt(self, version: Version | None, text: str) -> list[int]:
        """Tokenize a text to continue.

        A space at its end that the adapter's template tokenizes with the answer is left out.
        """
        return self.tokenize(text if version is None else text.removesuffix(version.info.separator))

    def check_token_ids(self, tokens: list[int]) -> list[int]:
        """Return the token ids of a request, if the base model has all of them.

        Raises:
            RequestError: a token id is outside the base model's vocabulary.
        """
        count = self.engine.backbone.embedding.num_embeddings
        if tokens and max(tokens) >= count:
            raise RequestError(f"{max(tokens)} is no token", f"they go from 0 to {count - 1}")
        return tokens

    def tokenize_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Tokenize a conversation with the base model's chat template.

        Raises:
            RequestError: the base model has no chat template, or the messages do not fit it.
        """
        if not self.tokenizer.chat_template:
            raise RequestError(f"{self.name} knows no conversations", "use /v1/completions")
        try:
            encoding: Any = self.with_tokenizer(
                lambda tokenizer: tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            )
        except TemplateError as error:
            raise RequestError(
                f"the messages do not fit the model's template ({error})", "change their order"
            ) from error
        return list(encoding["input_ids"])

    def max_new_tokens(self, version: Version | None, input_ids: Sequence[int]) -> int:
        """Maximum number of tokens that can be generated after a text, at least 1."""
        virtual = 0 if version is None else version.info.num_virtual_tokens
        return max(1, self.engine.max_model_len - virtual - len(input_ids))

    def check_writes(self, version: Version | None) -> None:
        """Check that an adapter generates text.

        Raises:
            RequestError: the adapter has a head, or virtual tokens within its text.
            UnsupportedModelError: the base model generates no text, or cannot batch several sequences.
        """
        if version is not None and isinstance(version.info.engine, HeadEngine):
            asked = asks_for(version.info.task)
            raise RequestError(f"{version.name} has a head and writes no texts", f"ask it for {asked}")
        if version is not None and version.info.has_places_within:
            raise RequestError(f"{version.name} has virtual tokens within its text", "ask it for labels, by records")
        _ = self.engine

    async def generate(
        self, version: Version | None, input_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[TokenDelta, None]:
        """Generate a continuation of a text.

        Args:
            version: the adapter's version; None for the base model alone.
            input_ids: token ids of the text.
            params: how tokens are sampled, and when generation ends.

        Raises:
            TooLongError, FullError, ClosedError: see ``Engine.submit``.
            RequestError: the text is empty, the adapter generates no text, or a logit is NaN.
            UnsupportedModelError: the base model generates no text, or cannot batch several sequences.
        """
        if not input_ids:
            raise RequestError("the text is empty", "write some words")
        self.check_writes(version)
        answers: asyncio.Queue[Any] = asyncio.Queue()
        tell = _from_thread(answers.put_nowait)
        detokenizer = IncrementalDetokenizer(self.tokenizer, params.stop)
        request = GenerationRequest(
            input_ids, params, detokenizer, self._ends(params.stop), lambda *piece: tell(TokenDelta(*piece))
        )
        with self._submitted(self.engine, version, request, tell):
            while True:
                piece = await answers.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.reason:
                    return

    async def result_of(self, engine: Any, version: Version, request: Callable[[Callable[[Any], None]], Any]) -> Any:
        """Submit the request that ``request`` makes of a callback, and await its result."""
        answers: asyncio.Queue[Any] = asyncio.Queue()
        tell = _from_thread(answers.put_nowait)
        with self._submitted(engine, version, request(tell), tell):
            if isinstance(answer := await answers.get(), Exception):
                raise answer
            return answer

    @contextmanager
    def _submitted(
        self, engine: Any, version: Version | None, request: Any, fail: Callable[[Exception], None]
    ) -> Iterator[None]:
        """Submit a request to an engine; it is cancelled where the block ends first."""
        end: Callable[[], None] = (lambda: None) if version is None else self.registry.lease_again(version)
        handle: RequestHandle[Any] = RequestHandle(version, request, fail, end)
        try:
            engine.submit(handle)
        except BaseException:
            end()
            raise
        self.thread.wake()
        try:
            yield
        finally:
            handle.is_cancelled = True
            self.thread.wake()

    def _ends(self, stop: Sequence[str]) -> frozenset[int]:
        """Token ids that end generation: the model's, and stop strings that are special tokens, which no text shows."""
        ends = self.engine.backbone.model.generation_config.eos_token_id
        named = [self._special[text] for text in stop if text in self._special]
        return frozenset([*([ends] if isinstance(ends, int) else ends or []), *named])

    @cached_property
    def _special(self) -> dict[str, int]:
        """Ids of the special tokens, by their text."""
        return {t.content: number for number, t in self.tokenizer.added_tokens_decoder.items() if t.special}

    def _export(self, folder: Path, export_folder: Path) -> AdapterInfo:
        """See ``Registry``."""
        with self._exporting:
            config = PeftConfig.from_pretrained(folder)
            recipe = Recipe.found_in(folder)
            kind = config.task_type or TaskType.CAUSAL_LM
            engine = self._engine_for(kind, recipe)
            adapter = prompt_export.load_adapter(engine.backbone, folder)
            checkpoint.warn_of_chat_template(folder, adapter, self.tokenizer)
            virtual = getattr(config, "num_virtual_tokens", 0)
            positions = engine.backbone.max_positions
            task = None if recipe is None else fitted_beside(recipe.definition, positions, virtual)
            template = Template("" if recipe is None or recipe.uses_chat_template else recipe.template)
            within = self.with_tokenizer(partial(has_places_within, template))
            if within and task is not None and task.endpoint is None:
                raise UnsupportedModelError(
                    "its template has virtual tokens within the text, where a request's text has none",
                    "train it without",
                )
            engine.export_adapter(adapter, export_folder, as_kv=not within)
            return AdapterInfo(config, task, engine, within, template.separator)

    def _compose(self, parts: Sequence[Version], folder: Path) -> AdapterInfo:
        """See ``Registry``: the composed version is a prefix, for its parts' task where they have the same.

        Raises:
            RequestError: a part has a head, virtual tokens within its text, or more than a prefix in front of it.
            AdapterMismatchError: the prefixes are for different layers or positions.
            TooLongError: together they leave no room for a text.
        """
        first, *others = [part.info for part in parts]
        for part in parts:
            self.check_writes(part)
        total = sum(part.info.num_virtual_tokens for part in parts)
        if total >= self.engine.max_model_len:
            raise TooLongError(
                f"{total} virtual tokens leave no place for a text among {self.engine.max_model_len} tokens",
                "name fewer adapters",
            )
        try:
            prompt_export.compose_prompts([part.folder for part in parts], self.engine.backbone, folder)
        except AdapterMismatchError:
            raise
        except AdapterError as error:
            raise RequestError(error.what, error.remedy) from error
        config = PrefixTuningConfig(num_virtual_tokens=total, task_type=TaskType.CAUSAL_LM)
        are_alike = all((other.task, other.separator) == (first.task, first.separator) for other in others)
        return AdapterInfo(
            config, first.task if are_alike else None, self.engine, separator=first.separator if are_alike else ""
        )

    def _engine_for(self, kind: TaskType, recipe: Recipe | None) -> Engine:
        """The engine that runs an adapter's requests; a head's is created for its first adapter."""
        if kind is TaskType.CAUSAL_LM:
            return self.engine
        if kind not in OUTPUTS:
            raise UnsupportedModelError(
                f"adapters for {kind.value} are not served", "use a decoder's, or one with a head"
            )
        if recipe is None:
            raise CheckpointError(f"there is no {RECIPE_NAME}, which names the labels", "copy the whole folder")
        key = (kind, recipe.num_labels)
        if key not in self._heads:
            backbone = self.bases.model(*key).backbone
            self._heads[key] = HeadEngine(backbone, kind, int(self.tokenizer.pad_token_id), self.config)
            self.thread.add(self._heads[key])
        return self._heads[key]


def _from_thread(put: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap a function that must run in the event loop, so that another thread may call it."""
    loop = asyncio.get_running_loop()

    def call(item: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed, so nobody awaits the result
            loop.call_soon_threadsafe(put, item)

    return call
