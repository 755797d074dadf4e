"""How much a server does at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is done at once; the more, the longer one waits for the others."""

    rows: int = 64
    """Requests in the running batch."""
    waiting: int = 256
    """Requests that wait for a place in it."""
    tokens: int = 256
    """Tokens of a step; more of them let those who write wait longer for their next one."""
    slots: int = 16384
    """Tokens that all running texts have together, with the virtual ones of the adapters in memory."""
    hot: int = 64 * 2**20
    """Bytes of adapters to keep in memory."""
