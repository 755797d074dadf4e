"""Formats values for messages and reports. Internal."""

from __future__ import annotations

import math


def in_one_line(error: BaseException, length: int = 160) -> str:
    """An error's message in one line, or its class's name where it has none."""
    return shortened(" ".join(str(error).split()) or type(error).__name__, length)


def in_units(size: float) -> str:
    """A number of bytes with a unit, such as 66.1 MB."""
    power = min(int(math.log(max(size, 1), 1000)), 3)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"


def in_words(name: str) -> str:
    """The name of a metric, field or option, without its prefix and with spaces for underscores."""
    return name.rpartition(".")[2].replace("_", " ")


def shortened(text: str, length: int) -> str:
    """Truncate a text to ``length`` characters, the last an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
