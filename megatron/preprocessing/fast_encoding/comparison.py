"""Find out which backend can replace a tokenizer, and for which texts; the outcome is cached.

Outcomes are in the user's cache folder (DEEPY_CACHE, else XDG_CACHE_HOME/deepy, else ~/.cache/deepy), under the
fingerprint of the tokenizer and the versions of the libraries. The folder can be deleted at any time. No torch.
"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron.arrays import flat
from megatron.errors import UserError
from megatron.preprocessing.fast_encoding.backends import (
    BACKENDS,
    Encode,
    Unsupported,
    backend_versions,
    probe_reference,
    token_bytes,
)
from megatron.preprocessing.fast_encoding.borders import borders_are_safe
from megatron.preprocessing.fast_encoding.long_words import safe_runs
from megatron.preprocessing.fast_encoding.probes import (
    Ranges,
    ascii_texts,
    cuts_are_safe,
    different_texts,
    differing_code_points,
    mixed_texts,
    probe_tokens,
    ranges_of,
    union,
)
from megatron.text import well_formed
from megatron.tokenizer.base import Tokenizer, UnknownTextError, digest
from megatron.tokenizer.build import TokenizerSettings
from megatron.tokenizer.huggingface import HuggingFaceTokenizer

CHOICES = ("auto", *BACKENDS, "hf")
SCHEME = "3"  # version of the probes: a change invalidates cached outcomes


@dataclass(frozen=True)
class Comparison:
    """The outcome of comparing a backend with a tokenizer.

    refused: why it cannot be used; None if it can. differing: the code points whose texts go to the reference.
    cuts: long texts can be split into pieces (`text_pieces`). runs: where windows on a long word can meet
    (`long_words`). borders: long texts can be split where no token crosses (`borders`), for other kinds of tokenizers.
    """

    backend: str
    refused: str | None = None
    differing: Ranges = ()
    cuts: bool = False
    runs: tuple[str, ...] = ()
    borders: bool = False


REFERENCE_ALONE = Comparison("hf")


def compare(tokenizer: Tokenizer, backend: str, announce: Callable[[str], None] = lambda line: None) -> Comparison:
    """The outcome for `backend` ("hf" is the reference alone), from the cache if it is there."""
    name = digest(tokenizer.fingerprint, backend, backend_versions(backend), SCHEME)
    kept = _load(name)
    if kept is None:
        found = _compare(tokenizer, backend, announce)
        _store(name, asdict(found))
        return found
    return Comparison(**kept | {"differing": _as_ranges(kept["differing"]), "runs": tuple(kept["runs"])})


def widen(tokenizer: Tokenizer, comparison: Comparison, found: Ranges) -> Comparison:
    """`comparison` with more code points for the reference; cached for later runs."""
    wider = replace(comparison, differing=union(comparison.differing, found))
    name = digest(tokenizer.fingerprint, comparison.backend, backend_versions(comparison.backend), SCHEME)
    _store(name, asdict(wider))
    return wider


def choose(
    settings: TokenizerSettings, backend: str = "auto", announce: Callable[[str], None] = lambda line: None
) -> Comparison:
    """The comparison for the given backend; for "auto" of the fastest one that reproduces the tokenizer.

    Raises UserError when the given backend does not.
    """
    tokenizer = settings()
    outcomes = []
    for name in BACKENDS if backend == "auto" else [backend]:
        outcome = compare(tokenizer, name, announce)
        if outcome.refused is None:
            return outcome
        outcomes.append(f"{name} cannot be used for this tokenizer: {outcome.refused}")
    if backend != "auto":
        raise UserError(f"{outcomes[0]}; --backend auto chooses one that can")
    return compare(tokenizer, "hf", announce)


def _compare(tokenizer: Tokenizer, backend: str, announce: Callable[[str], None]) -> Comparison:
    tokens = probe_tokens()
    try:
        reference = probe_reference(tokenizer, tokens)
    except Unsupported as reason:
        if backend == "hf":
            return Comparison(backend, borders=_affixes_are_at_the_ends(tokenizer) and borders_are_safe(tokenizer))
        return Comparison(backend, refused=str(reason))
    cuts = _affixes_are_at_the_ends(tokenizer) and _leaves_ascii_alone(tokenizer)
    cuts = cuts and cuts_are_safe(reference) and cuts_are_safe(bare_encoder(tokenizer))
    if not cuts and backend != "hf":
        return Comparison(backend, refused="its own library does not split text into independent words")
    runs = safe_runs(token_bytes(tokenizer), bare_encoder(tokenizer), tokenizer.added_tokens) if cuts else ()
    if backend == "hf":
        return Comparison(backend, cuts=cuts, runs=runs)
    try:
        fast, probe = BACKENDS[backend].build(tokenizer), BACKENDS[backend].build(tokenizer, tokens)
    except Unsupported as reason:
        return Comparison(backend, refused=str(reason))
    announce(f"comparing {backend} with the tokenizer's own library on all of Unicode; kept in {folder()}")
    if any(different_texts(reference, probe, ascii_texts())):
        return Comparison(backend, refused=f"{backend} splits ASCII text into other words")
    outcome = Comparison(backend, None, _classes(tokenizer, backend, reference, probe), cuts, runs)
    return _with_vocabulary(tokenizer, fast, outcome)


def _classes(tokenizer: Tokenizer, backend: str, reference: Encode, probe: Encode) -> Ranges:
    """The code points whose classes differ. Slow; depends only on how the tokenizer splits text into words."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        cutting = json.dumps(tokenizer.definition()["pre_tokenizer"])
    else:
        cutting = getattr(tokenizer, "pattern", tokenizer.fingerprint)
    name = digest("classes", type(tokenizer).__name__, cutting, backend, backend_versions(backend), SCHEME)
    kept = _load(name)
    if kept is None:
        kept = {"differing": differing_code_points(reference, probe)}
        _store(name, kept)
    return _as_ranges(kept["differing"])


