"""The bytes and the text of single tokens, which may be only a part of a character."""

from __future__ import annotations

import re
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
"""Bytes that byte-level vocabularies write as the character with that code; others become characters from 256 on."""
_BYTES = {chr(byte): byte for byte in _PRINTED} | {
    chr(256 + number): byte for number, byte in enumerate(byte for byte in range(256) if byte not in _PRINTED)
}
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece vocabularies write a byte."""
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""How SentencePiece vocabularies write a space, which ``decode`` drops at the beginning of a text."""
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""How ``decode`` shows a part of a character."""


def bytes_of(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """The bytes of a single token."""
    piece, text = str(tokenizer.convert_ids_to_tokens(token)), str(tokenizer.decode([token]))
    if _SPACE in piece and token not in _added(tokenizer):
        return piece.replace(_SPACE, " ").encode()
    if (byte := _FALLBACK.fullmatch(piece)) and text != piece:  # ``decode`` drops a space at the beginning
        return bytes.fromhex(byte[1])
    if _UNKNOWN not in text:
        return text.encode()
    return bytes(_BYTES[c] for c in piece) if _BYTES.keys() >= {*piece} else text.encode()


@lru_cache(maxsize=8)
def _added(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the added tokens. Cached, since the tokenizer collects them anew at each access."""
    return frozenset(tokenizer.added_tokens_decoder)


def shown(token: bytes) -> str:
    """A token's text; if its bytes are not valid UTF-8, the bytes in OpenAI's notation."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return f"bytes:{repr(token)[2:-1]}"
