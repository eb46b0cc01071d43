"""A request as it is computed: its tokens, what of them is in the cache, and the text shown so far."""

from collections.abc import Sequence
from time import perf_counter

from megatron.generation.constraints import Matcher
from megatron.generation.requests import Reason, Request, Token, Update
from megatron.generation.sampling import Row
from megatron.generation.stopping import TextStream
from megatron.tokenizer.base import Tokenizer


class Text:
    """One request.

    The model sees a window of the text: all of it, or beyond the context its last `context` tokens, which are then
    computed anew for each token.
    """

    def __init__(
        self, number: int, request: Request, tokenizer: Tokenizer, context: int, matcher: Matcher | None = None
    ) -> None:
        """matcher: of the request's constraint."""
        self.number, self.request = number, request
        self.row = Row(request, matcher)
        self.prompt_length = len(request.ids)
        self.whole = min(context, self.prompt_length + request.maximum_tokens)  # tokens that are ever in the window
        self.computed = 0  # tokens of the window that are in the cache
        self.cached = 0
        self._began: float | None = None  # perf_counter, when it got its slot
        self._context, self._offset = context, 0
        self._end = None if request.ignore_end else tokenizer.end_of_document
        self._end_of_document = tokenizer.end_of_document
        self._stream = TextStream(tokenizer, request.ids, request.stop_strings)
        self._scored: list[Token] = []
        self._tokenizer = tokenizer

    @property
    def ids(self) -> list[int]:
        """The prompt and what follows it."""
        return self.row.ids

    @property
    def slots(self) -> int:
        """Slots that it takes: one, or one for each beam."""
        return 1 if self.request.beams is None else self.request.beams.count

    @property
    def window(self) -> list[int]:
        """The ids that the model sees."""
        return self.ids[self._offset :] if self._offset else self.ids

    @property
    def computed_ids(self) -> list[int]:
        """The ids whose keys and values are in the cache; none where they are not those of the beginning."""
        return [] if self._offset else self.ids[: self.computed]

    @property
    def to_compute(self) -> int:
        """Tokens of the window that are to be computed: of a text that is only scored not the last one."""
        first = self.request.score_from
        if self.request.maximum_tokens == 0:
            return 0 if first is None or first >= len(self.ids) else len(self.ids) - 1 - self.computed
        return len(self.ids) - self._offset - self.computed

    def shares(self, ids: Sequence[int]) -> int:
        """How many of the first tokens are those of `ids`; at least one token stays to be computed."""
        most = len(self.ids) - 1
        if self.request.score_from is not None:
            most = min(most, self.request.score_from - 1)
        return common_length(self.ids[:most], ids)

    def twin(self) -> "Text":
        """Another beam of the same request, which rests."""
        other = Text(self.number, self.request, self._tokenizer, self._context)
        other.rest()
        return other

    def rest(self) -> None:
        """Have nothing to compute."""
        self.computed = len(self.ids)

    def start_at(self, shared: int) -> None:
        """Begin with the first `shared` tokens in the cache."""
        self._began = perf_counter()
        self.computed = self.cached = shared

    def document_starts(self, start: int, size: int) -> list[int]:
        """For each of the tokens of the window from `start` on, where in the window its document begins."""
        found, begins = [], 0
        for place, token in enumerate(self.window[: start + size]):
            if place >= start:
                found.append(begins)
            if token == self._end_of_document:
                begins = place + 1
        return found

    def advance(self, computed: int, chosen: Token | None, scored: Sequence[Token]) -> Update | None:
        """Take the results of a step over the next `computed` tokens of the window; None: no news."""
        self.computed += computed
        self._scored += scored
        if chosen is None:
            return self.ended("length") if self.request.maximum_tokens == 0 and not self.to_compute else None
        if chosen.id == self._end:
            return self.ended("end")
        if chosen.id in self.request.stop_tokens:
            return self.ended("stop")
        self.row.append(chosen.id)
        text = self._stream.push(chosen.id)
        if self._stream.stopped:
            return self._update((chosen,), text, "stop")
        if self.row.finished:
            return self._update((chosen,), text + self._stream.finish(), "end")
        if len(self.ids) - self.prompt_length == self.request.maximum_tokens:
            return self._update((chosen,), text + self._stream.finish(), "length")
        if len(self.ids) - self._offset > self._context:
            self._offset, self.computed = len(self.ids) - self._context, 0
        return self._update((chosen,), text, None)

    def answered(self, tokens: Sequence[Token], ended: bool) -> Update:
        """The answer of a beam search as the only update. ended: whether the model ended it."""
        text = "".join(self._stream.push(token.id) for token in tokens) + self._stream.finish()
        return self._update(tuple(tokens), text, "end" if ended else "length")

    def ended(self, reason: Reason) -> Update:
        """The last update, without a new token."""
        return self._update((), self._stream.finish(), reason)

    def _update(self, tokens: tuple[Token, ...], text: str, reason: Reason | None) -> Update:
        scored, self._scored = tuple(self._scored), []
        cached, self.cached = self.cached, 0
        seconds = 0.0 if reason is None or self._began is None else perf_counter() - self._began
        return Update(self.number, tokens, text, scored, reason, cached, seconds)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many elements at the beginning of two lists are equal, found by comparing halves, which is fast in Python."""
    equal, most = 0, min(len(one), len(other))
    if not most or one[0] != other[0]:
        return 0
    while equal < most:
        middle = (equal + most + 1) // 2
        if one[equal:middle] == other[equal:middle]:
            equal = middle
        else:
            most = middle - 1
    return equal
