"""`SPMTokenizer`: a SentencePiece model file."""

from functools import cached_property
from pathlib import Path

import sentencepiece

from megatron.errors import UserError
from megatron.tokenizer.base import Tokenizer, digest, missing_token, required_file

KIND = "SPMTokenizer"
# A ModelProto message with `normalizer_spec { add_dummy_prefix: false }` alone. Serialized messages of protobuf that
# follow one another are merged, and the last value counts.
WITHOUT_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model behind Deepy's interface. Control pieces such as `</s>` decode to nothing."""

    parts_stand_alone = False

    def __init__(self, model: sentencepiece.SentencePieceProcessor, source: Path, token: str | None) -> None:
        self._model, self._source = model, source
        self.unknown = model.unk_id()
        self.vocab_size = model.vocab_size()
        self.end_of_document = _end_of_document(model, token)
        piece = model.id_to_piece(self.end_of_document)
        self._line = f'{KIND} {source}, {self.vocab_size:,} ids, end of document "{piece}" ({self.end_of_document})'
        self.fingerprint = digest(source.read_bytes(), piece)

    def describe(self) -> str:
        """One line for the start of a run."""
        return self._line

    def token_texts(self) -> list[str]:
        """The pieces, with U+2581 for a space."""
        return [self._model.id_to_piece(number) for number in range(self.vocab_size)]

    def token_bytes(self) -> list[bytes]:
        """The pieces as they are decoded within a text."""
        model = self._model
        return self._bytes_within(
            [None if model.is_unknown(i) else model.id_to_piece(i) for i in range(self.vocab_size)]
        )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._model.encode(texts, num_threads=1)
        return ids

    def _encode_continuing(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._continuing_model.encode(texts, num_threads=1)
        return ids

    @cached_property
    def _continuing_model(self) -> sentencepiece.SentencePieceProcessor:
        """The same model, which puts no space before a text."""
        return sentencepiece.SentencePieceProcessor(model_proto=self._source.read_bytes() + WITHOUT_DUMMY_PREFIX)

    def _decode(self, ids: list[int]) -> str:
        return str(self._model.decode(ids))


def build_spm_tokenizer(vocab_file: str | None, merge_file: str | None, token: str | None) -> SentencePieceTokenizer:
    """`SPMTokenizer`: vocab_file is a .model file; the end of a document is the model's own `</s>` unless set.

    Raises UserError for a file that is not a model, or a model without such a piece.
    """
    path = required_file(vocab_file, "vocab_file", KIND, "a SentencePiece .model file")
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f'vocab_file ("{path}") is not a SentencePiece model: {error}') from error
    return SentencePieceTokenizer(model, path, token)


def _end_of_document(model: sentencepiece.SentencePieceProcessor, token: str | None) -> int:
    if token is None and model.eos_id() >= 0:
        return int(model.eos_id())
    token = token or "</s>"
    found = model.piece_to_id(token)  # for an absent piece, the id of the unknown piece
    if model.id_to_piece(found) != token:
        ids = range(model.vocab_size())
        raise missing_token(token, KIND, [model.id_to_piece(i) for i in ids if model.is_control(i)])
    return int(found)
