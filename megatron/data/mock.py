"""`data_impl: mock`: synthetic, learnable tokens without files, for trials and benchmarks.

A Markov chain of order one: each token is the previous one plus a small step, modulo the number of symbols. The
probability of each step is fixed, so the best possible loss is known (`BEST_LOSS`), far below the unigram entropy.
Block k of a stream depends only on the seed, the stream's name and k. No torch.
"""

from dataclasses import dataclass
from math import log

import numpy as np

from megatron.data.windows import Tokens, derived_key

SYMBOLS = 128  # ids in use, if the vocabulary is that large
STEPS = (1, 2, 5, 7)
PROBABILITIES = (0.7, 0.15, 0.1, 0.05)
BEST_LOSS = -sum(probability * log(probability) for probability in PROBABILITIES)  # nats per token, 0.91
BLOCK = 4096  # tokens drawn at once


@dataclass(frozen=True)
class MockStream:
    """A stream of `num_tokens` tokens, each below `vocab_size` (a `TokenStream`).

    name: of the part; parts have different tokens.
    """

    name: str
    num_tokens: int
    vocab_size: int
    seed: int

    def tokens(self, start: int, length: int) -> Tokens:
        """Tokens `start` .. `start + length`."""
        stop = min(start + length, self.num_tokens)
        first, last = start // BLOCK, max(start, stop - 1) // BLOCK
        text = np.concatenate([self._block(block) for block in range(first, last + 1)])
        return text[start - first * BLOCK : stop - first * BLOCK]

    def _block(self, block: int) -> Tokens:
        random = np.random.default_rng(derived_key(self.seed, self.name, block))
        symbols = min(SYMBOLS, self.vocab_size)
        steps = random.choice(STEPS, size=BLOCK, p=PROBABILITIES)
        return np.asarray((random.integers(symbols) + np.cumsum(steps)) % symbols, dtype=np.int64)
