"""Continuous batching on one replica: requests wait, take a slot of the cache, are read, grow, and leave.

Shapes: b rows of a step, s columns, n positions whose logits are needed, v vocabulary.
All ranks of a replica run the same schedule on the same requests: it depends on nothing but their order and the tokens
chosen, which the last stage of a pipeline sends to the others. In a pipeline there is a lane for each stage, so that
all stages have work; see engine.py.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.generation.beam_group import BeamGroup, Candidates
from megatron.generation.constraints import Constraints
from megatron.generation.messages import Messages
from megatron.generation.requests import Request, Token, Update
from megatron.generation.sampling import Chooser, score
from megatron.generation.text import Text
from megatron.inference import TrainedModel

SHORTEST_SHARED = 16  # tokens; reading fewer again is as fast as copying them
LOOKED_AT = 4  # waiting requests for each slot
SCORED_AT_ONCE = 1024  # positions: 0.2 GB of fp32 logits at a vocabulary of 50k


@dataclass(frozen=True)
class Row:
    """What a step computes of one text: the tokens at positions start to start + size - 1 of its slot."""

    slot: int
    text: Text
    start: int
    size: int

    @property
    def samples(self) -> bool:
        """Whether the step ends with the last token there is, so that the next one is chosen."""
        return self.start + self.size == len(self.text.window) and self.text.request.maximum_tokens > 0

    @property
    def scored(self) -> range:
        """Columns of the step from which a token of the prompt is predicted whose score is asked for."""
        first = self.text.request.score_from
        if first is None:
            return range(0)
        return range(max(0, first - 1 - self.start), min(self.size, self.text.prompt_length - 1 - self.start))


@dataclass(frozen=True)
class Outcome:
    """Results of a step.

    chosen: of each row that samples the next token, or in a beam search its candidates. scored: tokens of each row.
    """

    chosen: list[Token | Candidates]
    scored: list[list[Token]]


class Lane:
    """Slots, and the requests that wait for one."""

    def __init__(
        self,
        model: TrainedModel,
        messages: Messages,
        constraints: Constraints,
        slots: int,
        capacity: int,
        chunk: int,
    ) -> None:
        """slots: texts at once. capacity: tokens of each, prompt included. chunk: most tokens read in one step."""
        self._model, self._messages, self._constraints = model, messages, constraints
        self._chunk = min(chunk, capacity)
        group = model.grid.group("pipe")
        self._stages = [dist.get_global_rank(group, stage) for stage in range(model.grid.size("pipe"))]
        self._cache = model.new_cache(slots, capacity, self._chunk)
        self._texts: list[Text | None] = [None] * slots
        self._held: list[list[int]] = [[] for _ in range(slots)]  # tokens that a free slot still has
        self._freed = list(range(-slots, 0))  # when a slot became free: the one free for longest is taken first
        self._steps = 0
        self._waiting: deque[Text] = deque()
        self._groups: dict[int, BeamGroup] = {}  # by the number of the request
        vocabulary = model.tokenizer.vocab_size, model.tokenizer.end_of_document
        self._choosers = {reading: Chooser(*vocabulary) for reading in (False, True)}
        self._beams = Chooser(*vocabulary)
        self._read_last = False
        self._step: tuple[list[Row], Outcome | None] = ([], None)
        self._news: list[Update] = []
        scaling = model.plan.model.rope_scaling
        self._whole_matters = scaling is not None and scaling.kind in ("dynamic", "longrope")
        self._replays = model.engine.replays and not self._whole_matters

    def __len__(self) -> int:
        """Slots."""
        return len(self._texts)

    @property
    def in_use(self) -> int:
        """Slots that hold a text."""
        return sum(text is not None for text in self._texts)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    def add(self, number: int, request: Request) -> None:
        """Queue a request."""
        matcher = None if request.constraint is None else self._constraints.matcher(request.constraint)
        self._waiting.append(Text(number, request, self._model.tokenizer, self._model.context, matcher))

    def cancel(self, number: int) -> None:
        """End a request, if it is here; its last update says so. Not between `begin` and `finish`."""
        for waiting in [text for text in self._waiting if text.number == number]:
            self._waiting.remove(waiting)
            self._news.append(waiting.ended("cancelled"))
        slots = [slot for slot, text in enumerate(self._texts) if text is not None and text.number == number]
        for text in filter(None, (self._texts[slot] for slot in slots[:1])):
            self._news.append(text.ended("cancelled"))
        for slot in slots:
            self._free(slot)

    def begin(self) -> None:
        """Give free slots to requests that wait, and start to compute the next step, if there is anything to do."""
        self._admit()
        rows = self._next_rows()
        self._steps += 1
        self._step = rows, self._compute(rows) if rows else None

    def finish(self) -> list[Update]:
        """Wait for the step that `begin` started; news of its texts."""
        rows, outcome = self._step
        if rows:
            self._take(rows, outcome or self._messages.receive(self._stages[-1]))
        self._step, news, self._news = ([], None), self._news, []
        return news

    def _admit(self) -> None:
        passed: list[Text] = []  # what they share with others is being read now
        while self._waiting and len(passed) < LOOKED_AT * len(self._texts):
            if len(self._free_slots()) < self._waiting[0].slots:
                break
            text = self._waiting.popleft()
            if not text.to_compute:
                self._news.append(text.ended("length"))
            elif not self._place(text):
                passed.append(text)
        self._waiting.extendleft(reversed(passed))

    def _place(self, text: Text) -> bool:
        """Give `text` a slot, with what it shares with another text; False if that is being read now."""
        slots = range(len(self._texts))
        source = max(slots, key=lambda slot: self._shares(text, slot))
        shared = self._shares(text, source)
        reading = max((text.shares(other.window) for other in self._texts if other is not None), default=0)
        if reading >= shared + SHORTEST_SHARED:
            return False
        if shared < SHORTEST_SHARED:
            shared = 0
        slot, *others = self._free_slots()[: text.slots]
        if shared and slot != source:
            self._cache.copy([source], [slot], shared)
        text.start_at(shared)
        self._texts[slot] = text
        if others:
            group = self._groups[text.number] = BeamGroup(text, [slot, *others], self._ends(text.request))
            for other in others:
                self._texts[other] = group.texts[other]
        return True

    def _free_slots(self) -> list[int]:
        """The slot that has been free for longest first: what it holds is the least likely to be asked for again."""
        free = [slot for slot, text in enumerate(self._texts) if text is None]
        return sorted(free, key=lambda slot: self._freed[slot])

    def _ends(self, request: Request) -> frozenset[int]:
        end = () if request.ignore_end else (self._model.tokenizer.end_of_document,)
        return request.stop_tokens.union(end)

    def _shares(self, text: Text, slot: int) -> int:
        """Tokens at the beginning of `text` that a slot has computed and still holds."""
        other = self._texts[slot]
        held = self._held[slot] if other is None else other.computed_ids
        shared = text.shares(held)
        if self._whole_matters and (other is None or other.whole != text.whole):
            return 0
        return shared if self._cache.can_copy(slot, shared) else 0

    def _next_rows(self) -> list[Row]:
        """Texts with more than one token to compute are read, some at a time; the others grow, all in one step."""
        rows = [
            Row(slot, text, text.computed, min(text.to_compute, self._chunk))
            for slot, text in enumerate(self._texts)
            if text is not None and text.to_compute
        ]
        growing = [row for row in rows if row.size == 1]
        reading = sorted((row for row in rows if row.size > 1), key=lambda row: row.text.number)
        self._read_last = bool(reading) and not (growing and self._read_last)
        if not self._read_last:
            return growing
        chosen = [reading[0]]
        for row in reading[1:]:
            if row.size <= chosen[0].size and (len(chosen) + 1) * chosen[0].size <= self._chunk:
                chosen.append(row)
        return sorted(chosen, key=lambda row: row.slot)

    def _compute(self, rows: Sequence[Row]) -> Outcome | None:
        """Run the model; the outcome in the last stage, which sends it to the others."""
        hidden = self._hidden(rows)
        if not self._model.grid.is_last_stage:
            return None
        outcome = Outcome(self._chosen(hidden, rows), self._scores(hidden, rows))
        self._messages.send(outcome, self._stages[:-1])
        return outcome

    def _chosen(self, hidden: Tensor, rows: Sequence[Row]) -> list[Token | Candidates]:
        """The next tokens, and candidates for those of beam searches."""
        chooser, found = self._choosers[self._read_last], dict[int, Token | Candidates]()
        sampling = [number for number, row in enumerate(rows) if row.samples]
        groups = {number: self._groups.get(rows[number].text.number) for number in sampling}
        if plain := [number for number in sampling if groups[number] is None]:
            logits = self._logits(hidden, [(number, rows[number].size - 1) for number in plain])
            found |= zip(plain, chooser.choose(logits, [rows[number].text.row for number in plain]), strict=True)
        for number, group in groups.items():
            if group is not None:
                logits = self._logits(hidden, [(number, rows[number].size - 1)])
                [found[number]] = self._beams.candidates(logits, [rows[number].text.row], group.search.width)
        return [found[number] for number in sampling]

    def _hidden(self, rows: Sequence[Row]) -> Tensor:
        """The input of the head, [b, s, h]."""
        width = max(row.size for row in rows)
        fixed = self._replays and width == 1
        wanted = [row.slot for row in rows]
        slots, places = slots_of_replayed_step(wanted, len(self)) if fixed else slots_of_step(wanted)
        known = dict(zip(places, rows, strict=True))
        tokens = torch.zeros(len(slots), width, dtype=torch.int64)
        documents = tokens.clone() if self._model.plan.model.keeps_documents_apart else None
        for place, row in known.items():
            tokens[place, : row.size] = torch.tensor(row.text.window[row.start : row.start + row.size])
            if documents is not None:
                documents[place, : row.size] = torch.tensor(row.text.document_starts(row.start, row.size))
        every = [known.get(place) for place in range(len(slots))]
        self._cache.begin_step(
            slots,
            [0 if row is None else row.start for row in every],
            [0 if row is None else row.size for row in every],
            lengths=[(row or rows[0]).text.whole for row in every],
            document_start=documents,
            fixed=fixed,
        )
        hidden = self._model.hidden(tokens, self._cache)
        return hidden if len(slots) == len(rows) else hidden[places]

    def _logits(self, hidden: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
        """Float32 [n, v] at (row, column), of the ids that the tokenizer has.

        A model may know more, which nothing in the data has trained.
        """
        return self._all_logits(hidden, places)[:, : self._model.tokenizer.vocab_size]

    def _all_logits(self, hidden: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
        """Float32 [n, v] at (row, column), of all ids that the model has: its distribution is over all of them."""
        if hidden.shape[1] == 1 and len(places) == hidden.shape[0]:
            return self._model.logits_of(hidden.squeeze(1))
        rows, columns = torch.tensor(places, dtype=torch.int64, device=hidden.device).view(-1, 2).unbind(1)
        return self._model.logits_of(hidden[rows, columns])

    def _scores(self, hidden: Tensor, rows: Sequence[Row]) -> list[list[Token]]:
        places = [(number, column) for number, row in enumerate(rows) for column in row.scored]
        targets = [rows[number].text.window[rows[number].start + column + 1] for number, column in places]
        wanted = [rows[number].text.request.alternatives or 0 for number, _ in places]
        tokens: list[Token] = []
        for first in range(0, len(places), SCORED_AT_ONCE):
            part = slice(first, first + SCORED_AT_ONCE)
            tokens += score(self._all_logits(hidden, places[part]), targets[part], wanted[part])
        found = iter(tokens)
        return [[next(found) for _ in row.scored] for row in rows]

    def _take(self, rows: Sequence[Row], outcome: Outcome) -> None:
        chosen = iter(outcome.chosen)
        candidates: dict[int, dict[int, Candidates]] = {}  # by request and slot
        for row, scored in zip(rows, outcome.scored, strict=True):
            found = next(chosen) if row.samples else None
            if isinstance(found, list):
                candidates.setdefault(row.text.number, {})[row.slot] = found
                found = None
            update = row.text.advance(row.size, found, scored)
            if update is not None:
                self._news.append(update)
            if update is not None and update.reason is not None:
                self._free(row.slot)
        for number, of_slots in candidates.items():
            group = self._groups[number]
            answer = group.advance(of_slots, self._cache)
            if answer is not None:
                self._news.append(answer)
                for slot in group.texts:
                    self._free(slot)

    def _free(self, slot: int) -> None:
        text = self._texts[slot]
        assert text is not None
        self._groups.pop(text.number, None)
        self._texts[slot], self._held[slot], self._freed[slot] = None, text.computed_ids, self._steps


def slots_of_step(wanted: list[int]) -> tuple[list[int], list[int]]:
    """The slots of a step with the `wanted` ones, ascending, and where each of these is among them.

    The keys of slots in a row are used where they are, those of others are copied. So the slots between are computed
    as well, for nothing, if they are no more than the wanted ones.
    """
    between = list(range(wanted[0], wanted[-1] + 1))
    if len(between) > 2 * len(wanted):
        return wanted, list(range(len(wanted)))
    return between, [slot - wanted[0] for slot in wanted]


def slots_of_replayed_step(wanted: list[int], slots: int) -> tuple[list[int], list[int]]:
    """All slots up to the last wanted one and beyond, to a power of two, so that few forms of a step occur."""
    return list(range(min(slots, 1 << wanted[-1].bit_length()))), wanted
