"""Samples from several corpora in given proportions: which corpus sample n of a run comes from, computed.

The weights become whole shares c_i with the sum P, the period. Corpus i, whose weight is then w_i = c_i / P, has its
j-th sample in the window between its release floor((j - 1) / w_i) and its deadline ceil(j / w_i). Every place goes to
the sample with the earliest deadline among those that are released and not yet placed.

**The bound**: at no prefix is a corpus one sample or more off its weight: |count_i(n) - w_i n| < 1.
If every place were divided and gave w_i of itself to each corpus i, the j-th sample of i would be served exactly within
its window. So by Hall's theorem no interval has more windows inside it than places, and whole samples can be placed
within their windows as well (a fractional matching of a bipartite graph can be made whole). Windows begin and end at
whole numbers and each sample takes one place, and then the earliest-deadline rule finds such an order whenever there is
one (Jackson 1955; as a fair schedule: Baruah, Cohen, Plaxton and Varvel, "Proportionate Progress", 1996). Placed within
its windows, a corpus has at least floor(w_i n) and at most ceil(w_i n) samples after n places.

**The cost**: after P samples every count is exact and the order begins again, so sample n is looked up in one period:
O(P log k) once to make it (2 s at most), O(1) for a sample, whatever n is; 6 bytes for each place of a period.
Nothing depends on the number of samples. Shares are exact, and P is small, for weights written with few digits
(0.6, 0.3, 0.1: P = 10). Where P would be above 2^20, shares are rounded to millionths; `weights` tells what they are.

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

    Each corpus counts its own samples and goes through its own epochs.
    """

    sources: tuple[SampleSource, ...]
    shares: tuple[int, ...]
    _order: npt.NDArray[np.uint16] = field(init=False, repr=False, compare=False)  # [P] the corpus of each place
    _number: npt.NDArray[np.int32] = field(init=False, repr=False, compare=False)  # [P] its samples before the place

    def __post_init__(self) -> None:
        order = earliest_deadlines(self.shares)
        places = np.argsort(order, kind="stable")
        number = np.empty(len(order), dtype=np.int32)
        number[places] = np.concatenate([np.arange(share, dtype=np.int32) for share in self.shares])
        object.__setattr__(self, "_order", order)
        object.__setattr__(self, "_number", number)

    @property
    def period(self) -> int:
        """Samples after which each corpus has given exactly its share."""
        return len(self._order)

    @property
    def weights(self) -> tuple[float, ...]:
        """The exact proportions, which add up to 1."""
        return tuple(share / self.period for share in self.shares)

    @property
    def num_tokens(self) -> int:
        """Tokens of all corpora."""
        return sum(source.num_tokens for source in self.sources)

    @property
    def samples_per_epoch(self) -> int:
        """Samples after which every corpus has been seen whole; some will have been seen more than once."""
        pairs = zip(self.sources, self.shares, strict=True)
        return max(-(-source.samples_per_epoch * self.period // share) for source, share in pairs)

    def __getitem__(self, sample: int) -> Tokens:
        """Sample number `sample` of the run."""
        corpus, number = self.place(sample)
        return self.sources[corpus][number]

    def place(self, sample: int) -> tuple[int, int]:
        """The corpus that sample number `sample` comes from, and which of that corpus's samples it is."""
        turn, place = divmod(sample, self.period)
        corpus = int(self._order[place])
        return corpus, turn * self.shares[corpus] + int(self._number[place])


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the proportion of `weights`, as small as they can be.

    A weight is taken as the decimal number that it is written as. Where the sum would be above `LONGEST_PERIOD`, the
    shares are rounded to that many parts, and to at least one.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    unit = lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * unit) for weight in exact]
    if sum(shares) // gcd(*shares) > LONGEST_PERIOD:
        total = sum(shares)
        shares = [max(1, round(Fraction(share * (LONGEST_PERIOD - len(shares)), total))) for share in shares]
    return tuple(share // gcd(*shares) for share in shares)


def earliest_deadlines(shares: Sequence[int]) -> npt.NDArray[np.uint16]:
    """The corpus of each place of one period, by the rule above; of equal deadlines the first corpus goes first."""
    period = sum(shares)
    order = np.empty(period, dtype=np.uint16)
    placed = [0] * len(shares)
    released: list[tuple[int, int]] = []  # (deadline, corpus)
    waiting = [(0, corpus) for corpus in range(len(shares))]  # (release, corpus)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            corpus = heappop(waiting)[1]
            heappush(released, (-(-(placed[corpus] + 1) * period // shares[corpus]), corpus))
        corpus = heappop(released)[1]
        order[place] = corpus
        placed[corpus] += 1
        if placed[corpus] < shares[corpus]:
            heappush(waiting, (placed[corpus] * period // shares[corpus], corpus))
    return order
