"""Bring columns of a sharded matrix product to the tensor-parallel ranks that use them."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from megatron.parallel.collectives import exchange_rows
from megatron.parallel.grid import ParallelGrid


class ColumnExchange:
    """From the equal shares of the columns that ranks compute, to the columns that each wants.

    Several ranks may want a column, and a rank may want one several times. The gradients of all copies are summed where
    the column was computed, so the weights that compute it have one owner.
    """

    def __init__(self, columns: int, wanted: Sequence[Sequence[range]], grid: ParallelGrid) -> None:
        """columns: of the whole product. wanted: by each tensor-parallel rank, in the order of its results."""
        rank, ranks = grid.rank("tensor"), grid.size("tensor")
        share = columns // ranks
        edges = {edge for ranges in wanted for part in ranges for edge in (part.start, part.stop)}
        pieces = [range(*pair) for pair in pairwise(sorted(edges.union(range(0, columns + 1, share))))]
        sources = [piece.start // share for piece in pieces]
        needs = [[n for part in ranges for n, piece in enumerate(pieces) if piece.start in part] for ranges in wanted]

        def size(numbers: Iterable[int]) -> int:
            return sum(len(pieces[number]) for number in numbers)

        own = [number for number, source in enumerate(sources) if source == rank]
        sent = [sorted(set(own).intersection(need)) for need in needs]
        received = sorted(set(needs[rank]))  # so in the order of the ranks that send
        self.own_sizes = [len(pieces[number]) for number in own]
        self.sent = [number - own[0] for numbers in sent for number in numbers]
        self.rows_sent = [size(numbers) for numbers in sent]
        self.rows_received = [size(n for n in received if sources[n] == source) for source in range(ranks)]
        self.received_sizes = [len(pieces[number]) for number in received]
        self.order = [received.index(number) for number in needs[rank]]
        at_home = all(sources[number] == other for other, need in enumerate(needs) for number in need)
        self.group = None if at_home else grid.group("tensor")

    def __call__(self, columns: Tensor) -> Tensor:
        """[..., own columns] -> [..., wanted columns].

        One all-to-all forward and its inverse backward; none if every rank computes all that it wants.
        """
        pieces = columns.movedim(-1, 0).split(self.own_sizes)
        rows = torch.cat([pieces[number] for number in self.sent])
        if self.group is not None:
            rows = exchange_rows(rows, self.rows_sent, self.rows_received, self.group)
        parts = rows.split(self.received_sizes)
        return torch.cat([parts[number] for number in self.order]).movedim(0, -1).contiguous()
