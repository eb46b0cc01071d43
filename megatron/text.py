"""Text that can always be written as UTF-8. Floor 0."""

import re

_SURROGATE = re.compile("[\ud800-\udfff]")


def well_formed(text: str) -> str:
    """`text` with each lone surrogate (JSON can hold them, UTF-8 cannot) replaced by U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)
