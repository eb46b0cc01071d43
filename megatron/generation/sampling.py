"""The next token of each text from its logits, with the settings of each text.

Shapes: b texts, n of them that a setting concerns, v ids of the tokenizer. Every tensor-parallel rank calls this with
the same bits and must choose the same token: sums whose order a GPU does not fix are sums of integers.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from megatron.generation.constraints import Matcher
from megatron.generation.requests import Request, Sampling, Token

# A probability as an integer: the largest scale for which a sum is exact in float64, where draws are multiplied by it.
CERTAIN = 2**52


class Row:
    """A text while it grows: what the choice of its next token depends on. ids: prompt and text."""

    def __init__(self, request: Request, matcher: Matcher | None = None) -> None:
        """matcher: of the request's constraint."""
        self.request, self._matcher = request, matcher
        self.ids = list(request.ids)
        self._random = Random(request.seed)

    @property
    def generated(self) -> list[int]:
        """The text without the prompt."""
        return self.ids[len(self.request.ids) :]

    @property
    def may_end(self) -> bool:
        """Whether minimum_tokens is reached."""
        return len(self.ids) - len(self.request.ids) >= self.request.minimum_tokens

    @property
    def is_constrained(self) -> bool:
        """Whether `mask` limits its tokens."""
        return self._matcher is not None

    @property
    def finished(self) -> bool:
        """Whether a constraint lets nothing follow but the end of the document."""
        return self._matcher is not None and self._matcher.finished

    def mask(self, ends: Iterable[int]) -> Tensor | None:
        """The tokens that the constraint allows: bool [v]; None: all. Without the `ends` if it is too early for them.

        Where the constraint has nothing but them, they come in spite of minimum_tokens.
        """
        mask = None if self._matcher is None else self._matcher.mask()
        if mask is not None and not self.may_end:
            longer = mask.index_fill(0, torch.tensor([*ends], dtype=torch.int64), False)
            mask = longer if longer.any() else mask
        return mask

    def copy(self) -> "Row":
        """Another row that goes on from here, for a beam search."""
        other = copy(self)
        other.ids, other._matcher = [*self.ids], self._matcher and self._matcher.copy()
        return other

    def draw(self) -> float:
        """The random number of the next token, in [0, 1)."""
        return self._random.random()

    def append(self, token: int) -> None:
        """The text has grown by `token`."""
        self.ids.append(token)
        if self._matcher is not None:
            self._matcher.advance(token)


class Chooser:
    """Chooses the next token of each row of a batch.

    Tensors of settings are kept from call to call while the batch has the same rows in the same order, so batches that
    take turns want a chooser each. Rows that are greedy and ask for nothing else cost one argmax and one copy to host.
    """

    def __init__(self, vocab_size: int, end_of_document: int) -> None:
        """vocab_size: ids of the tokenizer; a model may know more, which nothing in the data has trained."""
        self._vocab_size, self._end = vocab_size, end_of_document
        self._batch: _Batch | None = None

    def choose(self, logits: Tensor, rows: Sequence[Row]) -> list[Token]:
        """The next token of each row, which the caller appends to it. logits: float32 [b, at least v]."""
        logits = logits[:, : self._vocab_size]
        batch = self._batch_of(rows, logits)
        processed = batch.processed(logits)
        chosen = processed.argmax(dim=-1)
        if batch.sampled is not None:
            draws = [row.draw() for row in rows if not row.request.sampling.is_greedy]
            limited = batch.limited(processed[batch.sampled])
            chosen[batch.sampled] = draw(limited, torch.tensor(draws, dtype=torch.float64, device=logits.device))
        batch.count(chosen)
        return _tokens(chosen, logits, rows)

    def candidates(self, logits: Tensor, rows: Sequence[Row], count: int) -> list[list[tuple[int, float]]]:
        """The likeliest tokens of each row, at most `count`, the likeliest first, for a beam search.

        Each with its log-probability after penalties, bias and limits to what may be chosen, as in Transformers; the
        rows stay as they are. logits: float32 [b, at least v].
        """
        logits = logits[:, : self._vocab_size].log_softmax(dim=-1)
        values, ids = self._batch_of(rows, logits).processed(logits).topk(min(count, self._vocab_size), dim=-1)
        return [
            [(token, value) for token, value in zip(*row, strict=True) if value > -math.inf]
            for row in zip(ids.tolist(), values.tolist(), strict=True)
        ]

    def _batch_of(self, rows: Sequence[Row], logits: Tensor) -> "_Batch":
        may_end = [row.may_end for row in rows]
        kept = self._batch
        if kept is None or not kept.has(rows, may_end):
            kept = self._batch = _Batch(rows, may_end, self._end, logits)
        return kept


