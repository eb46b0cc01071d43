"""Make a tokenizer from its settings."""

from dataclasses import dataclass

from megatron.registry import resolve
from megatron.tokenizer.base import Tokenizer


def build_tokenizer(
    kind: str, vocab_file: str | None = None, merge_file: str | None = None, end_of_document_token: str | None = None
) -> Tokenizer:
    """The tokenizer `kind` names in the registry.

    end_of_document_token: None is the kind's own, most often "<|endoftext|>"; either way it must be in the vocabulary.
    Raises UserError for an unknown kind, a missing or unreadable file, or a token that is not there.
    """
    tokenizer: Tokenizer = resolve("tokenizer", kind)(vocab_file, merge_file, end_of_document_token)
    return tokenizer


@dataclass(frozen=True)
class TokenizerSettings:
    """The arguments of `build_tokenizer`, to be sent to another process, which makes the tokenizer by calling them."""

    kind: str
    vocab_file: str | None = None
    merge_file: str | None = None
    end_of_document_token: str | None = None

    def __call__(self) -> Tokenizer:
        """The tokenizer. Raises what `build_tokenizer` raises."""
        return build_tokenizer(self.kind, self.vocab_file, self.merge_file, self.end_of_document_token)
