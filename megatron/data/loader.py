"""Micro-batches of one data-parallel rank: a pure function of the number of samples consumed so far.

Step k of a run takes the global samples consumed + [k G, (k + 1) G). Of these, the m-th of micro-batch a of data rank d
is number a (M D) + d M + m, so neither D nor the number of micro-batches changes which samples a step uses.

Letters: G global batch, M micro-batch, D data-parallel ranks, s sequence length.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron.data.windows import SampleSource, Tokens


@dataclass(frozen=True)
class MicroBatchOrder:
    """The sample numbers of each micro-batch of one rank; infinite."""

    consumed_samples: int
    global_size: int
    micro_size: int
    data_rank: int
    data_size: int

    def __post_init__(self) -> None:
        if self.global_size % (self.micro_size * self.data_size):
            raise ValueError(
                f"a global batch of {self.global_size} samples cannot be divided into micro-batches of "
                f"{self.micro_size} on {self.data_size} data-parallel ranks"
            )

    def __iter__(self) -> Iterator[list[int]]:
        # A step is a whole number of rows of M D samples, so rows are contiguous across steps.
        start = self.consumed_samples + self.data_rank * self.micro_size
        while True:
            yield list(range(start, start + self.micro_size))
            start += self.micro_size * self.data_size


CHUNK = 1 << 17  # tokens per transfer from a worker, which costs about a millisecond


@dataclass(frozen=True)
class _Chunks:
    """The sample numbers of `count` micro-batches at once."""

    order: MicroBatchOrder
    count: int

    def __iter__(self) -> Iterator[list[int]]:
        numbers = iter(self.order)
        while True:
            yield [number for batch in islice(numbers, self.count) for number in batch]


class _Samples(Dataset[Tokens]):
    def __init__(self, source: SampleSource) -> None:
        self.source = source

    def __getitem__(self, index: int) -> Tokens:
        return self.source[index]


def micro_batches(
    source: SampleSource,
    *,
    consumed_samples: int,
    global_size: int,
    micro_size: int,
    data_rank: int,
    data_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> Iterator[torch.Tensor]:
    """Endless micro-batches of token ids, each int64 [M, s + 1] on the CPU; [M, 2, s + 1] with labels.

    num_workers: processes that prefetch; 0 reads in this process. The batches are the same for any number.
    start_method: of those processes ("fork", "spawn", "forkserver"); None is Python's default.
    Raises ValueError when the global batch does not divide.
    """
    order = MicroBatchOrder(consumed_samples, global_size, micro_size, data_rank, data_size)
    count = max(1, CHUNK // (micro_size * source[consumed_samples].size)) if num_workers else 1
    loader = DataLoader(
        _Samples(source),
        batch_sampler=_Chunks(order, count),  # has no length, which DataLoader does not need
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_stacked,
        multiprocessing_context=start_method if num_workers else None,
        worker_init_fn=_outlive_stop_signals if num_workers else None,
        # Otherwise DataLoader draws from torch's global generator, and a resumed run gets other random numbers.
        generator=torch.Generator(),
    )
    return _micro_batches(iter(loader), micro_size)  # workers start now, not with the first batch


def _micro_batches(chunks: Iterator[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    for chunk in chunks:
        yield from chunk.split(size)


def _outlive_stop_signals(_: int) -> None:
    """Ignore stop signals sent to the process group: the main process shuts down gracefully and needs its workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _stacked(samples: list[Tokens]) -> torch.Tensor:
    return torch.from_numpy(np.stack(samples))
