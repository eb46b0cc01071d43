"""The decoding engine: requests in, tokens out as they come, on every layout.

Rank 0 takes requests and gives news; the other ranks follow. Data-parallel replicas have requests of their own. In a
pipeline each replica has a lane of slots for each stage: while a stage computes a step of one lane, the others compute
steps of other lanes.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import psutil
import torch
import torch.distributed as dist

from megatron.errors import UserError
from megatron.generation.constraints import Constraints
from megatron.generation.lane import Lane
from megatron.generation.messages import Messages
from megatron.generation.requests import Answer, Request, Update
from megatron.generation.sampling import wrong_settings
from megatron.inference import TrainedModel
from megatron.model.cache import bytes_of_slot

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.8  # of what is free, for keys and values; the rest is for activations and logits


@dataclass(frozen=True)
class EngineSettings:
    """slots: texts at once, per replica. capacity: tokens of a text, prompt included. chunk: most read in one step."""

    slots: int
    capacity: int
    chunk: int = 512


@dataclass
class _Commands:
    """What rank 0 tells the others before a round. added: (replica, lane, number, request)."""

    added: list[tuple[int, int, int, Request]] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    closing: bool = False


class Engine:
    """Continuous batching over all ranks."""

    def __init__(self, model: TrainedModel, settings: EngineSettings, messages: Messages | None = None) -> None:
        """Allocate the slots, as many as asked for and as fit into free memory. Collective.

        messages: those of an engine before this one, whose process group serves again; None: a new one.
        """
        self._model, self._settings = model, settings
        self._messages = messages or Messages()
        self._constraints = Constraints(model.tokenizer)
        lanes = model.grid.size("pipe")
        slots = self._fitting_slots()
        self._lanes = [
            Lane(model, self._messages, self._constraints, max(1, slots // lanes), settings.capacity, settings.chunk)
            for _ in range(lanes)
        ]
        self._commands = _Commands()
        self._places: dict[int, tuple[int, int]] = {}  # replica and lane of each unfinished request
        self._loads = {(replica, lane): 0 for lane in range(lanes) for replica in range(self._replicas)}
        self._last = 0

    def check(self, request: Request) -> None:
        """Raise UserError for what this engine cannot compute."""
        problems = []
        if not request.ids:
            problems.append("a prompt has no tokens")
        if len(request.ids) - (request.maximum_tokens == 0) > self._model.context:
            problems.append(
                f"a prompt has {len(request.ids)} tokens; the model's context is {self._model.context} "
                "(max_position_embeddings)"
            )
        needed = min(self._model.context, len(request.ids) + request.maximum_tokens)
        if needed > self._settings.capacity:
            problems.append(
                f"{len(request.ids)} tokens of a prompt and up to {request.maximum_tokens} of its answer do not fit: a "
                f"text has at most {self._settings.capacity} tokens"
            )
        problems += wrong_settings(request.sampling, self._model.tokenizer.vocab_size)
        problems += self._beam_problems(request)
        if problems:
            raise UserError(*problems)
        if request.constraint is not None:
            self._constraints.matcher(request.constraint)

    def _beam_problems(self, request: Request) -> list[str]:
        if request.beams is None:
            return []
        count, slots = request.beams.count, len(self._lanes[0])
        checks = {
            f"{count} beams do not fit into the {slots} texts that are computed at once": 2 <= count <= slots,
            "a beam search takes the likeliest tokens: temperature, top_k, top_p and min_p must be 0": (
                request.sampling.is_greedy
            ),
            "a beam search gives the text alone: no stop strings, log-probabilities and logits": not (
                request.stop_strings or request.alternatives is not None or request.keep_logits
            ),
            "a beam search cannot go beyond the model's context": (
                len(request.ids) + request.maximum_tokens <= self._model.context and request.maximum_tokens > 0
            ),
        }
        return [line for line, holds in checks.items() if not holds]

    def submit(self, request: Request) -> int:
        """Queue a request, on rank 0; its number. Raises UserError; see `check`."""
        self.check(request)
        self._last += 1
        place = min(self._loads, key=lambda place: self._loads[place])
        self._loads[place] += 1
        self._places[self._last] = place
        self._commands.added.append((*place, self._last, request))
        return self._last

    def cancel(self, number: int) -> None:
        """End a request, on rank 0, in the next round. One that has ended is ignored."""
        if number in self._places:
            self._commands.cancelled.append(number)

    @property
    def is_idle(self) -> bool:
        """Whether no request is unfinished, on rank 0."""
        return not self._places

    @property
    def slots(self) -> int:
        """Texts that all replicas compute at once."""
        return sum(len(lane) for lane in self._lanes) * self._replicas

    @property
    def slots_in_use(self) -> int:
        """Slots that hold a text, of this replica."""
        return sum(lane.in_use for lane in self._lanes)

    @property
    def waiting(self) -> int:
        """Unfinished requests without a slot, on rank 0: of one replica, those that have none."""
        return max(0, len(self._places) - self.slots_in_use * self._replicas)

    def step(self) -> list[Update]:
        """One round of work, on rank 0: a step of each lane. News of all requests; none if nothing is to do."""
        if self.is_idle:
            return []
        commands, self._commands = self._commands, _Commands()
        updates = self._round(self._told(commands))
        for update in updates:
            if update.reason is not None:
                self._loads[self._places.pop(update.request)] -= 1
        return updates

    def run(self, requests: Iterable[Request], on_update: Callable[[Update], None] | None = None) -> list[Answer]:
        """Answer all requests, on rank 0; the answers in order."""
        numbers = [self.submit(request) for request in requests]
        answers = {number: Answer() for number in numbers}
        while not self.is_idle:
            for update in self.step():
                answers[update.request].add(update)
                if on_update is not None:
                    on_update(update)
        return [answers[number] for number in numbers]

    def follow(self) -> None:
        """Take part in the rounds of rank 0 until it closes the engine, on the other ranks."""
        while not (commands := self._told(_Commands())).closing:
            self._round(commands)

    def close(self) -> None:
        """End `follow` on the other ranks, on rank 0."""
        self._told(_Commands(closing=True))
        self._messages.flush()

    @property
    def _replicas(self) -> int:
        return self._model.grid.size("data")

    def _told(self, commands: _Commands) -> _Commands:
        """The commands of rank 0, on every rank."""
        if dist.get_rank() != 0:
            told: _Commands = self._messages.receive(0)
            return told
        self._messages.send(commands, range(1, dist.get_world_size()))
        return commands

    def _round(self, commands: _Commands) -> list[Update]:
        """Every lane's next step, on every rank; all updates on rank 0, elsewhere those of this replica."""
        updates: list[Update] = []
        mine = [entry[1:] for entry in commands.added if entry[0] == self._model.grid.rank("data")]
        for index, lane in enumerate(self._lanes):
            updates += lane.finish()  # of the round before: in a pipeline other stages have computed it meanwhile
            for place, number, request in mine:
                if place == index:
                    lane.add(number, request)
            for number in commands.cancelled:
                lane.cancel(number)
            lane.begin()
            if len(self._lanes) == 1:
                updates += lane.finish()
        return self._gathered(updates)

    def _gathered(self, updates: list[Update]) -> list[Update]:
        """Those of all replicas, on rank 0, from one rank of each."""
        grid = self._model.grid
        size = grid.size("tensor")
        if dist.get_rank() == 0:
            for replica in range(1, self._replicas):
                updates += self._messages.receive(replica * size)
        elif grid.rank("data") and grid.rank("pipe") == 0 and grid.rank("tensor") == 0:
            self._messages.send(updates, [0])
        return updates

    def _fitting_slots(self) -> int:
        """As many slots as asked for, at most as many as fit into the free memory of each rank."""
        model, settings = self._model, self._settings
        kv_heads = model.plan.model.kv_heads_on_rank(model.grid.size("tensor"))
        size = bytes_of_slot(
            model.plan.model, settings.capacity, kv_heads, model.engine.dtype, settings.chunk, model.engine.blocks
        )
        free = _free_memory(model.grid.device) * MEMORY_SHARE
        slots = min(settings.slots, self._messages.smallest(int(free / max(1, size))))
        if slots < model.grid.size("pipe"):
            raise UserError(
                f"keys and values of one text of {settings.capacity} tokens take {_gib(size)} on a rank, and "
                f"{_gib(free)} are free; fewer tokens, or a larger model_parallel_size, need less"
            )
        log.info(
            "decoding: %d texts at once of up to %d tokens, %s of keys and values a rank%s",
            slots * self._replicas, settings.capacity, _gib(slots * size),
            "" if slots == settings.slots else f"; {settings.slots} do not fit into free memory",
        )  # fmt: skip
        return slots


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _free_memory(device: torch.device) -> float:
    """Bytes."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)
