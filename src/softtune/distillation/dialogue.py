"""A question about a text as token ids: with the text in the context, and without it.

Where the tokenizer has a chat template, the text is a system prompt, or stands before the question in the user's turn;
elsewhere both are plain text. Three parts are told apart:

    context     what comes before the question, up to where it depends on the text alone
    rest        what follows it up to the answer; context and rest are the teacher's input
    request     what a user sends who relies on the cartridge; the student's input, as a server or a task writes it

Behind a system prompt, and in plain text, rest and request are the same tokens unless requests begin with a system
prompt or BOS of their own. A prefix of the whole context's keys and values is then the context itself.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from softtune.data import Example, Template, encode
from softtune.data.chat import ASSISTANT, PLACEHOLDER, Message, render
from softtune.data.conversations import encode_opening, encode_reply
from softtune.data.encoding import IGNORED, special_tokens, token_ids
from softtune.distillation.corpus import SEPARATOR
from softtune.errors import DataError

Role = Literal["user", "system"]
PLAIN = Template("Question: {question}\nAnswer: ")


class Dialogue:
    """Questions, with and without a text, in the form of one model.

    Args:
        tokenizer: the model's.
        role: whose message has the text, system or user; without a chat template, or one that takes no system prompt,
            it makes no difference.
        max_length: tokens of a request with its answer at most.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, role: Role = "user", max_length: int = 1 << 30) -> None:
        self.tokenizer = tokenizer
        self.role = role
        self.max_length = max_length
        self.is_chat = bool(tokenizer.chat_template)

    def context_ids(self, text: str) -> list[int]:
        """Token ids of a text in front of any question."""
        if not self.is_chat:
            return [*self._first_ids, *token_ids(text + SEPARATOR, self.tokenizer)]
        return token_ids(self._context(text), self.tokenizer)

    def rest(self, text: str, question: str) -> Example:
        """What follows the context of ``text``: the question, up to where the answer begins."""
        if not self.is_chat:
            request = self.request(question).input_ids
            return _opening(request[len(self._first_ids) :])
        whole = self._rendered(text, question)
        return _opening(token_ids(whole[len(self._context(text)) :], self.tokenizer))

    def request(self, question: str) -> Example:
        """A question without a text, up to where the answer begins."""
        if self.is_chat:
            return encode_opening(_asked(question), self.tokenizer, max_length=self.max_length)
        return encode(PLAIN, {"question": question}, self.tokenizer, answer="", max_length=self.max_length)

    def answered(self, question: str, answer: str) -> Example:
        """A question without a text, with labels on its answer and the end of that."""
        if self.is_chat:
            turn = {"role": ASSISTANT, "content": answer}
            return encode_reply(
                [*_asked(question), turn],
                self.tokenizer,
                max_length=self.max_length,
                max_new_tokens=self.max_length,
            )
        return encode(
            PLAIN,
            {"question": question},
            self.tokenizer,
            answer=answer,
            max_length=self.max_length,
            add_eos=self.tokenizer.eos_token_id is not None,
        )

    @cached_property
    def _first_ids(self) -> list[int]:
        """The special tokens that the tokenizer puts in front of a text."""
        return special_tokens(self.tokenizer)[0]

    def _context(self, text: str) -> str:
        """The conversation's text up to where it depends on the question."""
        whole = self._rendered(text, PLACEHOLDER)
        if self._is_system:
            try:
                alone = render([{"role": "system", "content": text}], self.tokenizer)
            except DataError:  # some templates write no conversation without a user's turn
                alone = PLACEHOLDER
            if whole.startswith(alone):
                return alone
        return whole.partition(PLACEHOLDER)[0]

    def _rendered(self, text: str, question: str) -> str:
        """The conversation's text up to where the assistant's turn begins."""
        if self._is_system:
            messages = [{"role": "system", "content": text}, *_asked(question)]
        else:
            messages = _asked(f"{text}{SEPARATOR}{question}")
        return render(messages, self.tokenizer, add_generation_prompt=True)

    @cached_property
    def _is_system(self) -> bool:
        """Whether the text is a system prompt, which the chat template writes."""
        if self.role == "user":
            return False
        try:
            return PLACEHOLDER in render([{"role": "system", "content": PLACEHOLDER}, *_asked("a")], self.tokenizer)
        except DataError as error:
            if isinstance(error.__cause__, (TemplateError, TypeError)):
                return False
            raise


def answer_ids(example: Example) -> list[int]:
    """The labelled token ids of an example."""
    return [label for label in example.labels if label != IGNORED]


def _asked(question: str) -> list[Message]:
    return [{"role": "user", "content": question}]


def _opening(ids: list[int]) -> Example:
    return Example(input_ids=ids, labels=[IGNORED] * len(ids))
