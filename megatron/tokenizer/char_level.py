"""`CharLevelTokenizer`: one id per byte of UTF-8, without a vocabulary file.

Ids 0..255 are the bytes, 256 ends a document. GPT-NeoX has 512 ids and ends a document with 0, which is also the byte
NUL and would split a text that contains one. The bytes have the same ids here, so GPT-NeoX's files can be read, but the
ends of their documents read as NUL.
"""

from collections.abc import Sequence

import numpy as np

from megatron.arrays import Ids, sizes_of
from megatron.errors import UserError
from megatron.tokenizer.base import END_OF_DOCUMENT, Tokenizer, digest

BYTES = 256


class CharLevelTokenizer(Tokenizer):
    """Bytes as ids."""

    vocab_size = BYTES + 1
    end_of_document = BYTES
    fingerprint = digest("CharLevelTokenizer", "bytes", str(BYTES))

    def describe(self) -> str:
        """One line for the start of a run."""
        return f'CharLevelTokenizer, {self.vocab_size} ids (bytes), end of document "{END_OF_DOCUMENT}" ({BYTES})'

    def token_bytes(self) -> list[bytes]:
        """Each byte."""
        return [*(bytes([value]) for value in range(BYTES)), b""]

    def encode_arrays(self, texts: Sequence[str]) -> tuple[Ids, Ids]:
        """Ids of texts without surrogates, concatenated, and the number of each."""
        encoded = [text.encode() for text in texts]
        return np.frombuffer(b"".join(encoded), np.uint8), sizes_of(encoded)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        pieces = bytes_between(ids)
        return END_OF_DOCUMENT.join(piece.decode("utf-8", "replace") for piece in pieces)


def bytes_between(ids: list[int]) -> list[bytes]:
    """The bytes before, between and after the ends of documents in `ids`."""
    pieces = [bytearray()]
    for token_id in ids:
        if token_id == BYTES:
            pieces.append(bytearray())
        else:
            pieces[-1].append(token_id)
    return [bytes(piece) for piece in pieces]


def build_char_level_tokenizer(vocab_file: str | None, merge_file: str | None, token: str | None) -> CharLevelTokenizer:
    """`CharLevelTokenizer`. Raises UserError for any other end-of-document token."""
    if token not in (None, END_OF_DOCUMENT):
        raise UserError(f'end_of_document_token ("{token}") cannot be chosen for CharLevelTokenizer; leave it out')
    return CharLevelTokenizer()
