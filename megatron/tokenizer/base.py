"""What the rest of Deepy knows of a tokenizer."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from megatron.arrays import Ids, flat
from megatron.errors import UserError
from megatron.registry import nearest
from megatron.text import well_formed

END_OF_DOCUMENT = "<|endoftext|>"  # the default token, GPT-2's
UNKNOWN_ID = "\ufffd"  # how an id that is not in the vocabulary is shown


class Tokenizer(ABC):
    """Text to ids and back.

    vocab_size: ids are 0..vocab_size - 1. end_of_document: the id after each document; always a real one.
    fingerprint: SHA-256 of what defines the tokenizer, the same wherever its files lie.
    """

    vocab_size: int
    end_of_document: int
    fingerprint: str
    # Strings that become one token wherever they stand in a text, and ids that are put around each text.
    added_tokens: tuple[str, ...] = ()
    affixes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Never raises: a lone surrogate counts as U+FFFD."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, as `encode` gives them, faster than one by one."""
        return self._encode([well_formed(text) for text in texts])

    def encode_arrays(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        """Ids of texts without surrogates, one after another, and the number for each."""
        return flat(self._encode(list(texts)))

    def encode_bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts without surrogates, without the affixes."""
        return self._encode(list(texts))

    def normalized(self, text: str) -> str:
        """The text as it is before it is cut into words."""
        return text

    def token_texts(self) -> list[str]:
        """The tokens as the vocabulary writes them; none where they are no stretches of text."""
        return []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of any ids. Never raises: an id outside the vocabulary, or bytes that are no UTF-8, become U+FFFD."""
        runs = ((known, list(run)) for known, run in groupby(ids, self._knows))
        return "".join(self._decode(run) if known else UNKNOWN_ID * len(run) for known, run in runs)

    @abstractmethod
    def describe(self) -> str:
        """One line for the start of a run: kind, source, size, end-of-document token."""

    @abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts without surrogates."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of ids that `_knows` accepts."""

    def _knows(self, token_id: int) -> bool:
        return 0 <= token_id < self.vocab_size


def required_file(path: str | None, key: str, kind: str, what: str) -> Path:
    """`path`, which must be a file. key: the setting it comes from. Raises UserError."""
    if not path:
        raise UserError(f"{kind} needs {key}: {what}")
    if not Path(path).is_file():
        raise UserError(f'{key} ("{path}") is not a file; {kind} needs {what}')
    return Path(path)


def missing_token(token: str, kind: str, candidates: Iterable[str]) -> UserError:
    """The error for an end-of-document token that the vocabulary does not have; candidates: tokens to suggest from."""
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
