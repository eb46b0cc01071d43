"""Train a byte-level BPE from text."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron.errors import UserError
from megatron.tokenizer.base import END_OF_DOCUMENT

SMALLEST_VOCABULARY = 257  # every byte and the end of a document


def train_byte_level_bpe(
    texts: Iterable[str],
    vocab_size: int,
    path: str,
    end_of_document: str = END_OF_DOCUMENT,
    show_progress: bool = False,
) -> int:
    """Write a tokenizer.json for `HFTokenizer`, whose id 0 is `end_of_document`, and return its vocabulary's size.

    Any text decodes to itself. The vocabulary is smaller than `vocab_size` if the text is too small. Text is split into
    words with GPT-2's pattern. The file gets its name when it is complete.
    Raises UserError if vocab_size is too small for the 256 bytes and the token.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size ({vocab_size}) must be at least {SMALLEST_VOCABULARY}: every byte and {end_of_document}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_document],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(partial))
    partial.replace(path)
    return int(tokenizer.get_vocab_size())