def score(logits: Tensor, targets: Sequence[int], alternatives: Sequence[int]) -> list[Token]:
    """How likely given tokens are, each with as many of the likeliest ones as asked for. logits: float32 [n, v]."""
    if not targets:
        return []
    log_probabilities = logits.log_softmax(dim=-1)
    best = log_probabilities.topk(min(max(1, *alternatives, 1), logits.shape[-1]), dim=-1)
    columns = (
        log_probabilities.gather(1, torch.tensor(targets, device=logits.device)[:, None])[:, 0].tolist(),
        best.indices.tolist(),
        best.values.tolist(),
    )
    return [
        Token(target, value, likeliest[0] == target, tuple(zip(likeliest[:count], values[:count], strict=True)))
        for target, count, value, likeliest, values in zip(targets, alternatives, *columns, strict=True)
    ]


def draw(logits: Tensor, draws: Tensor) -> Tensor:
    """A token from each distribution softmax(logits): int64 [n].

    logits: float32 [n, v]; -inf is never chosen. draws: float64 [n] in [0, 1), looked up in the cumulative sums.
    """
    cumulative = _integers(logits.softmax(dim=-1)).cumsum(dim=-1)
    targets = (draws * cumulative[:, -1]).long()  # below the sum: float64 rounds down to its last digit here
    return torch.searchsorted(cumulative, targets[:, None], right=True).squeeze(1)


def penalize_repetition(logits: Tensor, penalty: Tensor, counts: Tensor) -> Tensor:
    """penalty: [n, 1]. counts: int32 [n, v], the occurrences of each token in the prompt and the text."""
    return torch.where(counts > 0, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalize_presence(logits: Tensor, presence: Tensor, frequency: Tensor, counts: Tensor) -> Tensor:
    """presence, frequency: [n, 1]. counts: int32 [n, v], the occurrences of each token in the text."""
    return logits - presence * (counts > 0) - frequency * counts


def keep_top_k(logits: Tensor, count: Tensor) -> Tensor:
    """-inf for all but the likeliest `count` (int64 [n, 1]), and those as likely as the last of them."""
    count = count.clamp(max=logits.shape[-1])
    smallest = logits.topk(int(count.max()), dim=-1).values.gather(1, count - 1)
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, share: Tensor) -> Tensor:
    """-inf for all but the fewest likeliest tokens whose probabilities reach `share` (float64 [n, 1])."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    integers = _integers(ordered.softmax(dim=-1))
    cumulative = integers.cumsum(dim=-1)
    kept = cumulative - integers < share * cumulative[:, -1:]  # 0 likelier ones before the first, so it always stays
    return logits.masked_fill(~torch.zeros_like(kept).scatter(1, order, kept), -torch.inf)


def keep_min_p(logits: Tensor, share: Tensor) -> Tensor:
    """-inf for tokens with less than `share` (float32 [n, 1]) of the likeliest one's probability."""
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + share.log(), -torch.inf)


def wrong_settings(sampling: Sampling, vocab_size: int) -> list[str]:
    """A line for each setting outside its range."""
    finite = (sampling.presence_penalty, sampling.frequency_penalty)
    bias = dict(sampling.logit_bias)
    checks = {
        f"repetition_penalty ({sampling.repetition_penalty}) must be a number above 0": (
            0 < sampling.repetition_penalty < math.inf
        ),
        f"presence_penalty and frequency_penalty {finite} must be finite": all(map(math.isfinite, finite)),
        f"logit_bias must add finite numbers to ids from 0 to {vocab_size - 1}": (
            all(map(math.isfinite, bias.values())) and all(0 <= token < vocab_size for token in bias)
        ),
        f"temperature ({sampling.temperature}) must be 0 or a number above": 0 <= sampling.temperature < math.inf,
        f"top_k ({sampling.top_k}) must be 0 (all tokens) or a number above": sampling.top_k >= 0,
        f"top_p ({sampling.top_p}) must be from 0 to 1": 0 <= sampling.top_p <= 1,
        f"min_p ({sampling.min_p}) must be from 0 to 1": 0 <= sampling.min_p <= 1,
    }
    return [line for line, holds in checks.items() if not holds]


