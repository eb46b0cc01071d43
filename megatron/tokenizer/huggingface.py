"""Tokenizers that the `tokenizers` library runs: a tokenizer.json, files that transformers makes one of, or GPT-2's."""

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megatron.errors import UserError, first_line
from megatron.files import is_file, is_folder
from megatron.text_files import read_text
from megatron.tokenizer.base import (
    END_OF_DOCUMENT,
    Tokenizer,
    UnknownTextError,
    digest,
    missing_token,
    required_file,
)

EXCERPT_CHARACTERS = 20  # on each side of unknown text, in messages
UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
TEXT_MARKER = 2**32 - 1  # an id that stands for a text while affixes are read
FILE = "tokenizer.json"
# What transformers makes a tokenizer.json from: all files of any of these.
SOURCES = (("vocab.json", "merges.txt"), ("tokenizer.model",))


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` behind Deepy's interface.

    As in GPT-NeoX, a special token spelled out in the text becomes that token, and what the file's own post-processor
    adds (Llama's beginning of text) is added. Decoding shows special tokens, so that nothing disappears.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        kind: str,
        source: Path,
        definition: str,
        token: str,
        left_out: Sequence[str] = (),
    ) -> None:
        """definition: for the fingerprint. token: ends a document. left_out: tokens, for the description."""
        # A file can limit the number of tokens, which would silently cut every document.
        backend.no_truncation()
        backend.no_padding()
        found = backend.token_to_id(token)
        if found is None:
            raise missing_token(token, kind, _special_tokens(backend))
        if backend.decoder is None:
            backend.decoder = _decoder_for(json.loads(backend.to_str()))
        self._backend = backend
        self._name = f"{kind} {source}"
        self._line = f'{self._name}, {{}} ids, end of document "{token}" ({found})'
        self._line += f"; left out, for the model has no row for them: {', '.join(left_out)}" if left_out else ""
        # Not the number of tokens: some files leave ids out.
        self.vocab_size = max(backend.get_vocab().values()) + 1
        self.end_of_document = found
        self.fingerprint = digest(definition, token)
        self.added_tokens = tuple(entry.content for entry in backend.get_added_tokens_decoder().values())
        self.affixes = _affixes(backend, self._name)
        self.parts_stand_alone = _parts_stand_alone(self.definition())
        self.unknown = _unknown(backend)

    def describe(self) -> str:
        """One line for the start of a run."""
        return self._line.format(f"{self.vocab_size:,}")

    def encode_bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts without surrogates, without what the file's post-processor adds. Raises UnknownTextError."""
        return self._run(self._backend, list(texts), with_affixes=False)

    def normalized(self, text: str) -> str:
        """`text` as it is before pre-tokenization."""
        normalizer = self._backend.normalizer
        return str(normalizer.normalize_str(text)) if normalizer else text

    def token_texts(self) -> list[str]:
        """The tokens as the vocabulary spells them."""
        return list(self._backend.get_vocab())

    def token_bytes(self) -> list[bytes]:
        """The tokens as they are decoded within a text; special ones are no text."""
        special = {number for number, token in self._backend.get_added_tokens_decoder().items() if token.special}
        none = special | {self.end_of_document, self.unknown}
        tokens = [None if i in none else self._backend.id_to_token(i) for i in range(self.vocab_size)]
        if not any(step["type"] == "ByteLevel" for step in _steps(self.definition()["decoder"])):
            return self._bytes_within(tokens)
        values = _byte_level_alphabet()
        return [
            bytes(values[character] for character in token) if set(token) <= set(values) else token.encode()
            for token in (token or "" for token in tokens)
        ]

    def definition(self) -> dict[str, Any]:
        """The content of its tokenizer.json."""
        content: dict[str, Any] = json.loads(self._backend.to_str())
        return content

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._run(self._backend, texts, with_affixes=True)

    def _encode_continuing(self, texts: list[str]) -> list[list[int]]:
        return self._run(self._continuing_backend, texts, with_affixes=False)

    def _split(self, ids: list[int], parts: Sequence[str]) -> list[list[int]]:
        offsets = self._backend.encode("".join(parts), add_special_tokens=False).offsets
        ends = [*accumulate((end for _, end in offsets), max)]
        cuts = [bisect_right(ends, border) for border in accumulate(map(len, parts))][:-1]
        return [ids[start:stop] for start, stop in pairwise([0, *cuts, len(ids)])]

    @cached_property
    def _continuing_backend(self) -> tokenizers.Tokenizer:
        """The same tokenizer, which puts no space before a text."""
        definition = self.definition()
        for part in ("normalizer", "pre_tokenizer"):
            definition[part] = _without_prefix_space(definition.get(part))
        return tokenizers.Tokenizer.from_str(json.dumps(definition))

    def _run(self, backend: tokenizers.Tokenizer, texts: list[str], with_affixes: bool) -> list[list[int]]:
        try:
            return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=with_affixes)]
        except Exception as error:  # the library raises bare Exception
            for text in texts:
                for unknown, place in self._unknown_texts(text):
                    around = text[max(0, place - EXCERPT_CHARACTERS) : place + len(unknown) + EXCERPT_CHARACTERS]
                    code = f" (U+{ord(unknown):04X})" if len(unknown) == 1 else ""
                    raise UnknownTextError(
                        f"the vocabulary of {self._name} has neither a token for {_quoted(unknown)}{code} nor an "
                        f"unknown token; the text has it at character {place + 1}: {_quoted(around)}"
                    ) from error
            raise UserError(f"{self._name} cannot encode a text ({type(error).__name__}: {error})") from error

    def _unknown_texts(self, text: str) -> Iterator[tuple[str, int]]:
        """Characters, or words where the model has words only, that the model refuses, with their offsets."""
        model, pre_tokenizer = self._backend.model, self._backend.pre_tokenizer
        by_character = isinstance(model, models.BPE | models.Unigram)
        pattern = "|".join(map(re.escape, self.added_tokens))
        start = 0
        for stop, following in [*((m.start(), m.end()) for m in re.finditer(pattern, text) if pattern), (len(text), 0)]:
            part = self.normalized(text[start:stop])
            words = pre_tokenizer.pre_tokenize_str(part) if pre_tokenizer else [(part, (0, len(part)))]
            for word, (offset, _) in words:
                for unit in [*word] if by_character else [word]:
                    try:
                        model.tokenize(unit)
                    except Exception:
                        at = text.find(unit, start + offset)  # normalizers shift offsets
                        yield unit, at if at >= 0 else start + offset
            start = following

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


def build_hf_tokenizer(vocab_file: str | None, merge_file: str | None, token: str | None) -> HuggingFaceTokenizer:
    """`HFTokenizer`: vocab_file is a tokenizer.json, merges included, or the folder of a model with a tokenizer.

    Where the folder has none, transformers makes one of its other files, with their added tokens and the beginning of a
    text. Added tokens that the model of the folder has no row for are left out.
    token: None means "<|endoftext|>", or if there is none the `eos_token` of the tokenizer_config.json beside the file.
    Raises UserError for a broken file.
    """
    folder = Path(vocab_file) if vocab_file and is_folder(vocab_file) else None
    content = None if folder is None or is_file(folder / FILE) else _made_by_transformers(folder)
    if folder is not None and content is not None:
        path = folder
    else:
        named = vocab_file if folder is None else str(folder / FILE)
        path = required_file(named, "vocab_file", "HFTokenizer", "a tokenizer.json, or a folder that holds one")
        content, folder = read_text(path, "vocab_file"), path.parent
    try:
        fitting, left_out = _without_tokens_beyond(content, folder / "config.json")
        backend = tokenizers.Tokenizer.from_str(fitting)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f'vocab_file ("{path}") is not a tokenizer.json: {error}') from error
    if token is None and backend.token_to_id(END_OF_DOCUMENT) is None:
        token = _end_of_text(folder / "tokenizer_config.json")
    return HuggingFaceTokenizer(backend, "HFTokenizer", path, content, token or END_OF_DOCUMENT, left_out)


def _made_by_transformers(folder: Path) -> str | None:
    """The tokenizer.json that transformers makes of the files in `folder`; None if there are none. Raises UserError."""
    if not any(all(is_file(folder / name) for name in names) for names in SOURCES):
        return None
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(
            f'vocab_file ("{folder}") has no tokenizer.json; to make one of its other files: pip install '
            "'deepy[convert]'"
        ) from error
    try:
        made = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return str(made.backend_tokenizer.to_str())
    except Exception as error:  # of many kinds, for files that are none and classes that the library does not run
        raise UserError(
            f'vocab_file ("{folder}") has no tokenizer.json, and transformers makes none of its other files '
            f"({first_line(error)})"
        ) from error


def _without_tokens_beyond(content: str, config: Path) -> tuple[str, list[str]]:
    """A tokenizer.json without the added tokens that the model of `config` has no row for, and these tokens.

    Some published tokenizers have such, as Gemma 3's token of an image or a padding that was added later.
    """
    definition, rows = json.loads(content), _rows(config)
    added = definition.get("added_tokens") or []
    beyond = [token["content"] for token in added if rows is not None and token["id"] >= rows]
    if not beyond:
        return content, []
    return json.dumps({**definition, "added_tokens": [token for token in added if token["id"] < rows]}), beyond


def _rows(config: Path) -> int | None:
    """The size of the vocabulary in the config.json of a model, if there is one."""
    if not is_file(config):
        return None
    try:
        keys = json.loads(read_text(config, "the model's config.json"))
        size = keys.get("vocab_size", keys.get("text_config", {}).get("vocab_size"))
    except (ValueError, RecursionError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def _end_of_text(config: Path) -> str | None:
    """The `eos_token` in the settings of a tokenizer."""
    if not is_file(config):
        return None
    try:
        named = json.loads(read_text(config, "the tokenizer's settings"))["eos_token"]
        token = named["content"] if isinstance(named, dict) else named
    except (ValueError, RecursionError, KeyError, TypeError):
        return None  # the message about the default says what to set
    return token if isinstance(token, str) else None


def build_gpt2_bpe_tokenizer(vocab_file: str | None, merge_file: str | None, token: str | None) -> HuggingFaceTokenizer:
    """`GPT2BPETokenizer` and `HFGPT2Tokenizer`: GPT-2's byte-level BPE from its two files.

    vocab_file: vocab.json, or a folder that holds vocab.json and merges.txt. Raises UserError for unreadable files.
    """
    kind = "GPT2BPETokenizer"
    if vocab_file and is_folder(vocab_file):
        folder = Path(vocab_file)
        vocab_file, merge_file = str(folder / "vocab.json"), merge_file or str(folder / "merges.txt")
    vocab = required_file(vocab_file, "vocab_file", kind, "GPT-2's vocab.json (a tokenizer.json goes with HFTokenizer)")
    merges = required_file(merge_file, "merge_file", kind, "GPT-2's merges.txt")
    vocab_text, merges_text = read_text(vocab, "vocab_file"), read_text(merges, "merge_file")
    try:
        backend = tokenizers.Tokenizer(models.BPE(json.loads(vocab_text), _merges(merges_text)))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f'vocab_file ("{vocab}") and merge_file ("{merges}") cannot be read: {error}') from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    token = token or END_OF_DOCUMENT
    if backend.token_to_id(token) is not None:  # declared special, it is kept whole in the text; never added
        backend.add_special_tokens([AddedToken(token, normalized=False)])
    return HuggingFaceTokenizer(backend, kind, vocab, vocab_text + merges_text, token)


def _merges(text: str) -> list[tuple[str, str]]:
    """The pairs of a merges.txt. Raises ValueError."""
    pairs = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        words = line.split(" ")
        if line.startswith("#version"):
            continue
        if len(words) != 2:
            raise ValueError(f"line {number} of the merges is not a pair of tokens")
        pairs.append((words[0], words[1]))
    return pairs


def _affixes(backend: tokenizers.Tokenizer, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor puts before and after those of a text. Raises UserError where it repeats a text.

    Found with a model that has a marker for any text, since a letter may be missing from the file's own vocabulary.
    """
    probe = tokenizers.Tokenizer(models.WordLevel({"text": TEXT_MARKER}, unk_token="text"))
    if backend.post_processor is not None:
        probe.post_processor = backend.post_processor
    ids = probe.encode("text").ids
    if ids.count(TEXT_MARKER) != 1:
        times = ids.count(TEXT_MARKER)
        raise UserError(f"the post_processor of {name} puts each text {times} times into its output; once is needed")
    place = ids.index(TEXT_MARKER)
    return tuple(ids[:place]), tuple(ids[place + 1 :])


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder in a tokenizer.json."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    parts = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders") or ()
    return [step for each in parts for step in _steps(each)]


def _byte_level_alphabet() -> dict[str, int]:
    """The bytes by the characters that GPT-2's vocabulary writes for them: printable Latin-1, then from U+0100 on."""
    printable = [*range(ord("!"), 127), *range(ord("¡"), 173), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _parts_stand_alone(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer.json describes a byte-level BPE that adds and drops nothing."""
    model, steps = definition["model"], _steps(definition.get("pre_tokenizer"))
    plain = model.get("type") == "BPE" and not any(
        model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")
    )
    forms = all(step["type"] in UNICODE_FORMS for step in _steps(definition.get("normalizer")))
    byte_level = bool(steps) and steps[-1]["type"] == "ByteLevel"
    removes = any(step.get("behavior") == "Removed" or step["type"].startswith("Whitespace") for step in steps)
    return plain and forms and byte_level and not removes and not any(step.get("add_prefix_space") for step in steps)


def _without_prefix_space(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer of a tokenizer.json that puts nothing before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    changed = dict(part)
    if changed["type"] == "Metaspace":
        changed["prepend_scheme"] = "never"
        changed.pop("add_prefix_space", None)  # the older spelling of the same
    elif "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    for key in ("normalizers", "pretokenizers"):
        if key in changed:
            changed[key] = [step for step in map(_without_prefix_space, changed[key]) if step is not None]
    return changed


def _decoder_for(definition: dict[str, Any]) -> Any:
    """The decoder that fits a tokenizer.json that names none; None where none does."""
    for step in reversed(_steps(definition.get("pre_tokenizer"))):
        if step["type"] == "ByteLevel":
            return decoders.ByteLevel()
        if step["type"] == "Metaspace":
            scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
            return decoders.Metaspace(step.get("replacement", "\u2581"), scheme)
    if definition["model"].get("type") == "WordPiece":
        return decoders.WordPiece(definition["model"].get("continuing_subword_prefix", "##"), cleanup=False)
    if any(step["type"] == "ByteLevel" for step in _steps(definition.get("normalizer"))):
        return decoders.ByteLevel()
    return None


def _unknown(backend: tokenizers.Tokenizer) -> int | None:
    """The id of the model's unknown token, if it has one."""
    model = backend.model
    if isinstance(model, models.Unigram):
        found: int | None = json.loads(backend.to_str())["model"].get("unk_id")
        return found
    token = getattr(model, "unk_token", None)
    return None if token is None else backend.token_to_id(token)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _special_tokens(backend: tokenizers.Tokenizer) -> list[str]:
    added = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    return added or [token for token in backend.get_vocab() if token.startswith("<") and token.endswith(">")]
