"""Faster libraries that can replace a tokenizer's own one, and what each of them cannot reproduce.

A backend encodes normalized text without added tokens, and adds no affixes; `CheckedEncoder` handles the rest. `probes`
verifies that its ids are those of the reference. No torch.
"""

import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron.arrays import Ids, flat, sizes_of
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.huggingface import HuggingFaceTokenizer
from megatron.tokenizer.tiktoken_bpe import CL100K_PATTERN, O200K_PATTERN, R50K_PATTERN, TiktokenTokenizer, write_ranks

Encode = Callable[[Sequence[str]], tuple[Ids, Ids]]  # texts -> concatenated ids, and the number of ids of each text


class Unsupported(Exception):
    """A backend cannot replace this tokenizer; the message says why."""


class Backend(Protocol):
    """A library that encodes."""

    def build(self, reference: Tokenizer, tokens: Sequence[bytes] | None = None) -> Encode:
        """A function that encodes as `reference` does, or as it would with `tokens` for its vocabulary.

        tokens: all bytes, then pairs of bytes in the order in which they merge; a token's id is its index.
        Raises Unsupported.
        """


class Gigatoken:
    """`gigatoken`: byte-level BPE with a fixed set of patterns, about 100 times as fast as `tokenizers`."""

    def build(self, reference: Tokenizer, tokens: Sequence[bytes] | None = None) -> Encode:
        """See `Backend`."""
        try:
            import gigatoken
        except ImportError as error:
            raise Unsupported(f"gigatoken is not installed ({error})") from error
        try:
            if isinstance(reference, HuggingFaceTokenizer):
                definition = byte_level_definition(reference, tokens)
                return _arrays_of(gigatoken.Tokenizer.from_json(json.dumps(definition)))
            if isinstance(reference, TiktokenTokenizer):
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "ranks.tiktoken"
                    write_ranks(path, tokens or reference.ranks())
                    return _arrays_of(gigatoken.Tokenizer.from_tiktoken(path, _scheme(reference), {}))
        except (RuntimeError, ValueError) as error:
            raise Unsupported(f"gigatoken: {str(error).splitlines()[0]}") from error
        raise Unsupported("gigatoken supports byte-level BPE only")


class Tiktoken:
    """`tiktoken`: byte-level BPE with a single pattern, about 4 times as fast as `tokenizers`."""

    def build(self, reference: Tokenizer, tokens: Sequence[bytes] | None = None) -> Encode:
        """See `Backend`."""
        import tiktoken

        if not isinstance(reference, HuggingFaceTokenizer):
            raise Unsupported("tiktoken replaces tokenizers of Hugging Face's library only")
        definition = byte_level_definition(reference, tokens)
        ranks = merge_order(definition["model"])
        if tokens is None:
            require_ranked_merges(definition["model"], ranks)
        ids = np.array([definition["model"]["vocab"][text_of(token)] for token in ranks], np.uint32)
        try:
            encoding = tiktoken.Encoding(
                "deepy",
                pat_str=_pattern(definition["pre_tokenizer"]),
                mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
                special_tokens={},
            )
        except ValueError as error:
            raise Unsupported(f"tiktoken: {error}") from error

        def encode(texts: Sequence[str]) -> tuple[Ids, Ids]:
            arrays = [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
            return ids[np.concatenate([np.empty(0, np.uint32), *arrays])], sizes_of(arrays)

        return encode


BACKENDS: dict[str, Backend] = {"gigatoken": Gigatoken(), "tiktoken": Tiktoken()}


def backend_versions(name: str) -> str:
    """The library versions on which an outcome of `probes` depends."""
    packages = ("tokenizers", "tiktoken", *([name] if name == "gigatoken" else []))
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def probe_reference(reference: Tokenizer, tokens: Sequence[bytes]) -> Encode:
    """The reference's own library with the reference's pattern and `tokens` as the vocabulary."""
    if isinstance(reference, HuggingFaceTokenizer):
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(json.dumps(byte_level_definition(reference, tokens)))
        return lambda texts: flat([encoding.ids for encoding in backend.encode_batch_fast(list(texts))])
    if isinstance(reference, TiktokenTokenizer):
        encoding = reference.with_ranks(tokens)
        return lambda texts: flat(encoding.encode_ordinary_batch(list(texts), num_threads=2))
    raise Unsupported("not a byte-level BPE")


def token_bytes(reference: Tokenizer) -> Ids:
    """The length in bytes of each token of a byte-level BPE, by id. Raises Unsupported for a model of another kind."""
    if isinstance(reference, HuggingFaceTokenizer):
        tokens = dict(byte_level_definition(reference, None)["model"]["vocab"])
    elif isinstance(reference, TiktokenTokenizer):
        tokens = {token: rank for rank, token in enumerate(reference.ranks())}
    else:
        raise Unsupported("not a byte-level BPE")
    lengths = np.zeros(reference.vocab_size, np.int64)
    lengths[list(tokens.values())] = [len(token) for token in tokens]  # each letter of a token's name is one byte
    return lengths


def byte_level_definition(reference: HuggingFaceTokenizer, tokens: Sequence[bytes] | None) -> dict[str, Any]:
    """The tokenizer.json of the bare byte-level BPE: no normalizer, added tokens or post-processor.

    Raises Unsupported for a model of another kind.
    """
    definition = reference.definition()
    model = definition["model"]
    unusual = [
        key for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)
    ]
    if model.get("type") != "BPE" or model.get("byte_fallback") or unusual:
        raise Unsupported(f"not a plain byte-level BPE ({', '.join(unusual) or model.get('type')})")
    steps = _steps(definition.get("pre_tokenizer"))
    if not steps or steps[-1]["type"] != "ByteLevel" or any(step.get("add_prefix_space") for step in steps):
        raise Unsupported("its pre-tokenizer is not a byte-level one without a prefix space")
    if tokens is not None:
        names = [text_of(token) for token in tokens]
        merges = [[text_of(token[:1]), text_of(token[1:])] for token in tokens if len(token) == 2]
        definition["model"] = model | {"vocab": {name: i for i, name in enumerate(names)}, "merges": merges}
        definition["model"]["ignore_merges"] = False
    return definition | {"normalizer": None, "added_tokens": [], "post_processor": None}


