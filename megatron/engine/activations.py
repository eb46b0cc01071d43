"""Statistics of the hidden states that leave each block, in the steps in which they are wanted."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.model.block import TransformerBlock
from megatron.model.layer import unpack
from megatron.parallel.grid import ParallelGrid


class BlockOutputs:
    """Root mean square and largest magnitude of each block's output, over all micro-batches, replicas and shards.

    Where blocks are recomputed their outputs are seen twice, which changes neither.
    """

    def __init__(self, module: nn.Module, num_layers: int, grid: ParallelGrid) -> None:
        """module: whose blocks are on this rank. num_layers: of the whole model."""
        self.wanted = False
        self._grid, self._num_layers = grid, num_layers
        self._norms: dict[int, list[Tensor]] = {}
        self._peaks: dict[int, list[Tensor]] = {}
        self._elements: dict[int, int] = {}
        for block in module.modules():
            if isinstance(block, TransformerBlock):
                block.register_forward_hook(self._see)

    def _see(self, block: nn.Module, _: Any, output: Any) -> None:
        if not self.wanted or not block.training:
            return
        with torch.no_grad():
            hidden, index = unpack(output)[0].detach(), block.index
            assert isinstance(index, int)
            self._norms.setdefault(index, []).append(torch.linalg.vector_norm(hidden, dtype=torch.float32))
            # the infinity norm is slow in 16 bits on a CPU
            self._peaks.setdefault(index, []).append(torch.stack(torch.aminmax(hidden)))
            self._elements[index] = self._elements.get(index, 0) + hidden.numel()

    def take(self) -> tuple[list[float], list[float]]:
        """Root mean squares and largest magnitudes of the last step, by block. Waits for the device. Collective."""
        device = self._grid.device
        sums, peaks = torch.zeros(2, self._num_layers, device=device), torch.zeros(self._num_layers, device=device)
        for index, elements in self._elements.items():
            sums[0, index] = torch.stack(self._norms[index]).square().sum()
            sums[1, index] = elements
            peaks[index] = torch.stack(self._peaks[index]).abs().max()
        for seen in (self._norms, self._peaks, self._elements):
            seen.clear()
        if dist.get_world_size() > 1:
            dist.all_reduce(sums)
            dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        squares, elements_seen, largest = *sums.tolist(), peaks.tolist()
        return [(a / b) ** 0.5 if b else 0.0 for a, b in zip(squares, elements_seen, strict=True)], largest
