"""`TiktokenTokenizer`: one of `tiktoken`'s named encodings, or a .tiktoken file.

For a name, tiktoken downloads the ranks once into TIKTOKEN_CACHE_DIR. A file needs no network but contains ranks only:
the pattern that splits text into words and the special tokens come from FAMILIES, by the file's name.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from megatron.errors import UserError
from megatron.files import is_file
from megatron.registry import nearest
from megatron.text_files import read_text
from megatron.tokenizer.base import END_OF_DOCUMENT, Tokenizer, digest, missing_token

KIND = "TiktokenTokenizer"


@dataclass(frozen=True)
class Family:
    """What a .tiktoken file does not contain; without special tokens, `<|endoftext|>` follows the last rank."""

    pattern: str
    special_tokens: tuple[tuple[str, int], ...] = ()


R50K_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_UPPER, _LOWER, _SUFFIX = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
)
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FAMILIES = (
    ("r50k_base", Family(R50K_PATTERN, ((END_OF_DOCUMENT, 50256),))),
    ("p50k_base", Family(R50K_PATTERN, ((END_OF_DOCUMENT, 50256),))),
    (
        "cl100k_base",
        Family(
            CL100K_PATTERN,
            (
                (END_OF_DOCUMENT, 100257),
                ("<|fim_prefix|>", 100258),
                ("<|fim_middle|>", 100259),
                ("<|fim_suffix|>", 100260),
                ("<|endofprompt|>", 100276),
            ),
        ),
    ),
    ("o200k_base", Family(O200K_PATTERN, ((END_OF_DOCUMENT, 199999), ("<|endofprompt|>", 200018)))),
)
OTHER_FAMILY = Family(CL100K_PATTERN)


class TiktokenTokenizer(Tokenizer):
    """A `tiktoken.Encoding` behind Deepy's interface. Special tokens spelled out in the text become those tokens."""

    def __init__(self, encoding: tiktoken.Encoding, token: str) -> None:
        special = {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set}
        if token not in special:
            raise missing_token(token, KIND, special)
        self._encoding = encoding
        self.added_tokens = tuple(special)
        self.pattern = encoding._pat_str  # tiktoken's README documents this attribute
        self.vocab_size = encoding.n_vocab
        self.end_of_document = special[token]
        self._ids = frozenset(special.values()) | {
            encoding.encode_single_token(value) for value in encoding.token_byte_values()
        }
        self._line = f'{KIND} {encoding.name}, {self.vocab_size:,} ids, end of document "{token}" ({special[token]})'
        ranks = b"".join(len(value).to_bytes(2, "little") + value for value in encoding.token_byte_values())
        self.fingerprint = digest(ranks, repr(sorted(special.items())), token)

    def describe(self) -> str:
        """One line for the start of a run."""
        return self._line

    def token_bytes(self) -> list[bytes]:
        """The ranks."""
        found = [b""] * self.vocab_size
        for value in self._encoding.token_byte_values():
            found[self._encoding.encode_single_token(value)] = value
        return found

    def ranks(self) -> list[bytes]:
        """The tokens in the order of their ids, without the special ones. Raises ValueError if the ids have a gap."""
        tokens = {self._encoding.encode_single_token(value): value for value in self._encoding.token_byte_values()}
        if sorted(tokens) != list(range(len(tokens))):
            raise ValueError("the ids of its tokens have a gap")
        return [tokens[rank] for rank in range(len(tokens))]

    def with_ranks(self, tokens: Sequence[bytes]) -> tiktoken.Encoding:
        """An encoding with the same pattern and these tokens."""
        ranks = {token: rank for rank, token in enumerate(tokens)}
        return tiktoken.Encoding("deepy", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={})

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._encoding.encode_batch(texts, num_threads=1, allowed_special="all")

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids, errors="replace")

    def _knows(self, token_id: int) -> bool:
        return token_id in self._ids  # ids between the last rank and the special tokens are unused


def build_tiktoken_tokenizer(vocab_file: str | None, merge_file: str | None, token: str | None) -> TiktokenTokenizer:
    """`TiktokenTokenizer`: vocab_file is the name of an encoding, such as "cl100k_base", or a .tiktoken file.

    Raises UserError for an unknown name, a damaged file, or a name whose ranks cannot be fetched.
    """
    if not vocab_file:
        raise UserError(f"{KIND} needs vocab_file: the name of an encoding, such as cl100k_base, or a .tiktoken file")
    encoding = _from_file(Path(vocab_file)) if is_file(vocab_file) else _from_name(vocab_file)
    return TiktokenTokenizer(encoding, token or END_OF_DOCUMENT)


def write_ranks(path: Path, tokens: Sequence[bytes]) -> None:
    """Write a .tiktoken file; a token's id is its index."""
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))


def _from_name(name: str) -> tiktoken.Encoding:
    names = tiktoken.list_encoding_names()
    if name not in names:
        near = nearest(name, names)
        hint = f'. Did you mean "{near}"?' if near else ""
        raise UserError(
            f'vocab_file ("{name}") is neither a file nor an encoding of tiktoken ({", ".join(names)}){hint}'
        )
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:
        raise UserError(
            f'the encoding "{name}" could not be fetched ({type(error).__name__}): without a network, set vocab_file '
            f"to a copy of {name}.tiktoken, or TIKTOKEN_CACHE_DIR to a folder where tiktoken has kept it"
        ) from error


def _from_file(path: Path) -> tiktoken.Encoding:
    content = read_text(path, "vocab_file")
    family = next((family for name, family in FAMILIES if path.name.startswith(name)), OTHER_FAMILY)
    try:
        ranks = _ranks(content)
        special = dict(family.special_tokens) or {END_OF_DOCUMENT: max(ranks.values()) + 1}
        return tiktoken.Encoding(path.name, pat_str=family.pattern, mergeable_ranks=ranks, special_tokens=special)
    except ValueError as error:
        raise UserError(f'vocab_file ("{path}") is not a .tiktoken file: {error}') from error


def _ranks(content: str) -> dict[bytes, int]:
    """The rank of each token: lines with the token in Base64 and its rank. Raises ValueError."""
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        words = line.split()
        if len(words) == 2 and words[1].isdecimal():
            ranks[base64.b64decode(words[0], validate=True)] = int(words[1])
        elif words:
            raise ValueError(f"line {number} is not a token in Base64 and its rank")
    if not ranks:
        raise ValueError("it has no tokens")
    return ranks
