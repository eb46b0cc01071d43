"""Python objects between ranks, in host memory; a sender does not wait for the receiver."""

import pickle
from collections.abc import Collection
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(days=365)  # a server may be idle for long


class Messages:
    """Messages over all ranks, those from one rank to another in order."""

    def __init__(self) -> None:
        """Collective over all ranks; of one rank, nothing is sent."""
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if dist.get_world_size() > 1 else None
        self._leaving: list[tuple[dist.Work, Tensor]] = []  # a tensor must live until it has left

    def send(self, message: Any, ranks: Collection[int]) -> None:
        """Send `message` to each of `ranks`, by their number among all."""
        if not ranks:
            return
        self._leaving = [(work, tensor) for work, tensor in self._leaving if not work.is_completed()]
        body = torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8)
        for rank in ranks:
            for tensor in (torch.tensor([len(body)]), body):
                work = dist.isend(tensor, rank, group=self._group)
                assert work is not None
                self._leaving.append((work, tensor))

    def flush(self) -> None:
        """Wait until all messages have left."""
        for work, _ in self._leaving:
            work.wait()
        self._leaving = []

    def receive(self, rank: int) -> Any:
        """The next message from `rank`."""
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, rank, group=self._group)
        body = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(body, rank, group=self._group)
        return pickle.loads(body.numpy().tobytes())

    def smallest(self, number: int) -> int:
        """The smallest `number` of all ranks. Collective."""
        if self._group is None:
            return number
        smallest = torch.tensor(number)
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self._group)
        return int(smallest)
