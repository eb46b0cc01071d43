"""Make a tokenizer from its settings."""

from dataclasses import dataclass

from megatron.registry import resolve
from megatron.tokenizer.base import Tokenizer


def build_tokenizer(
    kind: str, vocab_file: str | None = None, merge_file: str | None = None, end_of_document_token: str | None = None
) -> Tokenizer:
    """The tokenizer registered as `kind`.

    end_of_document_token: None: the default of the kind, usually "<|endoftext|>"; it must be in the vocabulary.
    Raises UserError for an unknown kind, a missing or unreadable file, or a token that is not in the vocabulary.
    """
    tokenizer: Tokenizer = resolve("tokenizer", kind)(vocab_file, merge_file, end_of_document_token)
    return tokenizer


@dataclass(frozen=True)
class TokenizerSettings:
    """The arguments of `build_tokenizer`, picklable; calling them makes the tokenizer."""

    kind: str
    vocab_file: str | None = None
    merge_file: str | None = None
    end_of_document_token: str | None = None

    def __call__(self) -> Tokenizer:
        """The tokenizer. Raises UserError as `build_tokenizer` does."""
        return build_tokenizer(self.kind, self.vocab_file, self.merge_file, self.end_of_document_token)
