"""Log-probabilities name each token by its own bytes, those of a part of a character too, and are numbers."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from softtune.serving.http.completions import ChatCompletionFormat, CompletionFormat, GeneratedText
from softtune.serving.http.vocabulary import bytes_of, shown
from softtune.serving.sampling import SampledToken

TEXT = "a sky 😀é"


def byte_level() -> Tokenizer:
    """A token a byte, as GPT-2 writes them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(BPE({character: number for number, character in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def byte_fallback() -> Tokenizer:
    """Characters, and bytes where there is none, as Llama 2 writes them."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"asky▁", "▁s"]
    made = Tokenizer(BPE({piece: number for number, piece in enumerate(pieces)}, [("▁", "s")], byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


@pytest.fixture(params=[byte_level, byte_fallback], ids=lambda made: made.__name__)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=request.param())


def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    answer = GeneratedText(TEXT, [SampledToken(token, -1.0) for token in tokenizer(TEXT)["input_ids"]], "stop")
    told = ChatCompletionFormat(tokenizer, True).whole(answer, 0)["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in told).decode() == TEXT
    assert [token["token"] for token in told][-6:] == [rf"bytes:\x{byte:02x}" for byte in TEXT[-2:].encode()]
    offsets = CompletionFormat(tokenizer, True).whole(answer, 0)["logprobs"]["text_offset"]
    assert offsets[-6:] == [6, 6, 6, 6, 7, 7]


def test_parts_of_characters_stay_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = tokenizer("😀")["input_ids"]
    likeliest = {token: -float(number) for number, token in enumerate(parts)}
    told = CompletionFormat(tokenizer, True).whole(
        GeneratedText("", [SampledToken(parts[0], -0.0, likeliest)], "length"), 0
    )
    assert told["logprobs"]["top_logprobs"] == [
        {r"bytes:\xf0": 0, r"bytes:\x9f": -1, r"bytes:\x98": -2, r"bytes:\x80": -3}
    ]


def test_what_cannot_come_has_a_number(tokenizer: PreTrainedTokenizerFast) -> None:
    nothing = -float("inf")
    answer = GeneratedText("a", [SampledToken(70, nothing, {70: nothing, 71: float("nan")})], "length")
    for kind in (CompletionFormat, ChatCompletionFormat):
        told = json.dumps(kind(tokenizer, True).whole(answer, 0), allow_nan=False)
        assert told.count("-9999.0") == 3


def test_every_byte_is_told_as_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    """Beside the vocabularies' own rules: a character that stands for a byte, and the byte's number."""
    if "<0x00>" in tokenizer.get_vocab():
        expected = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
    else:
        printed = [byte for byte in range(256) if 0x21 <= byte < 0x7F or (0xA1 <= byte <= 0xFF and byte != 0xAD)]
        hidden = [byte for byte in range(256) if byte not in printed]
        characters = {chr(byte): byte for byte in printed} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
        expected = {character: bytes([byte]) for character, byte in characters.items()}
    for piece, content in expected.items():
        assert bytes_of(tokenizer, tokenizer.convert_tokens_to_ids(piece)) == content, piece


def test_added_tokens_are_their_text() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    tokenizer.add_special_tokens({"eos_token": "</s▁>"})
    assert bytes_of(tokenizer, tokenizer.eos_token_id) == "</s▁>".encode()


def test_a_word_that_looks_like_a_byte_is_its_text() -> None:
    made = byte_level()
    made.add_tokens(["<0x20>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    assert bytes_of(tokenizer, tokenizer.convert_tokens_to_ids("<0x20>")) == b"<0x20>"


@pytest.mark.parametrize(
    ("token", "text"),
    [(b"sky", "sky"), ("é".encode(), "é"), (b"\xf0\x9f", r"bytes:\xf0\x9f"), (b"a\xc3", r"bytes:a\xc3"), (b"", "")],
)
def test_what_is_no_text_is_shown_as_bytes(token: bytes, text: str) -> None:
    assert shown(token) == text
