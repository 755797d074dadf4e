"""Conversations: labels are on the assistant's turns, however these are told, and the oldest exchanges are cut."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import PreTrainedTokenizerFast

from softtune.data.chat import Chat, Message, messages_in, with_system
from softtune.data.conversations import encode_conversation, encode_opening, encode_reply
from softtune.data.encoding import IGNORED, Example, encode
from softtune.data.templates import Template
from softtune.errors import DataError
from tests.data.test_templates import byte_level
from tests.tiny import CHATML, MARKED, chat_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
PAIRS = [
    "cohere",
    "gemma",
    "gemma3",
    "lfm2",
    "llama3",
    "phi3",
    "phi3_5",
    "qwen2_5",
    "qwen2_5_vl",
    "qwen3_instruct_2507",
]
"""Templates of models, of which TRL has one with marks too."""
SPECIAL = re.compile(r"<\|[^|<>]+\|>|<end_of_turn>|<start_of_turn>|<end_of_utterance>|\[/?INST\]")


def turns(*texts: str, system: str | None = None) -> list[Message]:
    """A conversation of the user and the assistant in turn."""
    roles = ["user", "assistant"] * len(texts)
    return with_system([{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)], system)


def shown(example: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """The text, and what of it is trained on, with a bar behind each run."""
    marks = ["" if label == IGNORED else tokenizer.decode(label) for label in example.labels]
    runs = re.sub(r"\0+", "|", "".join(mark or "\0" for mark in marks)).strip("|")
    return tokenizer.decode(example.input_ids), runs


LONG = turns("red", "warm", "blue", "cold", "the sky", "is good", system="text")


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_assistants_turns_are_trained_on_with_their_ends(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    example = encode_conversation(LONG, tokenizer, max_length=99)
    text, trained = shown(example, tokenizer)
    assert text == (
        "<s>system text</s>\n<s>user red</s>\n<s>assistant warm</s>\n<s>user blue</s>\n<s>assistant cold</s>\n"
        "<s>user the sky</s>\n<s>assistant is good</s>"
    )
    assert trained == "warm</s>|cold</s>|is good</s>"
    assert not example.truncated
    last = encode_conversation(LONG, tokenizer, max_length=99, turns=1)
    assert last.input_ids == example.input_ids
    assert shown(last, tokenizer)[1] == "is good</s>"


def labelled_by(file: str) -> str:
    """What is trained on of a conversation of two exchanges, by one of TRL's templates."""
    tokenizer = byte_level()
    tokenizer.chat_template = (TEMPLATES / file).read_text(encoding="utf-8")
    tokenizer.add_special_tokens({"extra_special_tokens": sorted({*SPECIAL.findall(tokenizer.chat_template)})})
    messages = turns("my order never came", "a quick help", "thanks", "it's great!")
    labels = encode_conversation(messages, tokenizer, max_length=9999).labels
    return str(tokenizer.decode([label for label in labels if label != IGNORED]))


def test_earlier_turns_that_are_written_otherwise_end_where_both_forms_do() -> None:
    """Qwen3 puts empty thoughts in front of the last turn alone."""
    assert labelled_by("qwen3.jinja") == "a quick help<|im_end|><think>\n\n</think>\n\nit's great!<|im_end|>"


@pytest.mark.parametrize("name", PAIRS)
def test_labels_by_difference_are_those_that_trls_templates_mark(name: str) -> None:
    """But for white space around the special tokens."""
    by_difference, marked = (labelled_by(file) for file in (f"{name}.jinja", f"{name}_training.jinja"))
    found = [re.sub(r"\s*(<[^>]*>)\s*", r"\1", labels).strip() for labels in (by_difference, marked)]
    assert found[0] == found[1]
    assert re.sub(r"<[^>]*>", "|", found[0]).strip("|") == "a quick help|it's great!"


