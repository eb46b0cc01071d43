"""evaluate.py: score tasks, or the perplexity of held-out text per token, word and byte.

Shapes: b windows, s sequence.

The tokens of one split of the data are cut into consecutive windows. Each window begins with the last token of the
window before it, the first one with an end-of-document token; the last window may be short. So each token is scored
exactly once, from at most s tokens before it.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.schema.config import Config
from megatron.data.windows import TokenStream
from megatron.engine.distributed import stop
from megatron.errors import UserError, work_begins
from megatron.harness.run import evaluate_tasks
from megatron.inference import FoundModel, TrainedModel, find_trained_model, open_trained_model
from megatron.logging import configure
from megatron.resources import open_data
from megatron.tokenizer.base import Tokenizer, UnknownTextError
from megatron.units import perplexity

log = logging.getLogger(__name__)

PIECE = 1_000_000  # tokens that are decoded together
OVERLAP = 16  # tokens before a piece that tell a decoder how the piece begins
PROBED_CHARACTERS = 10_000


@dataclass(frozen=True)
class TextSize:
    """What was scored.

    words, bytes: of the text; None where the ids do not tell. entropy: of single tokens by their frequency in this
    text, in nats per token. reason: why words or bytes are None.
    """

    tokens: int
    words: int | None
    bytes: int | None
    entropy: float
    reason: str = ""


def evaluate(config: Config) -> None:
    """Evaluate the model in `load`, print a table and write a JSON file. Every rank calls it.

    Raises UserError, before work begins, for a wrong configuration, data, tasks or checkpoint.
    """
    configure(int(os.environ.get("RANK", "0")))
    found = find_trained_model(config)
    target = results_file(config, datetime.now())
    if config.evaluation.eval_tasks:
        evaluate_tasks(config, found, target)
    else:
        measure_perplexity(config, found, target)
    stop()


def measure_perplexity(config: Config, found: FoundModel, target: Path) -> None:
    """Score `eval_split` and write to `target`. Collective."""
    part = config.evaluation.eval_split
    stream = open_data(config, found.tokenizer.vocab_size).part(part)
    model = open_trained_model(found, config.launcher.distributed_backend)
    batch = config.batch.train_micro_batch_size_per_gpu or config.generation.generation_batch_size
    with work_begins():
        nats = negative_log_likelihood(model, stream, found.plan.batch.sequence_length, batch)
        if dist.get_rank() != 0:
            return
        size = measure_text(stream, found.tokenizer)
        results = score(nats, size)
    log.info("%s", table(part, results))
    if size.reason:
        log.warning("%s", size.reason)
    document = {
        "results": {part: results},
        "checkpoint": str(found.checkpoint),
        "tokenizer": found.tokenizer.describe(),
        "config": config.to_flat(),
    }
    target.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    log.info("written to %s", target)


def negative_log_likelihood(model: TrainedModel, stream: TokenStream, sequence: int, batch: int) -> float:
    """Nats over all tokens of `stream`. Collective: data-parallel replicas share the windows.

    sequence: labels of a window. batch: windows computed together.
    """
    rank, replicas = model.grid.rank("data"), model.grid.size("data")
    total = torch.zeros((), dtype=torch.float64, device=model.grid.device)
    first_token = model.tokenizer.end_of_document
    for number, windows in enumerate(window_batches(stream, sequence, batch, first_token)):
        if number % replicas == rank:
            ids, weights = (tensor.to(model.grid.device) for tensor in windows)
            total += model.engine.loss(model.hidden_of_documents(ids[:, :-1]), (ids[:, 1:], weights)).double()
    if replicas > 1:
        dist.all_reduce(total, group=model.grid.group("data"))
    return float(total)


def window_batches(stream: TokenStream, sequence: int, batch: int, first_token: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids [b, s + 1] and the weight of each label [b, s]: 1, or 0 for padding."""
    starts = range(0, stream.num_tokens, sequence)
    for first in range(0, len(starts), batch):
        rows = [_window(stream, start, sequence, first_token) for start in starts[first : first + batch]]
        ids = torch.tensor([row + [first_token] * (sequence + 1 - len(row)) for row in rows])
        weights = torch.tensor([[1.0] * (len(row) - 1) + [0.0] * (sequence + 1 - len(row)) for row in rows])
        yield ids, weights


