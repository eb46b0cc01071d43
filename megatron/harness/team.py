"""Rank 0 sends batches, all ranks compute them. Independent of the harness.

Batches are distributed over the data-parallel replicas; the ranks of a tensor-parallel group compute each one together.
The layout decides which rank computes what and nothing else: datasets, prompts and order exist on rank 0 only.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron.inference import TrainedModel

BATCHES_PER_ROUND = 16  # sent at once, per replica
# Datasets are fetched and metrics computed on one rank while the others wait.
PATIENCE = timedelta(days=1)

Batch = Sequence[Any]
Compute = Callable[[TrainedModel, Batch], list[Any]]  # one result per entry; pickled, so a module-level function


class Team:
    """All ranks of a run, with their model."""

    def __init__(self, model: TrainedModel) -> None:
        """Collective. Messages go over gloo, even if the model uses NCCL."""
        self._model = model
        self._replicas = model.grid.size("data")
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if dist.get_world_size() > 1 else None

    def ask(self, compute: Compute, batches: Sequence[Batch], what: str) -> list[list[Any]]:
        """The results of all batches, in order. Rank 0 calls it while the others `serve`.

        what: label of the progress bar on a terminal.
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
        """Compute the batches that rank 0 sends, until it dismisses this rank."""
        while (work := self._tell(None)) is not None:
            self._compute(*work)

    def dismiss(self) -> None:
        """End `serve` on the other ranks. Rank 0 calls it."""
        self._tell(None)

    def _tell(self, work: tuple[Compute, Sequence[Batch]] | None) -> tuple[Compute, Sequence[Batch]] | None:
        """The message of rank 0, on every rank."""
        message = [work]
        if self._group is not None:
            dist.broadcast_object_list(message, src=0, group=self._group)
        return message[0]

    def _compute(self, compute: Compute, batches: Sequence[Batch]) -> list[list[Any]]:
        """All results on rank 0, elsewhere those of this rank's replica."""
        mine = [compute(self._model, batch) for batch in batches[self._model.grid.rank("data") :: self._replicas]]
        if self._group is None:
            return mine
        parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, parts, dst=0, group=self._group)
        if parts is None:
            return mine
        of_replicas = parts[:: self._model.grid.size("tensor")]
        return [of_replicas[number % self._replicas][number // self._replicas] for number in range(len(batches))]
