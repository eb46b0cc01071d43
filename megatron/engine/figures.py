"""Figures of each parameter of the whole model, each element counted once: norms of weights, gradients and moments.

An element has one owner among the ranks, as in checkpoints: a shard its tensor-parallel rank, what is replicated the
first rank of its group, a tied weight its first stage, and under ZeRO a partition its rank. So the figures are those of
one rank under every layout, up to the order of additions.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron.engine.deepspeed_internals import Location, is_tied_copy
from megatron.engine.optimizer_state import OptimizerState
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.parameter import PlacedParameter

Views = list[tuple[str, Tensor]]  # global name of a parameter, and elements of it that this rank owns


class ParameterFigures:
    """Sums of squares over each parameter that is trained. The tensors stay on the device until `read`."""

    def __init__(self, state: OptimizerState, grid: ParallelGrid) -> None:
        """state: of the optimizer, whose tensors are looked at. Collective over all ranks."""
        self._state, self._grid = state, grid
        mine = [_name(found.parameter) for found in state.locations()]
        everywhere: list[list[str]] = [mine] * dist.get_world_size()
        dist.all_gather_object(everywhere, mine, group=grid.host_group)
        self.names = sorted({name for names in everywhere for name in names}, key=_in_order)
        self._rows = {name: row for row, name in enumerate(self.names)}
        self._indices: dict[tuple[str, ...], Tensor] = {}
        self._of_stepped: dict[int, list[Location]] = defaultdict(list)
        for found in state.locations():
            if self._owns(found.parameter):
                self._of_stepped[id(found.flat)].append(found)

    def state_squares(self, kind: str) -> Tensor:
        """Sums of squares [number of names] on this rank. kind: "fp32", the weights, or a moment of the optimizer."""
        return self.squares(
            [
                (_name(fragment.parameter), fragment.tensors[kind])
                for fragment in self._state.fragments()
                if fragment.parameter.requires_grad and self._owns(fragment.parameter)
            ]
        )

    def owned(self, stepped: Tensor, values: Tensor) -> Views:
        """What this rank owns of `values`, which has an element for each of `stepped`, a tensor of the optimizer."""
        flat = values.detach().view(-1)
        return [
            (_name(found.parameter), flat[found.at : found.at + found.numel]) for found in self._of_stepped[id(stepped)]
        ]

    def squares(self, views: Views) -> Tensor:
        """Sums of squares [number of names] of `views` on this rank."""
        total = torch.zeros(len(self.names), device=self._grid.device)
        if views:
            norms = torch._foreach_norm([view for _, view in views], 2, dtype=torch.float32)
            rows = self._rows_of(tuple(name for name, _ in views))
            total.index_add_(0, rows, torch.stack(norms).to(total.device).square())
        return total

    def _rows_of(self, names: tuple[str, ...]) -> Tensor:
        """Kept on the device, because a copy from the host may wait."""
        if names not in self._indices:
            self._indices[names] = torch.tensor([self._rows[name] for name in names], device=self._grid.device)
        return self._indices[names]

    def over_all_ranks(self, squares: Sequence[Tensor]) -> Tensor:
        """The sums over all ranks, on the device: [number of `squares`, number of names]. Collective."""
        stacked = torch.stack(list(squares))
        if dist.get_world_size() > 1:
            dist.all_reduce(stacked)
        return stacked

    def _owns(self, parameter: nn.Parameter) -> bool:
        if is_tied_copy(parameter):
            return False
        if self._state.replicated_over_data and self._grid.rank("replica") != 0:
            return False
        return cast(PlacedParameter, parameter).shard_dim is not None or self._grid.rank("tensor") == 0


class BeforeUpdate:
    """Tells watchers of the gradients, averaged over replicas and before the clip, just before they are used."""

    def __init__(self, optimizer: Optimizer) -> None:
        """optimizer: that steps the tensors. Attach before the clip."""
        self.watchers: list[Callable[[Tensor, Tensor], None]] = []  # of (tensor that is stepped, its gradient)
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        for watcher in self.watchers:
            for group in optimizer.param_groups:
                for stepped in group["params"]:
                    if stepped.grad is not None:
                        watcher(stepped, stepped.grad)


class GradientSquares:
    """Sums of squares over the gradient of each parameter, in the steps in which `wanted` is set."""

    def __init__(self, figures: ParameterFigures, before_update: BeforeUpdate) -> None:
        self.wanted = False
        self._figures, self._views = figures, list[Tensor]()
        before_update.watchers.append(self._see)

    def _see(self, stepped: Tensor, gradient: Tensor) -> None:
        if self.wanted:
            self._views.append(self._figures.squares(self._figures.owned(stepped, gradient)))

    def take(self) -> Tensor | None:
        """Those of the last step on this rank, [number of names]; None if they were not wanted."""
        seen, self._views = self._views, []
        return torch.stack(seen).sum(0) if self.wanted and seen else None


class GradientSum:
    """The sum of the gradients of several steps: fp32, 4 bytes for each element, divided like the optimizer's state."""

    def __init__(self, figures: ParameterFigures, before_update: BeforeUpdate) -> None:
        self._figures = figures
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}  # by the tensor that is stepped
        before_update.watchers.append(self._add)

    def _add(self, stepped: Tensor, gradient: Tensor) -> None:
        if id(stepped) in self._sums:
            self._sums[id(stepped)][1].add_(gradient)
        else:
            self._sums[id(stepped)] = stepped, gradient.detach().float().clone()

    def take_square(self) -> Tensor:
        """The squared norm of the sum, over the whole model and on the device; the next sum begins. Collective."""
        views = [view for stepped, total in self._sums.values() for view in self._figures.owned(stepped, total)]
        squares = self._figures.over_all_ranks([self._figures.squares(views)]).sum()
        self.forget()
        return squares

    def forget(self) -> None:
        """Begin the next sum."""
        self._sums.clear()


def _name(parameter: nn.Parameter) -> str:
    return cast(PlacedParameter, parameter).global_name


def _in_order(name: str) -> list[tuple[int, str]]:
    """Sorts blocks.2 before blocks.10."""
    return [(int(word), "") if word.isdigit() else (0, word) for word in name.split(".")]
