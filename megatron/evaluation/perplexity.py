"""Perplexity of text per token, word and byte.

Shapes: b windows, s sequence.

The tokens are scored in windows of at most s labels. A window begins with the token before its first label, the first
one with an end-of-document token. Each window begins `stride` tokens after the one before it, and what that one scored
is context there, so that each token is scored exactly once: from at most s tokens before it, and from at least
s - stride, except in the first window. With a stride of s the windows are disjoint.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.schema.config import Config
from megatron.data.windows import TokenStream
from megatron.errors import work_begins
from megatron.evaluation.held_out import open_held_out
from megatron.evaluation.text_size import TextSize
from megatron.inference import FoundModel, TrainedModel, open_trained_model
from megatron.progress import Progress
from megatron.units import perplexity

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WindowSettings:
    """labels: of a window. stride: labels that each window but the first adds. batch: windows computed together."""

    labels: int
    stride: int
    batch: int


def measure_perplexity(config: Config, found: FoundModel) -> dict[str, Any]:
    """The figures of each text under `results` by its name, printed as tables too. Collective; for the first rank.

    Raises UserError, before work begins, for text that cannot be read.
    """
    texts = open_held_out(config, found.tokenizer)
    model = open_trained_model(found, config.launcher.distributed_backend)
    sequence = found.plan.batch.sequence_length
    batch = config.batch.train_micro_batch_size_per_gpu or config.generation.generation_batch_size
    windows = WindowSettings(sequence, config.evaluation.eval_stride or sequence, batch)
    results = {}
    with work_begins():
        for text in texts:
            nats = negative_log_likelihood(model, text.stream, windows, text.name)
            if dist.get_rank() == 0:
                size = text.measure()
                results[text.name] = score(nats, size)
                log.info("%s", table(text.name, results[text.name]))
                if size.reason:
                    log.warning("%s", size.reason)
    return {"results": results}


def negative_log_likelihood(
    model: TrainedModel, stream: TokenStream, windows: WindowSettings, name: str = "text"
) -> float:
    """Nats over all tokens of `stream`, which has a name. Collective: data-parallel replicas share the windows."""
    rank, replicas = model.grid.rank("data"), model.grid.size("data")
    total = torch.zeros((), dtype=torch.float64, device=model.grid.device)
    with Progress(f"scoring {name}", stream.num_tokens, "tokens") as progress:
        for number, batch in enumerate(window_batches(stream, windows, model.tokenizer.end_of_document)):
            if number % replicas == rank:
                first = int(batch[1].any(dim=0).int().argmax())  # before it all is context, which needs no head
                ids, weights = (tensor.to(model.grid.device) for tensor in batch)
                hidden = model.hidden_of_documents(ids[:, :-1])[:, first:]
                if model.grid.is_last_stage:
                    total += model.engine.loss(hidden, (ids[:, 1 + first :], weights[:, first:])).double()
            progress.add(int(batch[1].sum()))
    if replicas > 1:
        dist.all_reduce(total, group=model.grid.group("data"))
    return float(model.from_last_stage(total))


def window_batches(stream: TokenStream, windows: WindowSettings, first_token: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids [b, s + 1] and the weight of each label [b, s]: 1, or 0 for context and padding."""
    last = max(0, stream.num_tokens - windows.labels)  # a window that begins there or later is the last one
    starts = range(0, last + windows.stride, windows.stride)
    for begin in range(0, len(starts), windows.batch):
        rows = [_window(stream, start, windows, first_token) for start in starts[begin : begin + windows.batch]]
        yield torch.tensor([ids for ids, _ in rows]), torch.tensor([weights for _, weights in rows])


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


def _window(
    stream: TokenStream, start: int, windows: WindowSettings, first_token: int
) -> tuple[list[int], list[float]]:
    """The token before label number `start` and the labels from there on, and their weights; both padded."""
    before = [first_token] if start == 0 else stream.tokens(start - 1, 1).tolist()
    labels = stream.tokens(start, windows.labels).tolist()
    context = windows.labels - windows.stride if start else 0
    padding = windows.labels - len(labels)
    weights = [0.0] * context + [1.0] * (len(labels) - context) + [0.0] * padding
    return [*before, *labels, *[first_token] * padding], weights
