"""Adapters of any kind on one base model, and what they answer. Knows no HTTP.

Coroutines on one side, the working thread on the other. An answer holds on to its adapter's version from its beginning
to its end, however it ends.
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

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from softtune.backbone import Backbone
from softtune.data import ChoiceTask, LabelTask, SpanTask, TagTask, Template, TextTask, has_places_within
from softtune.errors import CheckpointError, ConfigError, RequestError, UnsupportedModelError
from softtune.evaluation.answers import fitted_beside
from softtune.methods import PeftConfig, TaskType
from softtune.serving import baking
from softtune.serving.bases import Bases
from softtune.serving.engine import Engine
from softtune.serving.heads import OUTPUTS, Heads
from softtune.serving.jobs import Writing
from softtune.serving.limits import Limits
from softtune.serving.loop import Lane, Loop, TextLane
from softtune.serving.registry import Facts, Registry, Version
from softtune.serving.sampling import Choice, Sampling, Writer
from softtune.serving.waiting import Ticket
from softtune.training.recipe import RECIPE_NAME, Recipe

Result = TypeVar("Result")

ASKED: dict[type, str] = {
    LabelTask: "labels",
    ChoiceTask: "labels",
    TagTask: "tags",
    SpanTask: "answers",
    TextTask: "texts",
    type(None): "texts",
}
"""What adapters for each kind of task are asked for."""


@dataclass(frozen=True)
class Written:
    """A piece of a text that is being written."""

    choice: Choice
    """The token."""
    text: str
    """What is added for sure; a token's text may come later."""
    reason: str | None
    """Why it was the last one, stop or length; None where more comes."""


