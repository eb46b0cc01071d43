"""Hook: compare the weights that several ranks hold, with `check_replicas_interval`, and end a run where they differ.

Ranks that hold the same weights change them by the same numbers, so that they stay equal in every bit. A difference
means that memory, a link or a computation has failed somewhere, and the next checkpoint would hold it.
"""

import logging
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.engine.training import TrainingEngine
from megatron.errors import RunError
from megatron.events import EventLog
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.parameter import PlacedParameter
from megatron.training.checksums import checksum
from megatron.training.clock import Clock
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, Run
from megatron.training.hooks.saving import SaveSteps

log = logging.getLogger(__name__)

# What ranks hold in common: name of the tensor, and the first element of the slice along its sharded dimension.
Slice = tuple[str, int]
MOST_NAMED = 3  # tensors in a message


class Replicas(Hook):
    """Compares checksums of what several ranks hold, before anything is saved."""

    def __init__(
        self,
        tensors: Callable[[], Mapping[Slice, Tensor]],
        grid: ParallelGrid,
        is_due: Callable[[FinishedStep], bool],
        clock: Clock,
        events: EventLog | None = None,
    ) -> None:
        """tensors: this rank's, by what they are; ranks whose tensors have the same key must have the same bits."""
        self._tensors, self._grid, self._is_due, self._clock = tensors, grid, is_due, clock
        self._events = events or EventLog()

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Compare if due. Collective over all ranks. Raises RunError on all of them if any tensor differs."""
        if self._is_due(step):
            with self._clock.paused():
                difference = self._difference()
            if difference is not None:
                text, details = difference
                text = f"replicas differ after step {step.state.step}: {text}"
                self._events.record("replicas_differ", text, step.state.step, **details)
                raise RunError(
                    f"{text}. Nothing was saved since. Their memory, device or link is to be suspected; resume from "
                    "the last checkpoint without that device"
                )
        return NOTHING

    def _difference(self) -> tuple[str, dict[str, Any]] | None:
        """What differs, in words and for programs; None if nothing does. The same on all ranks."""
        tensors = self._tensors()
        sums = torch.stack([checksum(tensor) for tensor in tensors.values()]).tolist() if tensors else []
        mine = socket.gethostname(), dict(zip(tensors, sums, strict=True))
        everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, everyone, dst=0, group=self._grid.host_group)
        verdict = [describe(everyone) if everyone is not None else None]
        dist.broadcast_object_list(verdict, src=0, group=self._grid.host_group)
        return verdict[0]


def describe(everyone: list[tuple[str, dict[Slice, int]]]) -> tuple[str, dict[str, Any]] | None:
    """Which ranks hold other bits than the others. everyone: node and checksums of each rank.

    Of three or more ranks the majority is right; otherwise it cannot be told which is.
    """
    holders: dict[Slice, dict[int, int]] = defaultdict(dict)
    for rank, (_, sums) in enumerate(everyone):
        for piece, value in sums.items():
            holders[piece][rank] = value
    differing: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = defaultdict(list)
    for (name, _), values in holders.items():
        if len(set(values.values())) > 1:
            right, votes = Counter(values.values()).most_common(1)[0]
            outvoted = [rank for rank, value in values.items() if value != right or 2 * votes <= len(values)]
            differing[tuple(outvoted), tuple(rank for rank in values if rank not in outvoted)].append(name)
    if not differing:
        return None
    sentences = []
    for (wrong, right_ones), names in differing.items():
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        where = ", ".join(f"rank {rank} ({everyone[rank][0]})" for rank in wrong)
        what = f"{', '.join(names[:MOST_NAMED])}{more}"
        sentences.append(
            f"{what} on {where} {'differs' if len(wrong) == 1 else 'differ'} from ranks {_listed(right_ones)}, which "
            "agree"
            if right_ones
            else f"{what} on {where}; with no majority it cannot be told which is right"
        )
    named = sorted({rank for wrong, _ in differing for rank in wrong})
    tensors = sorted({name for names in differing.values() for name in names})
    return "; ".join(sentences), {
        "ranks": named,
        "nodes": [everyone[rank][0] for rank in named],
        "tensors": tensors,
    }


def _listed(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def shared_tensors(engine: TrainingEngine, replicated_over_tensor: bool) -> dict[Slice, Tensor]:
    """What other ranks hold as well: weights, and without ZeRO their fp32 masters and moments.

    replicated_over_tensor: also weights that are whole on each of several tensor-parallel ranks; otherwise each of
    these compares its own with its data-parallel replicas only.
    """
    grid, found = engine.grid, {}

    def key(parameter: torch.nn.Parameter, kind: str) -> Slice:
        placed = cast(PlacedParameter, parameter)
        whole = placed.shard_dim is None
        of_rank = 0 if whole and replicated_over_tensor else grid.rank("tensor") if whole else placed.shard_start
        return f"{placed.global_name}{kind}", of_rank

    for weight in engine.weights:
        found[key(weight, "")] = weight.detach()
    if engine.state.replicated_over_data:
        for fragment in engine.state.fragments():
            for kind, tensor in fragment.tensors.items():
                if tensor.data_ptr() != fragment.parameter.data_ptr():  # in fp32 a weight is its own master
                    found[key(fragment.parameter, f"/{kind}")] = tensor
    return found


def replicas(run: Run) -> Replicas | None:
    """Registry entry: with `check_replicas_interval`, if several ranks hold the same."""
    interval, grid = run.config.recovery.check_replicas_interval, run.engine.grid
    if interval is None:
        return None
    # the gradients of weights that are whole on tensor-parallel ranks are summed over these with sequence parallelism
    # only; otherwise each computes them by itself, which gives the same bits where kernels are deterministic
    alike = grid.sequence_parallel or grid.device.type == "cpu" or run.plan.engine.deterministic
    tied = grid.size("pipe") > 1 and run.plan.model.tied_embeddings
    if grid.size("replica") == 1 and not tied and not (alike and grid.size("tensor") > 1):
        log.info("check_replicas_interval (%d) has no effect: no two ranks hold the same weights", interval)
        return None
    saves = SaveSteps.of(run.config.checkpoint)

    def is_due(step: FinishedStep) -> bool:
        return step.is_due(interval) or step.state.step in saves

    return Replicas(lambda: shared_tensors(run.engine, alike), grid, is_due, run.clock, run.events)
