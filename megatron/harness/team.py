"""The first rank asks, all ranks compute. No harness in here.

Batches are dealt over the data-parallel replicas; the ranks of a tensor-parallel group compute each one together. So
the layout decides who computes what, and nothing else: datasets, prompts and order exist on the first rank only.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron.inference import TrainedModel

BATCHES_PER_ROUND = 16  # of each replica: what is sent at once
# Datasets are fetched and metrics computed on one rank while the others wait.
PATIENCE = timedelta(days=1)

Batch = Sequence[Any]
Compute = Callable[[TrainedModel, Batch], list[Any]]  # one result for each entry of the batch; at the top of a module


class Team:
    """All ranks of a run, with their model."""

    def __init__(self, model: TrainedModel) -> None:
        """Collective. What is said goes over gloo, also where the model computes over NCCL."""
        self._model = model
        self._replicas = model.grid.size("data")
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if dist.get_world_size() > 1 else None

    def ask(self, compute: Compute, batches: Sequence[Batch], what: str) -> list[list[Any]]:
        """The results of all batches, in order. The first rank calls it while the others `serve`.

        what: for the bar that a terminal gets.
        """
        results: list[list[Any]] = []
        size = BATCHES_PER_ROUND * self._replicas
        with tqdm(total=len(batches), desc=what, unit="batch", disable=None) as bar:
            for first in range(0, len(batches), size):
                share = batches[first : first + size]
                self._tell((compute, share))
                results += self._compute(compute, share)
                bar.update(len(share))
        return results

    def serve(self) -> None:
        """Compute what the first rank asks for, until it says that this was all."""
        while (work := self._tell(None)) is not None:
            self._compute(*work)

    def dismiss(self) -> None:
        """Let the others go. The first rank calls it."""
        self._tell(None)

    def _tell(self, work: tuple[Compute, Sequence[Batch]] | None) -> tuple[Compute, Sequence[Batch]] | None:
        """What the first rank says, on every rank."""
        message = [work]
        if self._group is not None:
            dist.broadcast_object_list(message, src=0, group=self._group)
        return message[0]

    def _compute(self, compute: Compute, batches: Sequence[Batch]) -> list[list[Any]]:
        """All results on the first rank, elsewhere those of this rank's replica."""
        mine = [compute(self._model, batch) for batch in batches[self._model.grid.rank("data") :: self._replicas]]
        if self._group is None:
            return mine
        parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, parts, dst=0, group=self._group)
        if parts is None:
            return mine
        of_replicas = parts[:: self._model.grid.size("model")]
        return [of_replicas[number % self._replicas][number // self._replicas] for number in range(len(batches))]