class Service:
    """What is served.

    Args:
        model: the base model's name, see ``load_base_model``.
        limits: how much is done at once.
        engine: makes what writes and scores texts, of the base model, the limits and the folder of inference forms.

    Raises:
        ConfigError: there is no such base model, or it does nothing that is served.
    """

    def __init__(
        self,
        model: str,
        limits: Limits | None = None,
        engine: Callable[[Backbone, Limits, Path], TextLane] = lambda backbone, limits, _: Engine(backbone, limits),
    ) -> None:
        self.name = model
        self.bases = Bases(model)
        self.limits = limits or Limits()
        self.loop = Loop([])
        self._folder = Path(tempfile.mkdtemp(prefix="softtune-"))
        self._remove_folder = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self.registry = Registry(self._bake, self._folder, lambda version: self.loop.wake(), model)
        self._heads: dict[tuple[TaskType, int | None], Heads] = {}
        self._baking, self._encoding = Lock(), Lock()
        self._engine = self._made(engine)

    def start(self) -> None:
        """Begin to answer."""
        self.loop.start()

    def close(self, grace: float) -> None:
        """Take no more requests, and wait for the end of those that there are; after some seconds, the rest fail."""
        self.loop.close(grace)
        if not isinstance(self._engine, str):
            self._engine.close()
        self._remove_folder()

    def _made(self, engine: Callable[[Backbone, Limits, Path], TextLane]) -> TextLane | str:
        """The engine, or why there is none."""
        try:
            made = engine(self.bases.model(TaskType.CAUSAL_LM).backbone, self.limits, self._folder)
        except UnsupportedModelError as error:
            return str(error)
        except ConfigError as error:
            if not self.bases.is_there:
                raise
            return str(error)
        self.loop.lanes.append(made)
        return made

    @property
    def engine(self) -> TextLane:
        """Writes and scores texts. Raises UnsupportedModelError where the base model does not, or not several."""
        if isinstance(self._engine, str):
            raise UnsupportedModelError(self._engine)
        return self._engine

    @property
    def is_alive(self) -> bool:
        """Whether requests are worked on."""
        return self.loop.is_alive and (isinstance(self._engine, str) or self._engine.is_alive)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's."""
        return self.bases.tokenizer

    @contextmanager
    def using(self, name: str) -> Iterator[Version]:
        """An adapter, which stays what it is for the length of the block. Raises AdapterError for an unknown name."""
        version = self.registry.lease(name)
        try:
            yield version
        finally:
            self.registry.release(version)

    def encoded(self, encode: Callable[[PreTrainedTokenizerBase], Result]) -> Result:
        """What a function makes of texts: one at a time, since the tokenizer keeps what the last one asked of it."""
        with self._encoding:
            return encode(self.tokenizer)

    def tokenized(self, text: str) -> list[int]:
        """A text's tokens."""
        return self.encoded(lambda tokenizer: list(tokenizer(text, verbose=False)["input_ids"]))

    def prompt(self, version: Version | None, text: str) -> list[int]:
        """The tokens of a text to go on with. A space at its end that is the answer's, by the adapter's template, is
        left to the answer."""
        return self.tokenized(text if version is None else text.removesuffix(version.facts.separator))

    def checked(self, tokens: list[int]) -> list[int]:
        """Tokens that a request brings along. Raises RequestError where the base model has no such token."""
        count = self.engine.backbone.embedding.num_embeddings
        if tokens and max(tokens) >= count:
            raise RequestError(f"{max(tokens)} is no token: they go from 0 to {count - 1}")
        return tokens

    def conversation(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation's tokens. Raises RequestError where the base model has no template for it."""
        if not self.tokenizer.chat_template:
            raise RequestError(f"{self.name} knows no conversations: use /v1/completions")
        try:
            found: Any = self.encoded(
                lambda tokenizer: tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            )
        except TemplateError as error:
            raise RequestError(f"the messages do not fit the model's template ({error}): change their order") from error
        return list(found["input_ids"])

    def room(self, version: Version | None, words: Sequence[int]) -> int:
        """Tokens that can be written behind a text, one at least."""
        virtual = 0 if version is None else version.facts.num_virtual_tokens
        return max(1, self.engine.longest - virtual - len(words))

    def check_writes(self, version: Version | None) -> None:
        """Raise RequestError where an adapter writes no texts, UnsupportedModelError where the base model does not."""
        if version is not None and isinstance(version.facts.lane, Heads):
            asked = ASKED[type(version.facts.task)]
            raise RequestError(f"{version.name} has a head and writes no texts: ask it for {asked}")
        if version is not None and version.facts.has_places_within:
            raise RequestError(f"{version.name} has virtual tokens within its text: ask it for labels, by records")
        _ = self.engine

    async def write(
        self, version: Version | None, words: Sequence[int], asked: Sampling
    ) -> AsyncGenerator[Written, None]:
        """Go on with a text.

        Args:
            version: whose adapter; None for the base model alone.
            words: the text's tokens.
            asked: how to go on.

        Raises:
            TooLongError, FullError, ClosedError: see ``Lane.submit``.
            RequestError: there is no text.
        """
        if not words:
            raise RequestError("the text is empty: write some words")
        self.check_writes(version)
        answers: asyncio.Queue[Any] = asyncio.Queue()
        tell = _from_thread(answers.put_nowait)
        writer = Writer(self.tokenizer, asked.stop)
        job = Writing(words, asked, writer, self._ends(asked.stop), lambda *piece: tell(Written(*piece)))
        with self._submitted(self.engine, version, job, tell):
            while True:
                piece = await answers.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.reason:
                    return

    async def told(self, lane: Any, version: Version, job: Callable[[Callable[[Any], None]], Any]) -> Any:
        """What a job tells at its end."""
        answers: asyncio.Queue[Any] = asyncio.Queue()
        tell = _from_thread(answers.put_nowait)
        with self._submitted(lane, version, job(tell), tell):
            if isinstance(answer := await answers.get(), Exception):
                raise answer
            return answer

    @contextmanager
    def _submitted(
        self, lane: Any, version: Version | None, job: Any, fail: Callable[[Exception], None]
    ) -> Iterator[None]:
        """Have a lane work on a job, which is given up on where the block ends before it."""
        end: Callable[[], None] = (lambda: None) if version is None else self.registry.hold(version)
        ticket: Ticket[Any] = Ticket(version, job, fail, end)
        try:
            lane.submit(ticket)
        except BaseException:
            end()
            raise
        self.loop.wake()
        try:
            yield
        finally:
            ticket.is_cancelled = True
            self.loop.wake()

    def _ends(self, stop: Sequence[str]) -> frozenset[int]:
        """Tokens that end a text: the model's own, and special ones that a request names, which no text shows."""
        ends = self.engine.backbone.model.generation_config.eos_token_id
        named = [self._special[text] for text in stop if text in self._special]
        return frozenset([*([ends] if isinstance(ends, int) else ends or []), *named])

    @cached_property
    def _special(self) -> dict[str, int]:
        """Special tokens by their texts."""
        return {t.content: number for number, t in self.tokenizer.added_tokens_decoder.items() if t.special}

    def _bake(self, folder: Path, own: Path) -> Facts:
        """See ``Registry``."""
        with self._baking:
            config = PeftConfig.from_pretrained(folder)
            recipe = Recipe.found_in(folder)
            kind = config.task_type or TaskType.CAUSAL_LM
            lane = self._lane(kind, recipe)
            adapter = baking.load(lane.backbone, folder)
            virtual = getattr(config, "num_virtual_tokens", 0)
            positions = lane.backbone.max_positions
            task = None if recipe is None else fitted_beside(recipe.definition, positions, virtual)
            template = Template("" if recipe is None else recipe.template)
            within = self.encoded(partial(has_places_within, template))
            if within and isinstance(task, TextTask):
                raise UnsupportedModelError(
                    "its template has virtual tokens within the text, where a request's text has none: train it without"
                )
            lane.keep(adapter, own, ahead=not within)
            return Facts(config, task, lane, within, template.separator)

    def _lane(self, kind: TaskType, recipe: Recipe | None) -> Lane:
        """Where an adapter's requests are worked on."""
        if kind is TaskType.CAUSAL_LM:
            return self.engine
        if kind not in OUTPUTS:
            raise UnsupportedModelError(
                f"adapters for {kind.value} are not served: use a decoder's, or one with a head"
            )
        if recipe is None:
            raise CheckpointError(f"there is no {RECIPE_NAME}, which names the labels: copy the whole folder")
        key = (kind, recipe.num_labels)
        if key not in self._heads:
            backbone = self.bases.model(*key).backbone
            self._heads[key] = Heads(backbone, kind, int(self.tokenizer.pad_token_id), self.limits)
            self.loop.lanes.append(self._heads[key])
        return self._heads[key]


def _from_thread(put: Callable[[Any], None]) -> Callable[[Any], None]:
    """A function that another thread may call, for one that the event loop must."""
    loop = asyncio.get_running_loop()

    def call(item: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed, nobody waits any more
            loop.call_soon_threadsafe(put, item)

    return call
