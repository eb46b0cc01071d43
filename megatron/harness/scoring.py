"""How likely a model finds given continuations of given tokens.

Shapes: b rows, s columns (the longest row; shorter ones are padded on the right, where no token attends), n tokens of a
continuation, v vocabulary. Independent of the harness.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron.inference import TrainedModel
from megatron.model.gpt import gather_logits

Likelihood = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding gives the same tokens


@dataclass(frozen=True)
class Row:
    """Tokens for one forward pass, and the continuations that are scored from it.

    continuations: each ends one token after `tokens` do, so that its last token is predicted from all of them. Answers
    of one token to the same question share a row.
    """

    tokens: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


def score_rows(model: TrainedModel, rows: Sequence[Row]) -> list[list[Likelihood]]:
    """The likelihood of every continuation of every row. Collective over the tensor-parallel group."""
    width = max(len(row.tokens) for row in rows)
    tokens = torch.tensor([[*row.tokens, *[0] * (width - len(row.tokens))] for row in rows])
    local = model.local_logits_of_documents(tokens)
    return [_score_row(model, row, logits) for row, logits in zip(rows, local, strict=True)]


@torch.inference_mode()
def _score_row(model: TrainedModel, row: Row, local: Tensor) -> list[Likelihood]:
    """local: this rank's shard of the row's logits, [s, v/tp]. Only the scored positions are gathered."""
    end = len(row.tokens)
    asked = local[end - max(map(len, row.continuations)) : end]
    logits = gather_logits(asked, model.grid, model.plan.model.vocab_size).float()
    return [_likelihood(logits[len(logits) - len(ids) :], torch.tensor(ids)) for ids in row.continuations]


def _likelihood(logits: Tensor, ids: Tensor) -> Likelihood:
    """logits: fp32 [n, v]. ids: int64 [n]. The sum is taken in fp64."""
    ids = ids.to(logits.device)
    nats = cross_entropy(logits, ids, reduction="none").double().sum()
    return -float(nats), bool((logits.argmax(dim=-1) == ids).all())
