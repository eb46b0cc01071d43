"""A beam search in the slots of a lane: a text for each beam, of which some change places after each token."""

from collections.abc import Mapping, Sequence

from megatron.generation.beams import BeamSearch
from megatron.generation.requests import Token, Update
from megatron.generation.text import Text
from megatron.model.cache import KVCache

Candidates = list[tuple[int, float]]  # token ids with log-probabilities, the likeliest first


class BeamGroup:
    """The texts of one request. The first one reads the prompt; the others wait until it has."""

    def __init__(self, text: Text, slots: Sequence[int], ends: frozenset[int]) -> None:
        """text: the request's, in the first of `slots`. ends: tokens that end a text."""
        assert text.request.beams is not None
        self.search = BeamSearch(text.request.beams, ends, text.request.maximum_tokens)
        self.texts = {slot: text if slot == slots[0] else text.twin() for slot in slots}
        self._slots, self._running = list(slots), [slots[0]]

    def advance(self, candidates: Mapping[int, Candidates], cache: KVCache) -> Update | None:
        """Go on with the likeliest beams, by the candidates of each slot that computed; the answer when it is known."""
        moves = self.search.advance([candidates[slot] for slot in self._running])
        if self.search.done:
            best = self.search.best()
            return self.texts[self._slots[0]].answered([Token(token) for token in best.ids], best.ended)
        parents = [self._running[parent] for parent, _ in moves]
        self._running = self._slots[: len(moves)]
        computed = self.texts[parents[0]].computed
        cache.copy(parents, self._running, computed)
        rows = [self.texts[parent].row.copy() for parent in parents]
        for slot, row, (_, token) in zip(self._running, rows, moves, strict=True):
            row.append(token)
            self.texts[slot].row, self.texts[slot].computed = row, computed
        for slot in self._slots[len(moves) :]:
            self.texts[slot].rest()
        return None