@pytest.mark.parametrize("system", [None, "text"])
def test_what_is_too_long_loses_its_oldest_exchanges(system: str | None) -> None:
    tokenizer = chat_tokenizer()
    messages = turns("red", "warm", "blue", "cold", "the sky", "is good", system=system)
    whole = encode_conversation(messages, tokenizer, max_length=99)
    for kept in (4, 2):
        expected = encode_conversation([*messages[: system is not None], *messages[-kept:]], tokenizer, max_length=99)
        for length in (len(expected.input_ids), len(expected.input_ids) + 1):
            example = encode_conversation(messages, tokenizer, max_length=length)
            assert (example.input_ids, example.labels) == (expected.input_ids, expected.labels)
            assert example.truncated == len(whole.input_ids) - len(expected.input_ids)


def test_the_end_of_the_last_turn_is_cut_but_never_all_of_it() -> None:
    tokenizer = chat_tokenizer()
    messages = turns("red", "warm", "the sky", "is good and warm")
    text, trained = shown(encode_conversation(messages, tokenizer, max_length=13), tokenizer)
    assert (text, trained) == ("<s>user the sky</s>\n<s>assistant is ", "is ")
    for template in (CHATML, MARKED):
        with pytest.raises(
            DataError, match="the last exchange has 11 tokens before the assistant's turn, max_length is 11"
        ):
            encode_conversation(messages, chat_tokenizer(template), max_length=11)


def test_an_exchange_may_have_several_messages_of_a_role() -> None:
    tokenizer = chat_tokenizer()
    messages = [
        {"role": "user", "content": "red"},
        {"role": "user", "content": "blue"},
        {"role": "assistant", "content": "warm"},
        {"role": "assistant", "content": "cold"},
        {"role": "user", "content": "sky"},
        {"role": "assistant", "content": "good"},
    ]
    whole = encode_conversation(messages, tokenizer, max_length=99)
    assert shown(whole, tokenizer)[1] == "warm</s>|cold</s>|good</s>"
    assert shown(encode_conversation(messages, tokenizer, max_length=len(whole.input_ids) - 1), tokenizer)[0] == (
        "<s>user sky</s>\n<s>assistant good</s>"
    )


