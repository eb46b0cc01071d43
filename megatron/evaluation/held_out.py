"""Where the text comes from whose perplexity is measured: a split of the data, preprocessed data, or files of text."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from megatron.arrays import Ids
from megatron.config.schema.config import Config
from megatron.data.build import CHECKED_TOKENS
from megatron.data.dataset_slices import whole_corpus
from megatron.data.windows import Tokens, TokenStream
from megatron.errors import RunError, UserError
from megatron.evaluation.text_size import TextSize, measure_text, unigram_entropy
from megatron.files import is_file
from megatron.preprocessing.documents import read_texts
from megatron.preprocessing.sources import ENDINGS
from megatron.resources import open_data
from megatron.text import utf8_length
from megatron.tokenizer.base import Tokenizer

TEXT_KEY = "text"  # of a document in JSON lines or a table
TEXTS = 1000  # that are tokenized together


@dataclass(frozen=True)
class HeldOut:
    """Text to score. name: the split, or the path as it was given. measure: counts its words and bytes."""

    name: str
    stream: TokenStream
    measure: Callable[[], TextSize]


@dataclass(frozen=True)
class TokensInMemory:
    """Tokens of a file of text (a `TokenStream`)."""

    ids: Ids

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    def tokens(self, start: int, length: int) -> Tokens:
        """Tokens `start` .. `start + length`, fewer at the end."""
        return self.ids[start : start + length].astype(np.int64)


def open_held_out(config: Config, tokenizer: Tokenizer) -> list[HeldOut]:
    """What `eval_data` names, else the split `eval_split`. Raises UserError with a line for each wrong one."""
    paths = config.evaluation.eval_data
    if not paths:
        part = config.evaluation.eval_split
        stream = open_data(config, tokenizer.vocab_size).part(part)
        return [HeldOut(part, stream, partial(measure_text, stream, tokenizer))]
    found, problems = [], list[str]()
    for path in dict.fromkeys(paths):
        try:
            is_text = is_file(path) and path.endswith(ENDINGS)
            found.append(_text_file(path, tokenizer) if is_text else _pair(path, tokenizer))
        except (UserError, RunError) as error:
            problems.append(f"eval_data: {error}")
    if problems:
        raise UserError(*problems)
    return found


def _pair(prefix: str, tokenizer: Tokenizer) -> HeldOut:
    """All tokens of a pair of .bin and .idx."""
    corpus = whole_corpus(prefix)
    corpus.check(tokenizer.vocab_size, CHECKED_TOKENS)
    if not corpus.num_tokens:
        raise UserError(f"{prefix} holds no tokens")
    stream = corpus.stream(tokenizer.vocab_size)
    return HeldOut(prefix, stream, partial(measure_text, stream, tokenizer))


def _text_file(path: str, tokenizer: Tokenizer) -> HeldOut:
    """A file of text: the tokens that preprocessing with --append-eod makes of it, with the words and bytes it has."""
    ends_itself = tokenizer.affixes[1][-1:] == (tokenizer.end_of_document,)
    end = () if ends_itself else (tokenizer.end_of_document,)
    found, words, size = [np.empty(0, np.uint32)], 0, 0
    documents = filter(None, read_texts([path], TEXT_KEY))
    while texts := list(islice(documents, TEXTS)):
        found += [np.array([*ids, *end], np.uint32) for ids in tokenizer.encode_batch(texts) if ids]
        words += sum(len(text.split()) for text in texts)
        size += sum(map(utf8_length, texts))
    stream = TokensInMemory(np.concatenate(found))
    if not stream.num_tokens:
        raise UserError(f"{path} holds no text")
    measured = TextSize(stream.num_tokens, words, size, unigram_entropy(np.bincount(stream.ids)))
    return HeldOut(path, stream, lambda: measured)
