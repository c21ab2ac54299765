"""Memory is reserved in whole pages."""

from __future__ import annotations

PAGE = 4096


def round_up(nbytes: int, multiple: int = PAGE) -> int:
    """`nbytes` rounded up to a multiple."""
    return -(-nbytes // multiple) * multiple
