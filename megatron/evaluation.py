"""evaluate.py: how well a trained model does at tasks, or predicts held-out text: perplexity per token, word and byte.

Shapes: b windows, s sequence.

The tokens of one part of the data are cut into windows in order, each continuing where the last ended and seeing its
last token first; the first token of all is predicted from an end-of-document token, the last window may be short.
So each token is scored exactly once, from at most s tokens before it.
"""

import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
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
from megatron.model.gpt import make_loss
from megatron.resources import open_data
from megatron.tokenizer.base import Tokenizer
from megatron.units import perplexity

log = logging.getLogger(__name__)

PIECE = 1_000_000  # tokens that are decoded together


@dataclass(frozen=True)
class TextSize:
    """What was scored. entropy: of single tokens by their frequency in this very text, in nats per token."""

    tokens: int
    words: int
    bytes: int
    entropy: float


def evaluate(config: Config) -> None:
    """Measure the model in `load`, print a table and write a JSON file. Every rank calls it.

    Raises UserError, before work begins, for whatever is wrong with configuration, data, tasks or checkpoint.
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
        results = score(nats, measure_text(stream, found.tokenizer))
    log.info("%s", table(part, results))
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
    loss = make_loss(model.plan.model, model.grid)
    rank, replicas = model.grid.rank("data"), model.grid.size("data")
    total = torch.zeros((), dtype=torch.float64, device=model.grid.device)
    first_token = model.tokenizer.end_of_document
    for number, windows in enumerate(window_batches(stream, sequence, batch, first_token)):
        if number % replicas == rank:
            ids, weights = (tensor.to(model.grid.device) for tensor in windows)
            with torch.inference_mode():
                total += loss(model.local_logits_of_documents(ids[:, :-1]), (ids[:, 1:], weights)).double()
    if replicas > 1:
        dist.all_reduce(total, group=model.grid.group("data"))
    return float(total)


def window_batches(stream: TokenStream, sequence: int, batch: int, first_token: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids [b, s + 1] and the weight of each label [b, s]: 1, or 0 where a window is filled up behind its end."""
    starts = range(0, stream.num_tokens, sequence)
    for first in range(0, len(starts), batch):
        rows = [_window(stream, start, sequence, first_token) for start in starts[first : first + batch]]
        ids = torch.tensor([row + [first_token] * (sequence + 1 - len(row)) for row in rows])
        weights = torch.tensor([[1.0] * (len(row) - 1) + [0.0] * (sequence + 1 - len(row)) for row in rows])
        yield ids, weights


def measure_text(stream: TokenStream, tokenizer: Tokenizer) -> TextSize:
    """Words (runs without white space) and UTF-8 bytes of the documents, without end-of-document tokens."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    words = size = 0
    for document in _documents(stream, tokenizer.end_of_document):
        text = tokenizer.decode(document)
        words += len(text.split())
        size += len(text.encode())
    for start in range(0, stream.num_tokens, PIECE):
        counts += np.bincount(stream.tokens(start, PIECE), minlength=len(counts))
    return TextSize(stream.num_tokens, words, size, unigram_entropy(counts))


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that `counts` [v] describe: what predicting by frequency alone would cost."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def score(nats: float, size: TextSize) -> dict[str, float]:
    """The figures of the results file. Losses and entropy are in nats per token; perplexity is exp(nats / unit).

    The nats include what end-of-document tokens cost; words and bytes count text only.
    """
    per_token = nats / size.tokens
    return {
        "loss": per_token,
        "token_perplexity": perplexity(per_token),
        "word_perplexity": perplexity(nats / size.words) if size.words else math.nan,
        "byte_perplexity": perplexity(nats / size.bytes) if size.bytes else math.nan,
        "bits_per_token": per_token / math.log(2),
        "bits_per_byte": nats / size.bytes / math.log(2) if size.bytes else math.nan,
        "unigram_entropy": size.entropy,
        "unigram_entropy_bits": size.entropy / math.log(2),
        **{name: value for name, value in asdict(size).items() if name != "entropy"},
    }


def table(part: str, results: dict[str, float]) -> str:
    """The results for a reader."""
    r = results
    rows = [
        ("", "token", "word", "byte"),
        ("perplexity", f"{r['token_perplexity']:.3f}", f"{r['word_perplexity']:.5g}", f"{r['byte_perplexity']:.4f}"),
        ("bits", f"{r['bits_per_token']:.4f}", "", f"{r['bits_per_byte']:.4f}"),
        ("nats (loss)", f"{r['loss']:.4f}", "", ""),
        ("unigram entropy", f"{r['unigram_entropy']:.4f}", "", ""),
        ("loss is below by", f"{r['unigram_entropy'] - r['loss']:.4f}", "", ""),
    ]
    head = f"{part}: {r['tokens']:,.0f} tokens, {r['words']:,.0f} words, {r['bytes']:,.0f} bytes"
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
    """The labels from `start` on, and before them the token that the first of them is predicted from."""
    if start == 0:
        return [first_token, *stream.tokens(0, sequence).tolist()]
    ids: list[int] = stream.tokens(start - 1, sequence + 1).tolist()
    return ids


def _documents(stream: TokenStream, end: int) -> Iterator[list[int]]:
    """The documents, without the tokens that end them; one longer than `PIECE` comes in pieces."""
    rest = np.zeros(0, dtype=np.int64)
    for start in range(0, stream.num_tokens, PIECE):
        rest = np.concatenate([rest, stream.tokens(start, PIECE)])
        *whole, rest = np.split(rest, np.flatnonzero(rest == end) + 1)
        if len(rest) > PIECE:
            whole, rest = [*whole, rest], rest[:0]
        for document in whole:
            yield document[document != end].tolist()
    if len(rest):
        yield rest[rest != end].tolist()
