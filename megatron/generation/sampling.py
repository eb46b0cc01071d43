"""The next token from its logits: greedy, temperature, top-k, top-p.

Shapes: b texts, v vocabulary. Pure functions; random numbers are arguments, one for each text and token, so that
samples depend neither on the batch nor on the layout.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. All three 0: greedy.

    temperature: divides the logits; 0 together with top_k or top_p counts as 1, as in GPT-NeoX. top_k: sample from the
    likeliest k tokens only. top_p: from the smallest set of likeliest tokens that reaches this probability
    (https://arxiv.org/abs/1904.09751), applied after top_k. 0 turns top_k or top_p off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0

    @property
    def is_greedy(self) -> bool:
        """Whether no random number is used."""
        return self.temperature == 0 and self.top_k == 0 and self.top_p == 0


def choose(logits: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """The next token of each text: int64 [b].

    logits: [b, v]; -inf is never chosen. draws: [b] in [0, 1), looked up in the cumulative distribution; float64.
    """
    if sampling.is_greedy:
        return logits.argmax(dim=-1)
    cumulative = probabilities(logits, sampling).double().cumsum(dim=-1)
    targets = draws.to(cumulative) * cumulative[:, -1]
    return torch.searchsorted(cumulative, targets[:, None], right=True).squeeze(1)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that is sampled from: float32 [b, v], each row sums to 1."""
    logits = logits.float() / (sampling.temperature or 1.0)
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if 0 < sampling.top_p < 1:
        logits = logits.masked_fill(~_nucleus(logits, sampling.top_p), -torch.inf)
    return logits.softmax(dim=-1)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """True for the fewest likeliest tokens whose probabilities reach `top_p`: bool [b, v]."""
    ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    likelier = (
        ordered.cumsum(dim=-1) - ordered
    )  # probability of the likelier tokens; 0 for the first one, so it always stays
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, likelier < top_p)
