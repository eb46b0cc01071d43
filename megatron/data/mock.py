"""`data_impl: mock`: endless text without files, that a model can learn, for trials and benchmarks.

A Markov chain of order one: each token is the one before it plus a small step, modulo the number of symbols. The chance
of each step is fixed, so the best possible loss is known (`BEST_LOSS`), far below that of guessing by frequency.
Block k of a stream depends on the seed, the stream's name and k alone. No torch.
"""

from dataclasses import dataclass
from math import log

import numpy as np

from megatron.data.windows import Tokens, derived_key

SYMBOLS = 128  # ids in use, if the vocabulary has as many
STEPS = (1, 2, 5, 7)
CHANCES = (0.7, 0.15, 0.1, 0.05)
BEST_LOSS = -sum(chance * log(chance) for chance in CHANCES)  # nats per token, 0.91
BLOCK = 4096  # tokens drawn at once


@dataclass(frozen=True)
class MockStream:
    """A stream of `num_tokens` tokens, each below `vocab_size` (a `TokenStream`).

    name: of the part, so that parts differ.
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
        steps = random.choice(STEPS, size=BLOCK, p=CHANCES)
        return np.asarray((random.integers(symbols) + np.cumsum(steps)) % symbols, dtype=np.int64)
