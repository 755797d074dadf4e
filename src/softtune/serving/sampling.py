"""How the next token is sampled, and when generation ends. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase

COLDEST = 1e-5
"""Temperatures below decode greedily."""
FEW = 256
"""Number of most likely tokens that top-p tries before it sorts the whole vocabulary."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request's tokens are sampled, and when generation ends."""

    max_tokens: int = 16
    """Maximum number of tokens to generate."""
    temperature: float = 0.0
    """0 decodes greedily."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this much of the probability."""
    seed: int | None = None
    """The same seed samples the same tokens; None, the default, others every time."""
    stop: tuple[str, ...] = ()
    """Strings that end generation, and are not part of the output."""
    logprobs: int | None = None
    """Number of most likely tokens to return log-probabilities of, beside the sampled one's; None for neither."""


@dataclass(frozen=True)
class SampledToken:
    """One generated token."""

    token: int
    logprob: float | None = None
    """Log-probability under the model, before temperature and top-p."""
    likeliest: dict[int, float] = field(default_factory=dict)
    """Log-probabilities of the most likely tokens, by token id."""


class Sampler:
    """Samples one request's tokens, with a random generator of its own."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._random = torch.Generator()
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(params.seed)

    def sample(self, logits: Tensor) -> SampledToken:
        """Sample the next token from its logits [V]."""
        greedy = self.params.temperature < COLDEST
        token = int(logits.argmax()) if greedy else self._drawn((logits.float() / self.params.temperature).softmax(-1))
        if self.params.logprobs is None:
            return SampledToken(token)
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(self.params.logprobs)
        likeliest = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return SampledToken(token, float(logprobs[token]), likeliest)

    def _drawn(self, probabilities: Tensor) -> int:
        """Sample from probabilities [V], among the most likely that have ``top_p`` together (Holtzman et al. 2020)."""
        if self.params.top_p == 1:
            return self._place(probabilities)
        for count in (min(FEW, len(probabilities)), len(probabilities)):  # sorting the whole vocabulary is slow
            likeliest = probabilities.topk(count)
            before = likeliest.values.cumsum(0) - likeliest.values
            if float(before[-1]) >= self.params.top_p:
                break
        is_left_out = before >= self.params.top_p
        is_left_out[0] = False  # the least top_p rounds to 0 in float32
        weights = likeliest.values.masked_fill(is_left_out, 0.0)
        return int(likeliest.indices[self._place(weights)])

    def _place(self, weights: Tensor) -> int:
        """Sample an index in proportion to the weights [V]; torch.multinomial takes a random number for each weight."""
        sums = weights.cpu().double().cumsum(0)
        drawn = torch.rand((), dtype=sums.dtype, generator=self._random) * sums[-1]
        return int(torch.searchsorted(sums, drawn, right=True))


class IncrementalDetokenizer:
    """Turns tokens into text as they are generated, and finds stop strings.

    Args:
        tokenizer: the model's tokenizer.
        stop: strings that end generation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer: Any = tokenizer.backend_tokenizer
        self._tokens: list[int] = []
        self._decoded = ""
        """All text so far."""
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._buffer = ""
        """Text held back, since it may be the beginning of a stop string."""

    def append(self, token: int) -> tuple[str, bool]:
        """Add a token. Returns the text that is certain to be output, and whether a stop string ends it."""
        self._tokens.append(token)
        new = self._stream.step(self._tokenizer, token) or ""
        self._decoded += new
        self._buffer += new
        places = [(at, stop) for stop in self._stop if (at := self._buffer.find(stop)) >= 0]
        if places:
            return self._buffer[: min(places)[0]], True
        overlap = max((_overlap(self._buffer, stop) for stop in self._stop), default=0)
        text, self._buffer = self._buffer[: len(self._buffer) - overlap], self._buffer[len(self._buffer) - overlap :]
        return text, False

    def flush(self) -> str:
        """The text held back where generation ends without a stop string, with the bytes of a partial character."""
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return self._buffer + (whole[len(self._decoded) :] if whole.startswith(self._decoded) else "")


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of ``text`` that are the beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
