"""Figures of each parameter of the whole model, each element counted once: norms of weights, gradients and moments.

An element has one owner among the ranks, as in checkpoints: a shard its tensor-parallel rank, what is replicated the
first rank of its group, a tied weight its first stage, and under ZeRO a partition its rank. So the figures are those of
one rank under every layout, up to the order of additions.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain
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

    def state_squares(self, *kinds: str) -> dict[str, Tensor]:
        """Sums of squares [number of names] on this rank. kinds: "fp32", the weights, and moments of the optimizer."""
        owned = [
            (_name(fragment.parameter), fragment.tensors)
            for fragment in self._state.fragments()
            if fragment.parameter.requires_grad and self._owns(fragment.parameter)
        ]
        return {kind: self.squares([(name, tensors[kind]) for name, tensors in owned]) for kind in kinds}

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
            rows = self._rows_of(tuple(name for name, _ in views))
            total.index_add_(0, rows, _squares([view for _, view in views]).to(total.device))
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
        # of tensors that are stepped, and their gradients
        self.watchers: list[Callable[[Sequence[Tensor], Sequence[Tensor]], None]] = []
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        stepped = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
        gradients = [each.grad for each in stepped]
        for watcher in self.watchers if stepped else ():
            watcher(stepped, gradients)


class GradientSquares:
    """Sums of squares over the gradient of each parameter, in the steps in which `wanted` is set."""

    def __init__(self, figures: ParameterFigures, before_update: BeforeUpdate) -> None:
        self.wanted = False
        self._figures, self._seen = figures, list[Tensor]()
        before_update.watchers.append(self._see)

    def _see(self, stepped: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        if self.wanted:
            owned = (self._figures.owned(*pair) for pair in zip(stepped, gradients, strict=True))
            self._seen.append(self._figures.squares(list(chain.from_iterable(owned))))

    def take(self) -> Tensor | None:
        """Those of the last step on this rank, [number of names]; None if they were not wanted."""
        seen, self._seen = self._seen, []
        return torch.stack(seen).sum(0) if self.wanted and seen else None


class GradientSum:
    """The sum of the gradients of several steps: fp32, 4 bytes for each element, divided like the optimizer's state.

    The memory is kept from sum to sum: on a CPU new pages cost as much as the addition.
    """

    def __init__(self, figures: ParameterFigures, before_update: BeforeUpdate) -> None:
        self._figures = figures
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}  # by the tensor that is stepped
        self._begun: set[int] = set()  # those that have a gradient of the present sum
        before_update.watchers.append(self._add)

    def _add(self, stepped: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        totals = [self._total_of(each) for each in stepped]
        for each, total in zip(stepped, totals, strict=True):
            if id(each) not in self._begun:
                self._begun.add(id(each))
                total.zero_()
        torch._foreach_add_(totals, list(gradients))

    def _total_of(self, stepped: Tensor) -> Tensor:
        if id(stepped) not in self._sums:
            self._sums[id(stepped)] = stepped, torch.empty_like(stepped, dtype=torch.float32, requires_grad=False)
        return self._sums[id(stepped)][1]

    def take_square(self) -> Tensor:
        """The squared norm of the sum, over the whole model and on the device; the next sum begins. Collective."""
        totals = [self._sums[key] for key in self._sums if key in self._begun]
        views = [view for stepped, total in totals for view in self._figures.owned(stepped, total)]
        squares = self._figures.over_all_ranks([self._figures.squares(views)]).sum()
        self.forget()
        return squares

    def forget(self) -> None:
        """Begin the next sum."""
        self._begun.clear()


def _squares(vectors: list[Tensor]) -> Tensor:
    """The sum of squares of each, in fp32: [number of `vectors`]."""
    if all(vector.device.type == "cpu" and vector.dtype == torch.float32 for vector in vectors):
        return torch.stack([torch.dot(vector, vector) for vector in vectors])  # on all cores, where a norm takes one
    return torch.stack(torch._foreach_norm(vectors, 2, dtype=torch.float32)).square()


def _name(parameter: nn.Parameter) -> str:
    return cast(PlacedParameter, parameter).global_name


def _in_order(name: str) -> list[tuple[int, str]]:
    """Sorts blocks.2 before blocks.10."""
    return [(int(word), "") if word.isdigit() else (0, word) for word in name.split(".")]
