"""Beam search: which beams go on with which tokens, and which text is best. The model is elsewhere.

Every choice is that of Transformers, `GenerationMixin._beam_search`.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from operator import attrgetter

from megatron.generation.requests import Beams


@dataclass(frozen=True)
class Hypothesis:
    """A text that is over. ids: without the token that ended it. score: log-likelihood / length^length_penalty.

    The length counts the token that ended it. ended: whether there is one; False: maximum_tokens came first.
    """

    ids: tuple[int, ...]
    score: float
    ended: bool


@dataclass(frozen=True)
class _Beam:
    """A text that may go on. score: its log-likelihood."""

    ids: tuple[int, ...]
    score: float


class BeamSearch:
    """The beams of one request. It begins with one, the prompt; `advance` says which there are after each token."""

    def __init__(self, beams: Beams, ends: AbstractSet[int], maximum_tokens: int) -> None:
        """ends: the tokens that end a text. maximum_tokens: at least 1."""
        self._settings, self._ends, self._maximum = beams, ends, maximum_tokens
        self._running = [_Beam((), 0.0)]
        self._finished: list[Hypothesis] = []  # the best come first
        self.done = False

    @property
    def width(self) -> int:
        """How many of its likeliest tokens `advance` needs of each beam: if all ends are among them, enough go on."""
        return max(2, 1 + len(self._ends)) * self._settings.count

    def advance(self, candidates: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, int]]:
        """The new beams, the likeliest first: the number of the beam that each continues, and its new token.

        candidates: of each beam, in order, the likeliest tokens with their log-probabilities. When `done`, the new
        beams need not be computed.
        """
        length = len(self._running[0].ids) + 1
        pool = [
            (parent, _Beam((*beam.ids, token), beam.score + value))
            for parent, (beam, found) in enumerate(zip(self._running, candidates, strict=True))
            for token, value in found
        ]
        pool = sorted(pool, key=lambda entry: -entry[1].score)[: self.width]
        if not pool:  # a constraint that the vocabulary cannot meet
            self._finish(self._running, length - 1)
            self.done = True
            return []
        going = [(parent, beam) for parent, beam in pool if not self._is_over(beam, length)][: self._settings.count]
        self._finish([beam for _, beam in pool[: self._settings.count] if self._is_over(beam, length)], length)
        self.done = not going or not self._can_improve(going[0][1], length)
        self._running = [beam for _, beam in going]
        return [(parent, beam.ids[-1]) for parent, beam in going]

    def best(self) -> Hypothesis:
        """The best text when `done`."""
        return self._finished[0]

    def _is_over(self, beam: _Beam, length: int) -> bool:
        return length == self._maximum or beam.ids[-1] in self._ends

    def _finish(self, beams: Sequence[_Beam], length: int) -> None:
        """Add texts of `length` tokens to the finished ones, of which the best stay."""
        for beam in beams:
            ended = beam.ids[-1:] != () and beam.ids[-1] in self._ends
            ids = beam.ids[:-1] if ended else beam.ids
            self._finished.append(Hypothesis(ids, self._scored(beam, length), ended))
        self._finished = sorted(self._finished, key=attrgetter("score"), reverse=True)[: self._settings.count]

    def _can_improve(self, likeliest: _Beam, length: int) -> bool:
        """Whether the likeliest running beam, if it ended here, would be better than the worst finished one.

        With early_stopping, once there are as many finished ones as beams, nothing can.
        """
        if len(self._finished) < self._settings.count:
            return True
        return not self._settings.early_stopping and self._scored(likeliest, length) > self._finished[-1].score

    def _scored(self, beam: _Beam, length: int) -> float:
        penalty: float = max(length, 1) ** self._settings.length_penalty
        return beam.score / penalty
