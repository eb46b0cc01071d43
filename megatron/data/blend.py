"""Blend several corpora in given proportions: compute which corpus sample n of a run comes from.

The weights become integer shares c_i with the sum P, the period. The weight of corpus i is then w_i = c_i / P, and its
j-th sample has the window from its release floor((j - 1) / w_i) to its deadline ceil(j / w_i). Every slot goes to the
sample with the earliest deadline among those that are released and not yet scheduled.

**The bound**: the count of each corpus is always within one sample of its weight: |count_i(n) - w_i n| < 1.
If each slot were divided and gave the fraction w_i to each corpus i, the j-th sample of i would be served exactly
within its window. So by Hall's theorem no interval contains more windows than slots, and whole samples can be scheduled
within their windows too (a fractional matching of a bipartite graph can be made integral). Windows begin and end at
integers and each sample takes one slot, so the earliest-deadline rule finds such a schedule whenever there is one
(Jackson 1955; as a fair schedule: Baruah, Cohen, Plaxton and Varvel, "Proportionate Progress", 1996). Scheduled within
its windows, a corpus has at least floor(w_i n) and at most ceil(w_i n) samples after n slots.

**The cost**: after P samples every count is exact and the order repeats, so sample n is looked up in one period:
O(P log k) once to compute it (2 s at most), O(1) per sample for any n; 6 bytes per slot of a period. Nothing depends on
the number of samples. Shares are exact, and P is small, for weights written with few digits (0.6, 0.3, 0.1: P = 10).
Where P would exceed 2^20, shares are rounded to millionths; `weights` returns the rounded values.

Letters: k corpora, P period. No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from heapq import heappop, heappush
from math import gcd, lcm

import numpy as np
import numpy.typing as npt

from megatron.data.windows import SampleSource, Tokens

LONGEST_PERIOD = 1 << 20


@dataclass(frozen=True)
class Blend:
    """The samples of several corpora, mixed in proportion to `shares` (a `SampleSource`).

    Each corpus numbers its own samples and has its own epochs.
    """

    sources: tuple[SampleSource, ...]
    shares: tuple[int, ...]
    _order: npt.NDArray[np.uint16] = field(init=False, repr=False, compare=False)  # [P] the corpus of each slot
    _number: npt.NDArray[np.int32] = field(init=False, repr=False, compare=False)  # [P] its samples before the slot

    def __post_init__(self) -> None:
        order = earliest_deadlines(self.shares)
        slots = np.argsort(order, kind="stable")
        number = np.empty(len(order), dtype=np.int32)
        number[slots] = np.concatenate([np.arange(share, dtype=np.int32) for share in self.shares])
        object.__setattr__(self, "_order", order)
        object.__setattr__(self, "_number", number)

    @property
    def period(self) -> int:
        """Samples after which the count of each corpus is exact."""
        return len(self._order)

    @property
    def weights(self) -> tuple[float, ...]:
        """The exact proportions, which sum to 1."""
        return tuple(share / self.period for share in self.shares)

    @property
    def num_tokens(self) -> int:
        """Tokens of all corpora."""
        return sum(source.num_tokens for source in self.sources)

    @property
    def samples_per_epoch(self) -> int:
        """Samples after which every corpus has completed at least one epoch."""
        pairs = zip(self.sources, self.shares, strict=True)
        return max(-(-source.samples_per_epoch * self.period // share) for source, share in pairs)

    def __getitem__(self, sample: int) -> Tokens:
        """Sample number `sample` of the run."""
        corpus, number = self.place(sample)
        return self.sources[corpus][number]

    def place(self, sample: int) -> tuple[int, int]:
        """The corpus of sample number `sample`, and the number of the sample within that corpus."""
        period, slot = divmod(sample, self.period)
        corpus = int(self._order[slot])
        return corpus, period * self.shares[corpus] + int(self._number[slot])


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest integers in the proportion of `weights`, which are taken as the decimal numbers they are written as.

    Where the sum would exceed `LONGEST_PERIOD`, the shares are rounded to that many parts, and to at least one.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    unit = lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * unit) for weight in exact]
    if sum(shares) // gcd(*shares) > LONGEST_PERIOD:
        total = sum(shares)
        shares = [max(1, round(Fraction(share * (LONGEST_PERIOD - len(shares)), total))) for share in shares]
    return tuple(share // gcd(*shares) for share in shares)


def earliest_deadlines(shares: Sequence[int]) -> npt.NDArray[np.uint16]:
    """The corpus of each slot of one period, by the rule above; ties go to the first corpus."""
    period = sum(shares)
    order = np.empty(period, dtype=np.uint16)
    scheduled = [0] * len(shares)
    released: list[tuple[int, int]] = []  # (deadline, corpus)
    waiting = [(0, corpus) for corpus in range(len(shares))]  # (release, corpus)
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            corpus = heappop(waiting)[1]
            heappush(released, (-(-(scheduled[corpus] + 1) * period // shares[corpus]), corpus))
        corpus = heappop(released)[1]
        order[slot] = corpus
        scheduled[corpus] += 1
        if scheduled[corpus] < shares[corpus]:
            heappush(waiting, (scheduled[corpus] * period // shares[corpus], corpus))
    return order