@dataclass(frozen=True)
class _Step:
    """A function of the logits of some rows. rows: int64 [n]. arguments: tensors with a first dimension of n."""

    function: Callable[..., Tensor]
    rows: Tensor
    arguments: tuple[Tensor, ...]


class _Batch:
    """The settings of a batch as tensors, and the tokens that its rows have where a penalty asks for them.

    sampled: int64 [n], the rows that are not greedy; None: all are greedy.
    """

    def __init__(self, rows: Sequence[Row], may_end: Sequence[bool], end: int, logits: Tensor) -> None:
        self._rows, self._may_end = list(rows), list(may_end)
        self._lengths = [len(row.ids) for row in rows]
        self._ends = [row.request.stop_tokens | (set() if row.request.ignore_end else {end}) for row in rows]
        self._shape, self._device = logits.shape, logits.device
        self._bias, self._penalties = self._bias_step(), self._penalty_steps()
        sampled = [i for i, row in enumerate(rows) if not row.request.sampling.is_greedy]
        self.sampled = self._tensor(sampled) if sampled else None
        self._limits = self._limit_steps([rows[i].request.sampling for i in sampled])

    def has(self, rows: Sequence[Row], may_end: Sequence[bool]) -> bool:
        """Whether this batch is of these rows, in this order, as they are now."""
        same = len(rows) == len(self._rows) and all(a is b for a, b in zip(rows, self._rows, strict=True))
        return same and self._may_end == may_end and self._lengths == [len(row.ids) for row in rows]

    def processed(self, logits: Tensor) -> Tensor:
        """[b, v] after bias, penalties and constraints."""
        return _after([*self._bias, *self._penalties, *self._mask_step()], logits)

    def limited(self, logits: Tensor) -> Tensor:
        """[n, v] of the sampled rows after temperature and limits."""
        return _after(self._limits, logits)

    def count(self, chosen: Tensor) -> None:
        """The rows are to grow by these tokens: int64 [b]."""
        self._lengths = [length + 1 for length in self._lengths]
        for step in self._penalties:
            ids, counts = chosen[step.rows][:, None], step.arguments[-1]
            counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype))

    def _mask_step(self) -> list[_Step]:
        """The limits of constraints, which change with each token."""
        masks = {i: row.mask(ends) for i, (row, ends) in enumerate(zip(self._rows, self._ends, strict=True))}
        found = {i: mask for i, mask in masks.items() if mask is not None}
        if not found:
            return []
        return [_Step(_only, self._tensor([*found]), (torch.stack([*found.values()]).to(self._device),))]

    def _bias_step(self) -> list[_Step]:
        """What is added to logits: the bias, and -inf to the tokens that would end a text too early."""
        added: list[dict[int, float]] = []
        for row, may_end, ends in zip(self._rows, self._may_end, self._ends, strict=True):
            early = {} if may_end or row.is_constrained else dict.fromkeys(ends, -math.inf)
            added.append(dict(row.request.sampling.logit_bias) | early)
        concerned = [i for i, values in enumerate(added) if values]
        if not concerned:
            return []
        bias = torch.zeros(len(concerned), self._shape[1])
        for n, i in enumerate(concerned):
            bias[n, list(added[i])] = torch.tensor(list(added[i].values()))
        return [_Step(torch.add, self._tensor(concerned), (bias.to(self._device),))]

    def _penalty_steps(self) -> list[_Step]:
        """The last argument of each counts the tokens that `count` adds to."""
        steps = []
        settings = [row.request.sampling for row in self._rows]
        repetition = [i for i, each in enumerate(settings) if each.repetition_penalty != 1]
        if repetition:
            penalty = self._column([settings[i].repetition_penalty for i in repetition])
            counts = self._counts([self._rows[i].ids for i in repetition])
            steps.append(_Step(penalize_repetition, self._tensor(repetition), (penalty, counts)))
        presence = [i for i, each in enumerate(settings) if each.presence_penalty or each.frequency_penalty]
        if presence:
            columns = [
                self._column([settings[i].presence_penalty for i in presence]),
                self._column([settings[i].frequency_penalty for i in presence]),
            ]
            counts = self._counts([self._rows[i].generated for i in presence])
            steps.append(_Step(penalize_presence, self._tensor(presence), (*columns, counts)))
        return steps

    def _limit_steps(self, settings: Sequence[Sampling]) -> list[_Step]:
        """Steps over the sampled rows alone, numbered among themselves."""
        wanted: list[tuple[Callable[..., Tensor], list[float], torch.dtype, float]] = [
            (torch.div, [each.temperature or 1.0 for each in settings], torch.float32, 1.0),
            (keep_top_k, [each.top_k for each in settings], torch.int64, 0),
            (keep_top_p, [each.top_p if each.top_p < 1 else 0 for each in settings], torch.float64, 0),
            (keep_min_p, [each.min_p for each in settings], torch.float32, 0),
        ]
        steps = []
        for function, values, dtype, off in wanted:
            concerned = [n for n, value in enumerate(values) if value != off]
            if concerned:
                argument = self._column([values[n] for n in concerned], dtype)
                steps.append(_Step(function, self._tensor(concerned), (argument,)))
        return steps

    def _counts(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """How often each text has each token: int32 [n, v]. Ids that only the model knows are never chosen."""
        size = self._shape[1]
        counts = [
            torch.tensor([token for token in text if token < size], dtype=torch.int64).bincount(minlength=size)
            for text in texts
        ]
        return torch.stack(counts).to(self._device, torch.int32)

    def _column(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return self._tensor(values, dtype)[:, None]

    def _tensor(self, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


def _after(steps: Sequence[_Step], logits: Tensor) -> Tensor:
    """`logits` after all steps; the argument itself stays as it is."""
    if steps:
        logits = logits.clone()
    for step in steps:
        logits[step.rows] = step.function(logits[step.rows], *step.arguments)
    return logits


def _only(logits: Tensor, allowed: Tensor) -> Tensor:
    """-inf for all but the allowed tokens: bool [n, v]."""
    return logits.masked_fill(~allowed, -torch.inf)


def _integers(probabilities: Tensor) -> Tensor:
    """Probabilities as multiples of 1 / CERTAIN: int64, whose sums are exact in any order."""
    return (probabilities.double() * CERTAIN).long()


def _tokens(chosen: Tensor, logits: Tensor, rows: Sequence[Row]) -> list[Token]:
    """The chosen tokens (int64 [b]) with what each request wants to know. logits: of the model, [b, v]."""
    ids = chosen.tolist()
    reported = [i for i, row in enumerate(rows) if row.request.alternatives is not None or row.request.keep_logits]
    if not reported:
        return [Token(token) for token in ids]
    tokens = {i: Token(ids[i]) for i in range(len(rows))}
    asked = [i for i, row in enumerate(rows) if row.request.alternatives is not None]
    if asked:
        own, picked = logits[asked], chosen[asked]
        log_probabilities = own.log_softmax(dim=-1)
        most = min(max(rows[i].request.alternatives or 0 for i in asked), own.shape[-1])
        best = log_probabilities.topk(max(most, 1), dim=-1)
        columns = (
            log_probabilities.gather(1, picked[:, None])[:, 0].tolist(),
            (own.argmax(dim=-1) == picked).tolist(),
            best.indices.tolist(),
            best.values.tolist(),
        )
        for i, value, greedy, likeliest, values in zip(asked, *columns, strict=True):
            count = rows[i].request.alternatives or 0
            alternatives = tuple(zip(likeliest[:count], values[:count], strict=True))
            tokens[i] = Token(ids[i], value, greedy, alternatives)
    return [
        replace(tokens[i], logits=tuple(logits[i].tolist())) if row.request.keep_logits else tokens[i]
        for i, row in enumerate(rows)
    ]
