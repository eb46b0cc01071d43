"""Split a long text where every tokenizer of this family ends a word, so that its pieces can be encoded separately.

The patterns of GPT-2 and its successors end a match where a letter or digit is followed by ASCII that is neither, by
full-width punctuation or an emoji, and where anything but white space is followed by a space; without look-behind the
next match does not depend on the text before it. The apostrophe is excluded: it can begin a suffix. Letters are those
that are letters in every version of Unicode in use. `probes.cuts_are_safe` verifies this for each tokenizer before it
is used. No torch.
"""

import re
from collections.abc import Iterator, Sequence

PIECE_CHARACTERS = 1 << 18
UPPER = "A-Z\u00c0-\u00d6\u00d8-\u00de\u0391-\u03a1\u03a3-\u03a9\u0410-\u042f"
LOWER = "a-z\u00df-\u00f6\u00f8-\u00ff\u03b1-\u03c9\u0430-\u044f"
UNCASED = (
    "\u05d0-\u05ea\u0621-\u063a\u0641-\u064a\u0905-\u0939\u0e01-\u0e30"  # Hebrew, Arabic, Devanagari, Thai
    "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
_NO_WORD = (
    r"\x00-\x26\x28-\x2f\x3a-\x40\x5b-\x60\x7b-\x7f\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f\U0001f300-\U0001f64f"
)
_CUT = re.compile(rf"(?<=[{UPPER}{LOWER}{UNCASED}])(?=[0-9{_NO_WORD}])|(?<=[0-9])(?=[{_NO_WORD}])|(?<=\S)(?=\x20)")


def pieces(text: str, whole: Sequence[str] = (), size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """`text` in pieces of `size` characters or a few more; a single piece if it cannot be split.

    whole: strings that are never split (added tokens).
    """
    start = 0
    while (cut := _next_cut(text, start + size, whole)) is not None:
        yield text[start:cut]
        start = cut
    yield text[start:] if start else text


def split_offsets(text: str) -> list[int]:
    """Every position at which `text` can be split."""
    return [match.end() for match in _CUT.finditer(text)]


def _next_cut(text: str, start: int, whole: Sequence[str]) -> int | None:
    reach = max(map(len, whole), default=0)
    while start < len(text) and (match := _CUT.search(text, start)):
        cut = match.end()
        around = text[max(0, cut - reach) : cut + reach]
        if not any(token in around for token in whole):
            return cut
        start = cut + 1
    return None
