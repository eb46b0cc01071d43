"""Initial values, the same in every layout: they depend on the run's seed and the parameter's global name.

A whole tensor is divided into cells that do not depend on the layout. Each is drawn from a separate random stream, on
the CPU, so a rank draws only the cells that its elements lie in, and several threads draw at once.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from megatron.parallel.parameter import Initialiser, PlacedParameter, global_chunks
from megatron.seeds import cell_seed

# Of a cell: about a millisecond of drawing, which hides the time of Python. Where columns are sharded, a cell is nearly
# square, because tensor parallelism cuts columns and ZeRO cuts rows.
CELL_ELEMENTS = 1 << 18
CELL_COLUMNS = 512

Window = tuple[slice, ...]


@dataclass(frozen=True)
class Independent:
    """An initialiser that draws each element independently of the others, so that it can fill a tensor in parts.

    factor: of all elements, from the shape of the whole tensor; None: 1.
    """

    fill: Initialiser
    factor: Callable[[Sequence[int]], float] | None = None

    def __call__(self, part: Tensor, generator: torch.Generator, whole: Sequence[int] | None = None) -> None:
        """Fill `part` of a tensor of shape `whole`, in place; by default it is the whole tensor."""
        self.fill(part, generator)
        if self.factor is not None:
            part.mul_(self.factor(whole or part.shape))


def _fill(tensor: Tensor, _: torch.Generator, value: float) -> None:
    tensor.fill_(value)


zeros, ones = Independent(partial(_fill, value=0)), Independent(partial(_fill, value=1))


def initialise(module: nn.Module) -> None:
    """Draw the initial values of the parameters of `module`, which are whole shards in memory."""
    draw((parameter, 0, parameter.detach().view(-1)) for parameter in module.parameters())


def draw(fragments: Iterable[tuple[nn.Parameter, int, Tensor]]) -> None:
    """Fill `fragments` with their initial values, in as many threads as torch is set to; padding is left as it is.

    A fragment is a parameter, the first of its elements in this rank's flattened shard, and the elements [n], of any
    type on any device.
    """
    cells = [cell for fragment in fragments for cell in _cells(*fragment)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads below draw, each for itself
    try:
        with ThreadPoolExecutor(threads) as pool:
            for drawn in [pool.submit(cell) for cell in cells]:
                drawn.result()
    finally:
        torch.set_num_threads(threads)


def _cells(parameter: nn.Parameter, start: int, elements: Tensor) -> Iterator[partial[None]]:
    """A function for each cell that `elements` lie in: it draws the cell and copies from it."""
    placed = cast(PlacedParameter, parameter)
    assert placed.seed is not None, f"{placed.global_name} has no seed: its values are loaded"
    stream, cell_shape = f"{placed.seed}/{placed.global_name}", _cell_shape(placed)
    grid = [range(0, size, step) for size, step in zip(placed.global_shape, cell_shape, strict=True)]
    copies: dict[tuple[int, ...], list[tuple[Tensor, Window]]] = defaultdict(list)
    for offsets, chunk in global_chunks(parameter, start, elements):
        met = [
            corners[at // corners.step : (at + size - 1) // corners.step + 1]
            for corners, at, size in zip(grid, offsets, chunk.shape, strict=True)
        ]
        for corner in itertools.product(*met):
            copies[corner].append(_overlap(chunk, offsets, corner, cell_shape))
    for corner, parts in copies.items():
        number = 0
        for corners, at in zip(grid, corner, strict=True):
            number = number * len(corners) + corners.index(at)
        sizes = [min(step, size - at) for step, size, at in zip(cell_shape, placed.global_shape, corner, strict=True)]
        initialise = placed.initialise
        if isinstance(initialise, Independent):
            initialise = partial(initialise, whole=placed.global_shape)
        yield partial(_draw_cell, initialise, sizes, cell_seed(stream, number), parts)


def _cell_shape(placed: PlacedParameter) -> Sequence[int]:
    """The shape of a cell; those at the end of a dimension are smaller."""
    *leading, columns = placed.global_shape
    if not isinstance(placed.initialise, Independent):
        return placed.global_shape
    if not leading:
        return [CELL_ELEMENTS]
    if placed.shard_dim == len(leading):
        columns = min(columns, CELL_COLUMNS)
    return [1] * (len(leading) - 1) + [max(1, CELL_ELEMENTS // columns), columns]


def _overlap(
    chunk: Tensor, offsets: Sequence[int], corner: Sequence[int], cell_shape: Sequence[int]
) -> tuple[Tensor, Window]:
    """What a chunk at `offsets` and the cell at `corner` have in common: a view of the chunk, and where in the cell."""
    in_chunk, in_cell = [], []
    for at, size, first, step in zip(offsets, chunk.shape, corner, cell_shape, strict=True):
        begin, end = max(at, first), min(at + size, first + step)
        in_chunk.append(slice(begin - at, end - at))
        in_cell.append(slice(begin - first, end - first))
    return chunk[tuple(in_chunk)], tuple(in_cell)


def _draw_cell(initialise: Initialiser, sizes: Sequence[int], seed: int, parts: list[tuple[Tensor, Window]]) -> None:
    cell = torch.empty(sizes)
    initialise(cell, torch.Generator().manual_seed(seed))
    for target, window in parts:
        target.copy_(cell[window])
