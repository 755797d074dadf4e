"""Schemas of requests and errors: OpenAI's fields, and those of the endpoints for labels, tags and answers.

Values that would have no effect are rejected, except for ``user`` and ``name``. The docstrings of request and error
models and of their fields are the descriptions in the OpenAPI schema.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

from softtune.serving.sampling import SamplingParams

Id = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Record = StrictStr | dict[str, Any]
"""A record as a dict of its columns, or the text of the only column."""

MOST = 32
"""Maximum number of texts or records in one request."""


class WithoutNulls(BaseModel):
    """A model that drops null fields, as OpenAI's API does: clients send back what they received."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class Request(WithoutNulls):
    """The fields of all requests."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: StrictStr
    """The adapter's name, or the base model's."""
    user: StrictStr | None = None
    """Taken, and of no use here."""

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, given: Any) -> Any:
        """Reject text that cannot be encoded, and JSON that cannot be parsed.

        Raises:
            ValueError: there is half of a surrogate pair, or lists and objects are nested too deeply.
        """
        if not isinstance(given, dict):
            return given
        try:
            json.dumps(given, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair is no character") from None
        except RecursionError:
            raise ValueError("lists and objects stand within each other too deep: send them flatter") from None
        return given


class StreamOptions(WithoutNulls):
    """How a streamed answer ends."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    include_usage: StrictBool = False
    """End with the counts of tokens."""
    include_obfuscation: Literal[False] = False
    """Not served."""


class Sampled(Request):
    """The fields of all requests that generate text."""

    temperature: Annotated[Number, Field(ge=0, le=2)] = 1.0
    """0 takes the likeliest token."""
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that have so much of the probability together."""
    n: Annotated[StrictInt, Field(ge=1, le=8)] = 1
    """Answers to each text."""
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    """The same seed draws the same tokens."""
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    """Texts that end the answer."""
    stream: StrictBool = False
    """Send tokens as they come."""
    stream_options: StreamOptions | None = None
    """How a streamed answer ends."""
    frequency_penalty: Literal[0] = 0
    """Not served."""
    presence_penalty: Literal[0] = 0
    """Not served."""
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    """Not served."""
    store: Literal[False] = False
    """Not served."""

    def sampling(self, number: int, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """The sampling parameters of the generation of this number, which is added to the seed."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=None if self.seed is None else (self.seed + number) % 2**63,
            stop=tuple(stop),
            logprobs=logprobs,
        )


class CompletionRequest(Sampled):
    """A text, or several, to go on with."""

    prompt: StrictStr | Annotated[list[StrictStr] | list[Id] | list[list[Id]], Field(min_length=1, max_length=10**6)]
    """A text or its tokens, or a list of either."""
    max_tokens: Annotated[StrictInt, Field(ge=1)] = 16
    """Tokens to write at most."""
    logprobs: Annotated[StrictInt, Field(ge=0, le=5)] | None = None
    """How many of the likeliest tokens to tell beside each."""
    echo: Literal[False] = False
    """Not served."""
    best_of: Literal[1] | None = None
    """Not served."""
    suffix: Literal[""] = ""
    """Not served."""


class Part(WithoutNulls):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: StrictStr


class Message(WithoutNulls):
    """One of a conversation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | Annotated[list[Part], Field(min_length=1)]
    name: StrictStr | None = None
    """Taken, and of no use here."""
    annotations: Annotated[list[Any], Field(max_length=0)] = []
    """Not served, nor are ``tool_calls``; answers of other servers have them, and are sent back."""
    tool_calls: Annotated[list[Any], Field(max_length=0)] = []

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampled):
    """A conversation to go on with."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    """Tokens to write at most; by default as many as the model has positions for."""
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    """The same by its newer name."""
    logprobs: StrictBool = False
    """Tell each token's log-probability."""
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    """Texts alone are served."""
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    """How many of the likeliest tokens to tell beside each; needs logprobs."""


class RecordsRequest(Request):
    """Records to label, to tag or to read."""

    input: Record | Annotated[list[Record], Field(min_length=1, max_length=MOST)]
    """A record by its columns, or the text of the only column; or a list of records."""

    @property
    def records(self) -> list[Any]:
        return self.input if isinstance(self.input, list) else [self.input]


class LoadRequest(BaseModel):
    """An adapter to load."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: StrictStr
    """Its name in the folder of adapters."""


class Problem(BaseModel):
    """What is wrong, and what to do."""

    message: str
    type: str
    param: None = None
    code: str | None


class Failure(BaseModel):
    """An error as OpenAI's clients read it."""

    error: Problem
