"""Continue token sequences with a trained model, several at a time.

Shapes: b texts, s columns (the longest text, shorter ones padded on the left), v vocabulary.
Every rank of a tensor-parallel group has the same logits and chooses the same tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.generation.requests import Request, Sampling
from megatron.generation.sampling import Chooser, Row
from megatron.inference import TrainedModel
from megatron.model.cache import KVCache


@dataclass(frozen=True)
class DecodingSettings:
    """maximum_tokens: longest continuation. use_cache: keep keys and values instead of recomputing them."""

    sampling: Sampling
    maximum_tokens: int
    use_cache: bool = True
    keep_logits: bool = False


@dataclass
class Continuation:
    """What was generated for one text, without the end-of-document token."""

    tokens: list[int] = field(default_factory=list)
    finished: bool = False  # the model ended the document itself
    logits: list[list[float]] = field(default_factory=list)  # [v] for each token, if kept


def continue_texts(
    model: TrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: DecodingSettings,
    seeds: Sequence[str],
    is_complete: Callable[[Sequence[int], int], bool] = lambda tokens, generated: False,
) -> list[Continuation]:
    """Generate for each prompt until the end of the document or `maximum_tokens`.

    prompts: ids, at least one each and at most the model's context. seeds: one per prompt; the sampled text depends
    on prompt and seed only. is_complete: whether to stop, given a prompt with its continuation and the number of tokens
    of the latter. Beyond the context each token is predicted from the last `context` tokens, without a cache.
    """
    next_logits = NextLogits(model, settings)
    rows = [
        Row(Request(tuple(prompt), settings.maximum_tokens, settings.sampling, seed, keep_logits=settings.keep_logits))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    chooser = Chooser(model.tokenizer.vocab_size, model.tokenizer.end_of_document)
    found = [Continuation() for _ in rows]
    growing = set(range(len(rows)))
    for _ in range(settings.maximum_tokens):
        for i, token in enumerate(chooser.choose(next_logits([row.ids for row in rows]), rows)):
            rows[i].append(token.id)
            if i not in growing:
                continue
            found[i].finished = token.id == model.tokenizer.end_of_document
            if not found[i].finished:
                found[i].tokens.append(token.id)
                if settings.keep_logits:
                    found[i].logits.append(list(token.logits))
            if found[i].finished or is_complete(rows[i].ids, len(found[i].tokens)):
                growing.remove(i)
        if not growing:
            break
    return found


class NextLogits:
    """Logits of the next token of each text; texts grow by one token per call."""

    def __init__(self, model: TrainedModel, settings: DecodingSettings) -> None:
        """settings: whether to keep keys and values, and for how many more tokens to allocate."""
        self._model = model
        self._use_cache = settings.use_cache
        self._room = settings.maximum_tokens
        self._cache: KVCache | None = None

    def __call__(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Float32 [b, v] for the current texts, which continue those of the last call by one token each."""
        windows = [text[-self._model.context :] for text in texts]
        starts = [len(window) - 1 for window in windows]
        if self._cache is None or max(map(len, texts)) > self._model.context:
            starts = [0] * len(texts)
            room = self._room if self._use_cache else 0
            self._cache = self._model.new_cache(len(texts), min(self._model.context, max(map(len, windows)) + room))
        rows = [list(window[start:]) for window, start in zip(windows, starts, strict=True)]
        sizes = [len(row) for row in rows]
        self._cache.begin_step(range(len(rows)), starts, sizes)
        tokens = torch.tensor([row + [0] * (max(sizes) - len(row)) for row in rows])
        hidden = self._model.hidden(tokens, self._cache)[range(len(rows)), [size - 1 for size in sizes]]
        if not self._use_cache:
            self._cache = None
        return self._model.logits_of(hidden)
