"""The interface of every tokenizer."""

import hashlib
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, groupby, pairwise
from pathlib import Path

from megatron.arrays import Ids, flat
from megatron.errors import UserError
from megatron.files import is_file
from megatron.registry import nearest
from megatron.text import common_length, well_formed

END_OF_DOCUMENT = "<|endoftext|>"  # the default token, GPT-2's
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # as vocabularies spell the tokens that stand in for unknown characters
UNKNOWN_ID = "\ufffd"  # shown for an id outside the vocabulary


class UnknownTextError(UserError):
    """A text has a character that the vocabulary lacks, and the vocabulary has no unknown token either."""


class Tokenizer(ABC):
    """Text to ids and back.

    vocab_size: ids are 0..vocab_size - 1. end_of_document: the id after each document; always a real one.
    fingerprint: SHA-256 of what defines the tokenizer, independent of where its files lie.
    """

    vocab_size: int
    end_of_document: int
    fingerprint: str
    # Strings that become one token wherever they occur in a text, and the ids that are put around each text.
    added_tokens: tuple[str, ...] = ()
    affixes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    # Whether the parts of a text, each encoded as a text of its own, decode to that text when joined.
    parts_stand_alone: bool = True
    # The id of unknown text, if the tokenizer uses one.
    unknown: int | None = None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the affixes. A lone surrogate counts as U+FFFD. Raises UnknownTextError."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, as `encode` gives them, faster than one by one."""
        return self._encode([well_formed(text) for text in texts])

    def encode_arrays(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        """Ids of texts without surrogates, concatenated, and the number of each."""
        return flat(self._encode(list(texts)))

    def encode_bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts without surrogates, without the affixes."""
        return self._encode(list(texts))

    def encode_openings(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that the model is to continue: with the prefix, but without a suffix, which would end them."""
        return [[*self.affixes[0], *ids] for ids in self.encode_bare([well_formed(text) for text in texts])]

    def encode_parts(self, parts: Sequence[str]) -> list[list[int]]:
        """Ids of the consecutive parts of one text without surrogates, without the affixes.

        Joined, they decode to what the ids of the whole text decode to: no space is made up at a border. Where
        possible, a part has the ids that it has as a continuation of the parts before it, so that no token crosses
        the border; else the ids are those of the whole text, and a token that crosses a border belongs to the part
        that it ends in.
        """
        found: list[list[int]] = []
        for part in parts:
            begun = not self.parts_stand_alone and any(found)
            found += self._encode_continuing([part]) if begun else self.encode_bare([part])
        if self.parts_stand_alone:
            return found
        text, decoded = "".join(parts), self.decode([*chain(*found)])
        if decoded == text:
            return found
        [whole] = self.encode_bare([text])
        return found if decoded == self.decode(whole) else self._split(whole, parts)

    def normalized(self, text: str) -> str:
        """`text` as it is before pre-tokenization."""
        return text

    def token_texts(self) -> list[str]:
        """The tokens as the vocabulary spells them; empty where they are not stretches of text."""
        return []

    @abstractmethod
    def token_bytes(self) -> list[bytes]:
        """The UTF-8 that each id adds within a text, perhaps a part of a character; empty for ids that are no text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of any ids. Never raises: an id outside the vocabulary and bytes that are not UTF-8 become U+FFFD."""
        runs = ((known, list(run)) for known, run in groupby(ids, self._knows))
        return "".join(self._decode(run) if known else UNKNOWN_ID * len(run) for known, run in runs)

    def decode_continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Text of `ids` that follow `before` in a document: with the space that decoders drop where a text begins."""
        document = self.document_of(before)
        head, whole = self.decode(document), self.decode([*document, *ids])
        return whole[common_length(head, whole) :]  # `ids` may complete a character that `before` ends within

    def document_of(self, before: Sequence[int]) -> Sequence[int]:
        """The ids of `before` that belong to its last document: after the last end of a document, or prefix."""
        starts = {self.end_of_document, *self.affixes[0][-1:]}
        begun = next((place for place in range(len(before), 0, -1) if before[place - 1] in starts), 0)
        return before[begun:]

    @abstractmethod
    def describe(self) -> str:
        """One line for the start of a run: kind, source, size, end-of-document token."""

    @abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts without surrogates."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of ids that `_knows` accepts."""

    def _encode_continuing(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that continue another one, without a space that the tokenizer puts before each text."""
        return self.encode_bare(texts)

    def _bytes_within(self, spellings: Sequence[str | None]) -> list[bytes]:
        """What ids add to a text by `decode`. spellings: <0xE4> stands for a byte, None for no text."""
        first = next(number for number in range(self.vocab_size) if self.decode([number]).strip(" " + UNKNOWN_ID))
        begun = len(self.decode([first]))
        found = []
        for number, spelling in enumerate(spellings):
            byte = BYTE_TOKEN.fullmatch(spelling or "")
            text = "" if spelling is None else self.decode([first, number])[begun:]
            found.append(bytes([int(byte[1], 16)]) if byte else text.encode())
        return found

    def _split(self, ids: list[int], parts: Sequence[str]) -> list[list[int]]:
        """`ids` of the whole text at the borders of its parts, found by the lengths of decoded texts."""
        cuts, whole = [0], self.decode(ids)
        for text in [*accumulate(parts)][:-1]:
            length = len(self.decode(self.encode_bare([text])[0]))
            cut = bisect_right(range(len(ids) + 1), length, key=lambda count: len(self.decode(ids[:count]))) - 1
            while cut > cuts[-1] and not whole.startswith(self.decode(ids[:cut])):  # within the bytes of a character
                cut -= 1
            cuts.append(max(cut, cuts[-1]))
        return [ids[start:stop] for start, stop in pairwise([*cuts, len(ids)])]

    def _knows(self, token_id: int) -> bool:
        return 0 <= token_id < self.vocab_size


def required_file(path: str | None, key: str, kind: str, what: str) -> Path:
    """`path`, which must be a file. key: the setting that names it. Raises UserError."""
    if not path:
        raise UserError(f"{kind} needs {key}: {what}")
    if not is_file(path):
        raise UserError(f'{key} ("{path}") is not a file; {kind} needs {what}')
    return Path(path)


def missing_token(token: str, kind: str, candidates: Iterable[str]) -> UserError:
    """The error for an end-of-document token that is not in the vocabulary; candidates: tokens to suggest."""
    listed = sorted(set(candidates))
    hint = f"its special tokens: {', '.join(listed[:12])}" if listed else "it has no special tokens"
    near = nearest(token, listed)
    return UserError(
        f'the vocabulary of this {kind} has no token "{token}" to end a document with ({hint}); '
        f"set end_of_document_token{f', perhaps to {chr(34)}{near}{chr(34)}' if near else ''}"
    )


def digest(*parts: str | bytes) -> str:
    """SHA-256 over all parts and their lengths, in hexadecimal."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()
