"""How a text's next token is chosen, and when the text is at its end. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase

COLDEST = 1e-5
"""A temperature below takes the likeliest token."""
FEW = 256
"""Tokens among which the likeliest are looked for first."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a request asks of the tokens that are written for it."""

    max_tokens: int = 16
    """Tokens to write at most."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have so much of the probability together."""
    seed: int | None = None
    """The same seed draws the same tokens; by default others every time."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, and are not part of it."""
    logprobs: int | None = None
    """How many of the likeliest tokens to tell the log-probabilities of, beside the chosen one's; None for neither."""


@dataclass(frozen=True)
class Choice:
    """One token that was written."""

    token: int
    logprob: float | None = None
    """Of the model alone, before temperature and top-p."""
    likeliest: dict[int, float] = field(default_factory=dict)
    """Log-probabilities of the likeliest tokens."""


class Sampler:
    """Chooses one request's tokens, by random numbers that no other request draws from."""

    def __init__(self, asked: Sampling) -> None:
        self.asked = asked
        self._random = torch.Generator()
        if asked.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(asked.seed)

    def choose(self, logits: Tensor) -> Choice:
        """The next token by its logits [V]."""
        greedy = self.asked.temperature < COLDEST
        token = int(logits.argmax()) if greedy else self._drawn((logits.float() / self.asked.temperature).softmax(-1))
        if self.asked.logprobs is None:
            return Choice(token)
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(self.asked.logprobs)
        likeliest = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return Choice(token, float(logprobs[token]), likeliest)

    def _drawn(self, probabilities: Tensor) -> int:
        """A token by its probability [V], one of the likeliest that have ``top_p`` together (Holtzman et al. 2020)."""
        if self.asked.top_p == 1:
            return self._place(probabilities)
        for count in (min(FEW, len(probabilities)), len(probabilities)):  # to sort all words takes long
            likeliest = probabilities.topk(count)
            before = likeliest.values.cumsum(0) - likeliest.values
            if float(before[-1]) >= self.asked.top_p:
                break
        weights = likeliest.values.masked_fill(before >= self.asked.top_p, 0.0)
        return int(likeliest.indices[self._place(weights)])

    def _place(self, weights: Tensor) -> int:
        """A place, as likely as its share of the weights [V]; torch.multinomial takes a random number for each of
        them."""
        sums = weights.cpu().double().cumsum(0)
        drawn = torch.rand((), dtype=sums.dtype, generator=self._random) * sums[-1]
        return int(torch.searchsorted(sums, drawn, right=True))


class Writer:
    """Turns tokens into text as they come, and finds the end.

    Args:
        tokenizer: the model's.
        stop: texts that end the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer: Any = tokenizer.backend_tokenizer
        self._tokens: list[int] = []
        self._told = ""
        """All text so far."""
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._held = ""
        """Text that may be the beginning of a stop."""

    def write(self, token: int) -> tuple[str, bool]:
        """The text that a token adds for sure, and whether the answer ends there."""
        self._tokens.append(token)
        new = self._stream.step(self._tokenizer, token) or ""
        self._told += new
        self._held += new
        places = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if places:
            return self._held[: min(places)[0]], True
        kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return text, False

    def rest(self) -> str:
        """What is held back, where the answer ends without a stop: the bytes of half a character too."""
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return self._held + (whole[len(self._told) :] if whole.startswith(self._told) else "")


def _overlap(text: str, stop: str) -> int:
    """Characters at the text's end that a stop begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