def test_an_opening_is_what_the_model_is_asked_at_inference() -> None:
    tokenizer = chat_tokenizer()
    asked = tokenizer.apply_chat_template(LONG[:-1], add_generation_prompt=True)["input_ids"]
    example = encode_opening(LONG[:-1], tokenizer, max_length=99)
    assert example.input_ids == asked
    assert {*example.labels} == {IGNORED}
    whole = encode_conversation(LONG, tokenizer, max_length=99)
    assert whole.input_ids[: len(asked)] == asked
    short = encode_opening(LONG[:-1], tokenizer, max_length=len(asked) - 1)
    assert shown(short, tokenizer)[0].startswith("<s>system text</s>\n<s>user blue")
    assert short.truncated == len(asked) - len(short.input_ids) > 0
    with pytest.raises(DataError, match="the last exchange has 17 tokens before the assistant's turn, max_length is 4"):
        encode_opening(LONG[:-1], tokenizer, max_length=4)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_reply_follows_the_opening_that_it_is_generated_after(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    for max_length in (99, 30):
        opening = encode_opening(LONG[:-1], tokenizer, max_length=max_length)
        for count, words in ((2, "is "), (9, "is good</s>")):
            reply = encode_reply(LONG, tokenizer, max_length=max_length, max_new_tokens=count)
            assert reply.input_ids[: len(opening.input_ids)] == opening.input_ids
            assert shown(reply, tokenizer)[1] == words
            assert reply.labels[-1] == reply.input_ids[-1]


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
THINKING = CHATML.replace("<s>assistant {% endif %}", "<s>assistant think {% endif %}")
LAST = CHATML.replace(
    "{{ message.content }}",
    "{% if loop.last or message.role == 'user' %}{{ message.content }}{% else %}text{% endif %}",
)
UNMARKED = MARKED.replace("message.role == 'assistant'", "message.role == 'model'")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, turns("red", "warm"), "the base model's tokenizer has no chat template: use a chat model"),
        (
            ALTERNATING,
            turns("red", "warm", system="text"),
            r"the chat template refuses the messages \(roles must alt.*: c",
        ),
        (ALTERNATING, turns("red", "warm")[1:], r"the chat template refuses|begins with the assistant's turn"),
        ("{{ messages[0].content + 1 }}", turns("red", "warm"), r"the chat template refuses the messages \(can only"),
        (
            "{{ messages[0].no.content }}",
            turns("red", "warm"),
            r"the chat template refuses the messages \('dict object'",
        ),
        (
            THINKING,
            turns("red", "warm"),
            "does not write the assistant's turn behind its own generation prompt: use one",
        ),
        (
            LAST,
            turns("red", "warm", "blue", "cold"),
            "the chat template writes message 2 otherwise where others follow",
        ),
        (UNMARKED, turns("red", "warm"), "the chat template marks no token as the assistant's; correct its {% gen"),
        (CHATML, turns("red", "warm")[1:], "the conversation begins with the assistant's turn; put a user's in front"),
    ],
)
def test_templates_that_do_not_fit_are_refused(template: str | None, messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        encode_conversation(messages, chat_tokenizer(template), max_length=99)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"column 'talk' holds no conversation; make it a list of {role, content} or drop the row"),
        ([], "column 'talk' holds no conversation"),
        ({"role": "user"}, "column 'talk' holds no conversation"),
        (["red"], "message 1 in column 'talk' is no object; make it {role, content}"),
        ([{"role": "user", "content": "red"}, {"from": "gpt", "value": "warm"}], "message 2 .* has no text as role"),
        ([{"role": "user", "content": None}], "message 1 in column 'talk' has no text as content; fill it in or drop"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1 in column 'talk' has no text as content"),
    ],
)
def test_columns_without_conversations_are_refused(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        messages_in({"talk": value}, "talk", "user")


def test_a_text_is_one_message_and_empty_fields_are_left_out() -> None:
    assert messages_in({"x": "red"}, "x", "user") == [{"role": "user", "content": "red"}]
    messages = [{"role": "user", "content": "red", "name": None, "id": 3}]
    assert messages_in({"x": messages}, "x", "user") == [{"role": "user", "content": "red", "id": 3}]


def test_a_system_prompt_is_put_where_there_is_none() -> None:
    own = turns("red", system="own")
    assert with_system(own, "other") == own
    assert with_system(own[1:], "other") == turns("red", system="other")
    assert with_system(own[1:], None) == own[1:]


TRIMMED = CHATML.replace("{{ message.content }}", "{{ message.content | trim }}")


@pytest.mark.parametrize("template", [CHATML, TRIMMED])
@pytest.mark.parametrize("system", [None, "the sky"])
def test_a_filled_template_is_the_users_turn_and_the_answer_the_assistants(template: str, system: str | None) -> None:
    tokenizer, record = chat_tokenizer(template), {"x": "red blue", "y": "good"}
    example = encode(
        Template(" text : {x} label : "),
        record,
        tokenizer,
        answer="warm",
        max_length=99,
        add_eos=True,
        chat=Chat(system),
    )
    messages = turns(" text : red blue label : ", "warm", system=system)
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    assert example.input_ids == whole[:-1]  # without the newline at its end
    assert example.labels == [IGNORED] * len(asked) + whole[len(asked) : -1]
    open_end = encode(Template(" text : {x} label : "), record, tokenizer, answer="", max_length=99, chat=Chat(system))
    assert open_end.input_ids == asked


@pytest.mark.parametrize("template", [CHATML, TRIMMED])
def test_only_fields_are_cut_in_a_users_turn(template: str) -> None:
    tokenizer, record = chat_tokenizer(template), {"x": " red green blue cold ", "y": "good"}
    options = {"answer": "warm", "chat": Chat("red green")}
    whole = encode(Template("{x} {y} label"), record, tokenizer, max_length=99, **options)
    for room in (0, 4):
        cut = encode(Template("{x} {y} label"), record, tokenizer, max_length=24, room=room, **options)
        text, trained = shown(cut, tokenizer)
        assert text.startswith("<s>system red green</s>\n<s>user ")
        assert text.endswith("label</s>\n<s>assistant warm</s>")
        assert trained == "warm</s>"
        assert cut.truncated == len(whole.input_ids) - len(cut.input_ids) > 0
        assert len(cut.input_ids) == 24 - max(0, room - 2)
    with pytest.raises(DataError, match="template and answer alone take 21 tokens, max_length is 9"):
        encode(Template("{x} {y} label"), record, tokenizer, max_length=9, **options)
