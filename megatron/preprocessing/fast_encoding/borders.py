"""Split a long text where no token of the vocabulary can cross: for SentencePiece and tokenizers of its kind.

Their tokens are substrings of the text, with "▁" for a space, and a space is prepended to each text. The ids on one
side of a position that no token can cross do not depend on the other side: merges never join the two, and the best
score of a unigram model is the sum of the best scores of both sides. There are two kinds of such positions, both
between characters that normalizers do not change:

- a single space, if in every token spaces come first. It is removed, since one is prepended to the piece after it;
- two characters that are adjacent in no token, if a space and the second one are not either. The piece then begins with
  the token of the prepended space, which is dropped from its ids.

`borders_are_safe` verifies this for each tokenizer before it is used. No torch.
"""

import random
import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from megatron.arrays import Ids
from megatron.preprocessing.fast_encoding.probes import mixed_texts
from megatron.preprocessing.fast_encoding.text_pieces import LOWER, PIECE_CHARACTERS, UNCASED, UPPER
from megatron.tokenizer.base import Tokenizer, UnknownTextError

SPACE = "\u2581"  # how vocabularies write it
_INERT = f"[0-9{UPPER}{LOWER}{UNCASED}]"
_SPACE = re.compile(rf"(?<={_INERT})\x20(?={_INERT})")
_PAIR = re.compile(rf"(?<={_INERT})(?={_INERT})")


class Borders:
    """Positions at which a tokenizer's texts can be split, according to its vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokens, self._whole = tokenizer.token_texts(), tokenizer.added_tokens
        self._pairs = {a + b for token in tokens for a, b in pairwise(token)}
        self._single = {token for token in tokens if len(token) == 1}
        self._after_space = {pair[1] for pair in self._pairs if pair[0] == SPACE}
        self._at_spaces = not any(pair[1] == SPACE != pair[0] for pair in self._pairs)
        self._reach = max(map(len, self._whole), default=0)

    def encode(self, text: str, size: int = PIECE_CHARACTERS) -> Ids:
        """Ids of `text`, without affixes. Memory: one piece and the ids."""
        found = bytearray()  # grows without being copied
        for piece, begins_with_space in self.pieces(text, size):
            found += np.array(self._tokenizer.encode_bare([piece])[0][begins_with_space:], np.uint32).data
        return np.frombuffer(found, np.uint32)

    def pieces(self, text: str, size: int) -> Iterator[tuple[str, bool]]:
        """Pieces of `text` of `size` characters or a few more, and whether to drop the first id of each."""
        start, begins_with_space = 0, False
        while (place := self._next(text, start + size)) is not None:
            yield text[start:place], begins_with_space
            begins_with_space = text[place] != " "
            start = place if begins_with_space else place + 1
        yield text[start:] if start else text, begins_with_space

    def _next(self, text: str, start: int) -> int | None:
        """The first position from `start` on, of the first kind if there is one within a piece's length."""
        while start < len(text):
            stop = min(len(text), start + PIECE_CHARACTERS)
            for match in _SPACE.finditer(text, start, stop) if self._at_spaces else ():
                if self._is_outside_of_added_tokens(text, match.start()):
                    return match.start()
            for match in _PAIR.finditer(text, start, stop) if SPACE in self._single else ():
                place = match.start()
                if self._parts(text[place - 1], text[place]) and self._is_outside_of_added_tokens(text, place):
                    return place
            start = stop
        return None

    def _parts(self, before: str, after: str) -> bool:
        # Characters that are not tokens are unknown, and several of them can become one token.
        known = before in self._single and after in self._single
        return known and before + after not in self._pairs and after not in self._after_space

    def _is_outside_of_added_tokens(self, text: str, place: int) -> bool:
        around = text[max(0, place - self._reach) : place + self._reach + 1]
        return not any(token in around for token in self._whole)


def borders_are_safe(tokenizer: Tokenizer, count: int = 2_000) -> bool:
    """Whether texts have the ids of their pieces when they are split at every position."""
    borders, chance = Borders(tokenizer), random.Random(3)
    tokens = [token.replace(SPACE, " ") for token in tokenizer.token_texts()]
    if not tokens:
        return False
    texts = [*mixed_texts(count), *("".join(chance.choices([*tokens, " ", "a"], k=12)) for _ in range(count))]
    try:
        return all(borders.encode(text, size=1).tolist() == tokenizer.encode_bare([text])[0] for text in texts)
    except UnknownTextError:
        return False