def merge_order(model: dict[str, Any]) -> list[bytes]:
    """The tokens of a BPE model in tiktoken's order of ranks: bytes, then merged tokens in the order of the merges."""
    ranks = dict.fromkeys(bytes([value]) for value in range(256))
    if not all(text_of(token) in model["vocab"] for token in ranks):
        raise Unsupported("tiktoken needs a vocabulary with every byte")
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(bytes_of(left + right))
    return list(ranks)


def require_ranked_merges(model: dict[str, Any], ranks: Sequence[bytes]) -> None:
    """Raise Unsupported unless merging any two neighbours whose union is a token is the same as following the merges.

    It is the same if the text of each token is encoded as that token. Otherwise some text would contain two neighbours
    whose union is a token but which the merges do not join; the same two would stand side by side when the text of that
    token is encoded alone, because merges within a stretch do not depend on its surroundings as long as no merge
    crosses its ends.
    """
    import tokenizers

    if len(ranks) != 256 + len(model["merges"]):
        raise Unsupported("several of its merges make the same token")
    plain: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
    }
    plain |= {"pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model | {"ignore_merges": False}}
    backend = tokenizers.Tokenizer.from_str(json.dumps(plain))
    names = [text_of(token) for token in ranks]
    for name, encoding in zip(names, backend.encode_batch_fast(names), strict=True):
        if encoding.ids != [model["vocab"][name]]:
            raise Unsupported(f"its merges do not make the token {json.dumps(name)} of its own text")


def text_of(token: bytes) -> str:
    """A token's bytes in the alphabet of GPT-2's vocabulary files, in which each byte is a printable letter."""
    return "".join(map(_letter, token))


def bytes_of(name: str) -> bytes:
    """The inverse of `text_of`."""
    return bytes(_BYTE_OF[letter] for letter in name)


def _letter(value: int) -> str:
    if 33 <= value <= 126 or 161 <= value <= 172 or 174 <= value <= 255:
        return chr(value)
    return chr(256 + (value if value < 33 else value - 94 if value < 161 else 67))


_BYTE_OF = {_letter(value): value for value in range(256)}


def _arrays_of(tokenizer: Any) -> Encode:
    def encode(texts: Sequence[str]) -> tuple[Ids, Ids]:
        layout = tokenizer.encode_batch(list(texts)).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

    return encode


def _scheme(reference: TiktokenTokenizer) -> str:
    schemes = {R50K_PATTERN: "gpt2", CL100K_PATTERN: "gpt4", O200K_PATTERN: "o200k"}
    if reference.pattern not in schemes:
        raise Unsupported("gigatoken does not support its pattern")
    return schemes[reference.pattern]


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer.get("pretokenizers", [pre_tokenizer]))


def _pattern(pre_tokenizer: dict[str, Any]) -> str:
    """The single pattern that splits text into words, for tiktoken."""
    *splits, byte_level = _steps(pre_tokenizer)
    if not splits and byte_level.get("use_regex", True):
        return R50K_PATTERN
    if len(splits) == 1 and splits[0]["type"] == "Split" and not byte_level.get("use_regex", True):
        split = splits[0]
        if "Regex" in split["pattern"] and split["behavior"] == "Isolated" and not split["invert"]:
            return str(split["pattern"]["Regex"])
    raise Unsupported("tiktoken splits by one pattern, this tokenizer in several steps")
