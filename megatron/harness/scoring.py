"""How likely a model finds given continuations of given tokens.

Shapes: n scored positions or tokens. Rows are padded on the right, where no token attends. Independent of the harness.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.inference import TrainedModel

POSITIONS = 1024  # 0.2 GB of fp32 logits at a vocabulary of 50k

Likelihood = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding gives the same tokens


@dataclass(frozen=True)
class Row:
    """Tokens for one forward pass, and the continuations that are scored from it.

    continuations: each ends one token after `tokens` do, so that its last token is predicted from all of them. Answers
    of one token to the same question share a row.
    """

    tokens: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


@torch.inference_mode()
def score_rows(model: TrainedModel, rows: Sequence[Row]) -> list[list[Likelihood]]:
    """The likelihood of every continuation of every row. Collective over the tensor-parallel group.

    Logits are computed of the scored positions only, `POSITIONS` of them at a time.
    """
    width = max(len(row.tokens) for row in rows)
    hidden = model.hidden_of_documents(torch.tensor([[*row.tokens, *[0] * (width - len(row.tokens))] for row in rows]))
    positions, answers = _positions_and_answers(rows)
    nats, greedy = torch.zeros(len(answers), dtype=torch.float64), torch.zeros(len(answers), dtype=torch.bool)
    for number, part in enumerate(positions.split(POSITIONS) if model.grid.is_last_stage else ()):
        logits = model.logits_of(hidden[part.to(hidden.device).unbind(1)])
        here = answers[:, 0] // POSITIONS == number
        position, token = answers[here].to(hidden.device).unbind(1)
        position = position % POSITIONS
        nats[here] = logits.log_softmax(-1)[position, token].double().cpu()
        greedy[here] = (logits.argmax(-1)[position] == token).cpu()
    nats, greedy = model.from_last_stage(torch.stack((nats, greedy.double())).to(hidden.device)).cpu().unbind()
    lengths = [len(ids) for row in rows for ids in row.continuations]
    scores = iter(
        [(float(n.sum()), bool(g.all())) for n, g in zip(nats.split(lengths), greedy.split(lengths), strict=True)]
    )
    return [[next(scores) for _ in row.continuations] for row in rows]


def _positions_and_answers(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """The scored positions (row, column) [n, 2], each once, and for each token of each continuation its position's
    number and its id.
    """
    positions: list[tuple[int, int]] = []
    answers: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        end = len(row.tokens)
        positions += [(number, column) for column in range(end - max(map(len, row.continuations)), end)]
        for ids in row.continuations:
            answers += enumerate(ids, start=len(positions) - len(ids))
    return torch.tensor(positions), torch.tensor(answers)