def measure_text(stream: TokenStream, tokenizer: Tokenizer) -> TextSize:
    """Words (runs without white space) and UTF-8 bytes of the documents' text.

    Tokens that the tokenizer puts around a text and ends of documents are not text.
    """
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    markers = sorted({tokenizer.end_of_document, *tokenizer.affixes[0], *tokenizer.affixes[1]})
    words = size = spaced = 0
    sample = ""
    for before, ids in _texts(stream, markers):
        text = tokenizer.decode_continuation(before, ids)
        begins_within_word = text[:1].strip() and before and tokenizer.decode(before)[-1:].strip()
        words += len(text.split()) - bool(begins_within_word)
        size += len(text.encode())
        spaced += not before and text.startswith(" ") and not text[1:2].isspace()
        if len(sample) < PROBED_CHARACTERS:
            sample += text[:PROBED_CHARACTERS] + "\n"
    for start in range(0, stream.num_tokens, PIECE):
        counts += np.bincount(stream.tokens(start, PIECE), minlength=len(counts))
    unknown = 0 if tokenizer.unknown in (None, *markers) else int(counts[tokenizer.unknown])
    keeps_words, keeps_bytes = (False, False) if unknown else _kept(tokenizer, sample)
    if _begins_with_space(tokenizer, sample):
        size -= spaced
    return TextSize(
        stream.num_tokens,
        words if keeps_words else None,
        size if keeps_bytes else None,
        unigram_entropy(counts),
        _reason(unknown, keeps_words, keeps_bytes),
    )


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that `counts` [v] describe: the loss of predicting by frequency alone."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def score(nats: float, size: TextSize) -> dict[str, float | None]:
    """The figures of the results file. Losses and entropy are in nats per token; perplexity is exp(nats / unit).

    The nats include those of end-of-document tokens and affixes; words and bytes count text only. None: not known.
    """
    per_token = nats / size.tokens
    return {
        "loss": per_token,
        "token_perplexity": perplexity(per_token),
        "word_perplexity": perplexity(nats / size.words) if size.words else None,
        "byte_perplexity": perplexity(nats / size.bytes) if size.bytes else None,
        "bits_per_token": per_token / math.log(2),
        "bits_per_byte": nats / size.bytes / math.log(2) if size.bytes else None,
        "unigram_entropy": size.entropy,
        "unigram_entropy_bits": size.entropy / math.log(2),
        **{name: value for name, value in asdict(size).items() if name not in ("entropy", "reason")},
    }


def table(part: str, results: dict[str, float | None]) -> str:
    """The results as a table."""

    def shown(name: str, form: str) -> str:
        value = results[name]
        return "unknown" if value is None else format(value, form)

    gain = (results["unigram_entropy"] or 0.0) - (results["loss"] or 0.0)
    rows = [
        ("", "token", "word", "byte"),
        (
            "perplexity",
            shown("token_perplexity", ".3f"),
            shown("word_perplexity", ".5g"),
            shown("byte_perplexity", ".4f"),
        ),
        ("bits", shown("bits_per_token", ".4f"), "", shown("bits_per_byte", ".4f")),
        ("nats (loss)", shown("loss", ".4f"), "", ""),
        ("unigram entropy", shown("unigram_entropy", ".4f"), "", ""),
        ("loss is below by", f"{gain:.4f}", "", ""),
    ]
    head = f"{part}: " + ", ".join(f"{shown(name, ',.0f')} {name}" for name in ("tokens", "words", "bytes"))
    lines = [f"  {name:18}{token:>12}{word:>12}{byte:>12}".rstrip() for name, token, word, byte in rows]
    return "\n".join([head, *lines])


