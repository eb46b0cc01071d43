"""Helpers for text in UTF-8."""

import re

_SURROGATE = re.compile("[\ud800-\udfff]")


def well_formed(text: str) -> str:
    """`text` with each lone surrogate (JSON can hold them, UTF-8 cannot) replaced by U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


def utf8_length(text: str, at_once: int = 1 << 20) -> int:
    """The number of bytes of `text` in UTF-8, counted in chunks of `at_once` characters to save memory."""
    if text.isascii():
        return len(text)
    return sum(len(text[start : start + at_once].encode()) for start in range(0, len(text), at_once))


def common_length(first: str, second: str) -> int:
    """The number of characters that both texts begin with."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(place for place in range(shorter) if first[place] != second[place])