def _with_vocabulary(tokenizer: Tokenizer, fast: Encode, outcome: Comparison) -> Comparison:
    """Compare with the tokenizer's own vocabulary: the text of every token, and texts of several scripts."""
    words = {well_formed(tokenizer.decode([number])) for number in range(tokenizer.vocab_size)}
    texts = [text for text in words if text and not any(token in text for token in tokenizer.added_tokens)]
    found = [tokenizer.normalized(text) for text in [*texts, *mixed_texts()]]
    different = list(different_texts(bare_encoder(tokenizer), fast, [text for text in found if text]))
    if any(text.isascii() for text in different):
        example = next(text for text in different if text.isascii())
        return replace(outcome, refused=f"{outcome.backend} has other ids for {json.dumps(example[:40])}")
    points = ranges_of(ord(letter) for text in different for letter in text if not letter.isascii())
    return replace(outcome, differing=union(outcome.differing, points))


def bare_encoder(tokenizer: Tokenizer) -> Encode:
    """A tokenizer's `encode_bare`, returning arrays."""
    return lambda texts: flat(tokenizer.encode_bare(texts))


def _affixes_are_at_the_ends(tokenizer: Tokenizer) -> bool:
    """Whether a text's ids are the bare ones between the affixes."""
    text = "The first\nand the second: don't  go!"
    before, after = tokenizer.affixes
    try:
        return tokenizer.encode(text) == [*before, *tokenizer.encode_bare([text])[0], *after]
    except UnknownTextError:
        return False


def _leaves_ascii_alone(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has no normalizer, or NFC, which does not change ASCII or join across a split."""
    normalizer = tokenizer.definition()["normalizer"] if isinstance(tokenizer, HuggingFaceTokenizer) else None
    return normalizer in (None, {"type": "NFC"})


def folder() -> Path:
    """The cache folder."""
    if named := os.environ.get("DEEPY_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepy"


def _load(name: str) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads((folder() / "tokenizers" / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None
    return content


def _store(name: str, content: dict[str, Any]) -> None:
    path = folder() / "tokenizers" / f"{name}.json"
    with suppress(OSError):  # without the cache the next run only takes longer
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(content))
        partial.replace(path)


def _as_ranges(pairs: Sequence[Sequence[int]]) -> Ranges:
    return tuple((start, stop) for start, stop in pairs)