def results_file(config: Config, now: datetime) -> Path:
    """`[PREFIX_]eval_results_mm-dd-YYYY-HH-MM-SS.json` in log_dir, else save, else here; a prefix with a folder wins.

    Makes the folder. Raises UserError where it cannot be written.
    """
    prefix = config.evaluation.eval_results_prefix
    name = f"{prefix}_" * bool(prefix) + f"eval_results_{now:%m-%d-%Y-%H-%M-%S}.json"
    base = "" if Path(prefix).parent != Path() else config.logging.log_dir or config.checkpoint.save or ""
    path = Path(base) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the results cannot be written to {path.parent}: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"the results cannot be written to {path.parent}: no permission")
    return path


def _window(stream: TokenStream, start: int, sequence: int, first_token: int) -> list[int]:
    """The labels from `start` on, preceded by the token that the first one is predicted from."""
    if start == 0:
        return [first_token, *stream.tokens(0, sequence).tolist()]
    ids: list[int] = stream.tokens(start - 1, sequence + 1).tolist()
    return ids


def _texts(stream: TokenStream, markers: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The runs of ids between `markers`, each after the last ids of the same run that were given before.

    A run longer than `PIECE` comes in pieces; all but the first one have ids before them.
    """
    before, rest = list[int](), np.zeros(0, dtype=np.int64)
    for start in range(0, stream.num_tokens, PIECE):
        rest = np.concatenate([rest, stream.tokens(start, PIECE)])
        *whole, rest = np.split(rest, np.flatnonzero(np.isin(rest, markers)) + 1)
        for run in whole:
            if len(run) > 1:
                yield before, run[:-1].tolist()
            before = []
        if len(rest) > PIECE:
            yield before, rest.tolist()
            before, rest = rest[-OVERLAP:].tolist(), rest[:0]
    if len(rest):
        yield before, rest.tolist()


def _kept(tokenizer: Tokenizer, sample: str) -> tuple[bool, bool]:
    """Whether a text has as many words, and as many bytes, after it was encoded and decoded.

    Tried with words of `sample`, joined and spaced in several ways. Texts that the vocabulary cannot express tell
    nothing.
    """
    found = list(dict.fromkeys(sample.split()))
    made_up = _begins_with_space(tokenizer, sample)
    keeps_words = keeps_bytes = True
    for one, other in pairwise(found[:50]):
        separators = ("", " ", "  ", ", ", ".", "\n")
        for text in (*(one + space + other for space in separators), f" {one} ", one.upper(), one.lower(), f"{one} é"):
            try:
                ids = tokenizer.encode_bare([text])[0]
            except UnknownTextError:
                continue
            if tokenizer.unknown is not None and tokenizer.unknown in ids:
                continue
            decoded = tokenizer.decode(ids)
            if made_up and not text.startswith(" "):
                decoded = decoded.removeprefix(" ")
            keeps_words &= len(decoded.split()) == len(text.split())
            keeps_bytes &= len(decoded.encode()) == len(text.encode())
    return keeps_words, keeps_bytes


def _begins_with_space(tokenizer: Tokenizer, sample: str) -> bool:
    """Whether the tokenizer puts a space before each text that has none, which stays when the text is decoded."""
    word = next(iter(sample.split()), "")
    return tokenizer.decode(tokenizer.encode_bare([word])[0]) == f" {word}"


def _reason(unknown: int, keeps_words: bool, keeps_bytes: bool) -> str:
    if unknown:
        return f"words and bytes are not known: {unknown:,} tokens stand for text that the vocabulary lacks"
    lost = [name for name, kept in (("words", keeps_words), ("bytes", keeps_bytes)) if not kept]
    if not lost:
        return ""
    return f"{' and '.join(lost)} are not known: this tokenizer changes text, and ids do not tell how it was written"
