"""Tokenizers that the `tokenizers` library runs: a tokenizer.json, or GPT-2's vocab.json with merges.txt."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megatron.errors import UserError
from megatron.tokenizer.base import END_OF_DOCUMENT, Tokenizer, digest, missing_token, required_file


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` behind Deepy's interface.

    As in GPT-NeoX, a special token spelled out in the text becomes that token, and what the file's own post-processor
    adds (Llama's beginning of text) is added. Decoding shows special tokens, so that nothing disappears.
    """

    def __init__(self, backend: tokenizers.Tokenizer, kind: str, source: Path, definition: str, token: str) -> None:
        # A file may ask for at most so many tokens, and would silently cut every document.
        backend.no_truncation()
        backend.no_padding()
        found = backend.token_to_id(token)
        if found is None:
            raise missing_token(token, kind, _special_tokens(backend))
        self._backend = backend
        self._line = f'{kind} {source}, {{}} ids, end of document "{token}" ({found})'
        # Not the number of tokens: some files leave ids out.
        self.vocab_size = max(backend.get_vocab().values()) + 1
        self.end_of_document = found
        self.fingerprint = digest(definition, token)
        self.added_tokens = tuple(entry.content for entry in backend.get_added_tokens_decoder().values())
        self.affixes = _affixes(backend)

    def describe(self) -> str:
        """One line for the start of a run."""
        return self._line.format(f"{self.vocab_size:,}")

    def encode_bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts without surrogates, without what the file's post-processor adds."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def normalized(self, text: str) -> str:
        """The text as it is before it is cut into words."""
        normalizer = self._backend.normalizer
        return str(normalizer.normalize_str(text)) if normalizer else text

    def token_texts(self) -> list[str]:
        """The tokens as the vocabulary writes them."""
        return list(self._backend.get_vocab())

    def definition(self) -> dict[str, Any]:
        """The content of its tokenizer.json."""
        content: dict[str, Any] = json.loads(self._backend.to_str())
        return content

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts)]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


def build_hf_tokenizer(vocab_file: str | None, merge_file: str | None, token: str | None) -> HuggingFaceTokenizer:
    """`HFTokenizer`: vocab_file is a tokenizer.json, merges included. Raises UserError for a broken one."""
    path = required_file(vocab_file, "vocab_file", "HFTokenizer", "a tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f'vocab_file ("{path}") is not a tokenizer.json: {error}') from error
    return HuggingFaceTokenizer(backend, "HFTokenizer", path, path.read_text("utf-8"), token or END_OF_DOCUMENT)


def build_gpt2_bpe_tokenizer(vocab_file: str | None, merge_file: str | None, token: str | None) -> HuggingFaceTokenizer:
    """`GPT2BPETokenizer` and `HFGPT2Tokenizer`: GPT-2's byte-level BPE from its two files.

    vocab_file: vocab.json, or a folder that holds vocab.json and merges.txt. Raises UserError for unreadable files.
    """
    kind = "GPT2BPETokenizer"
    if vocab_file and Path(vocab_file).is_dir():
        folder = Path(vocab_file)
        vocab_file, merge_file = str(folder / "vocab.json"), merge_file or str(folder / "merges.txt")
    vocab = required_file(vocab_file, "vocab_file", kind, "GPT-2's vocab.json (a tokenizer.json goes with HFTokenizer)")
    merges = required_file(merge_file, "merge_file", kind, "GPT-2's merges.txt")
    try:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f'vocab_file ("{vocab}") and merge_file ("{merges}") cannot be read: {error}') from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    token = token or END_OF_DOCUMENT
    if backend.token_to_id(token) is not None:  # declared special, it is kept whole in the text; never added
        backend.add_special_tokens([AddedToken(token, normalized=False)])
    definition = vocab.read_text("utf-8") + merges.read_text("utf-8")
    return HuggingFaceTokenizer(backend, kind, vocab, definition, token)


def _affixes(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts before and after the ids of a text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a").ids
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return tuple(full[:start]), tuple(full[start + len(bare) :])


def _special_tokens(backend: tokenizers.Tokenizer) -> list[str]:
    added = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    return added or [token for token in backend.get_vocab() if token.startswith("<") and token.endswith(">")]
