"""Cut a long text where every tokenizer of this family ends a word anyway, so that its pieces can be encoded alone.

After an ASCII or CJK letter that is followed by ASCII that is no letter, or by full-width punctuation, the patterns of
GPT-2, its successors and their relatives end a match, and with no look-behind the next one starts afresh. An apostrophe
is left out: it may begin a suffix. `probes.cuts_are_safe` tries this on each tokenizer before it is used.
Floor 2; no torch.
"""

import re
from collections.abc import Iterator, Sequence

PIECE_CHARACTERS = 1 << 20
_CUT = re.compile(
    r"(?<=[A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])"
    r"(?=[\x00-\x26\x28-\x40\x5b-\x60\x7b-\x7f\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])"
)


def pieces(text: str, whole: Sequence[str] = (), size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """`text` in pieces of `size` characters or a few more; one piece where there is no place to cut.

    whole: strings that are never cut (added tokens).
    """
    start = 0
    while (cut := _next_cut(text, start + size, whole)) is not None:
        yield text[start:cut]
        start = cut
    yield text[start:] if start else text


def cut_places(text: str) -> list[int]:
    """Every place at which `text` may be cut."""
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
