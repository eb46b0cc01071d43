"""Gradient norm, clip and skipped updates.

The clip is ours under every optimizer: DeepSpeed's reads the norm on the host, and without ZeRO it ignores what
replicated parameters of later pipeline stages contribute, so that there the norm is ours too. An update from gradients
that are not finite is skipped, and on request one from unusually large gradients; all ranks agree because they judge
by the same global norm.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron.engine.deepspeed_internals import is_tied_copy
from megatron.parallel.grid import Axis, ParallelGrid
from megatron.parallel.parameter import PlacedParameter

# updates that `NormLimit` skips in a row before it takes their norms for the new level
SKIPPED_IN_A_ROW = 5
# the standard deviation of a normal distribution, in median distances from its median
DEVIATIONS_PER_DISTANCE = 1.4826
# of the median: the least deviation of gradient norms
LEAST_DEVIATION = 1e-2
_SPLIT_OVER: tuple[Axis, ...] = ("tensor", "pipe")  # the axes along which ranks hold different parameters


class NormLimit:
    """The gradient norm above which an update is skipped, from the norms of earlier updates. Nothing waits for it.

    It is the median plus a number of deviations, of the last norms whose updates were not skipped; a deviation is
    1.4826 times the median distance from the median, and at least a hundredth of the median. All tensors stay on the
    device.
    """

    def __init__(self, deviations: float, window: int, device: torch.device) -> None:
        """deviations: above the median. window: norms; there is no limit before half of them are there."""
        self.value = torch.full((), torch.inf, device=device)  # of the last step
        self._deviations = deviations
        self._norms = torch.full((window,), torch.nan, device=device)  # the last ones, at the end; before them nan
        self._in_a_row = torch.zeros((), device=device)
        self._judged = False

    def begin_step(self) -> None:
        """The next norm is that of another step: ZeRO's optimizers update group by group, with the same norm."""
        self._judged = False

    def judge(self, norm: Tensor) -> None:
        """Set `value` for the step with the norm `norm`, and remember the norm unless its update is skipped."""
        if self._judged:
            return
        self._judged = True
        median = _median(self._norms)
        distance = _median((self._norms - median).abs())
        deviation = torch.maximum(DEVIATIONS_PER_DISTANCE * distance, LEAST_DEVIATION * median)
        enough = self._norms.isfinite().sum() * 2 >= len(self._norms)
        limit = torch.where(enough, median + self._deviations * deviation, torch.inf)
        new_level = (norm > limit) & (self._in_a_row >= SKIPPED_IN_A_ROW)
        self.value = torch.where(new_level, torch.inf, limit)
        skipped = norm > self.value  # also an infinite norm, and below not one that is no number
        kept = torch.where(new_level, torch.nan, self._norms)
        taken = torch.cat((kept[1:], norm.reshape(1)))
        self._norms = torch.where(norm.isfinite() & ~skipped, taken, self._norms)
        self._in_a_row = torch.where(norm.isfinite(), (self._in_a_row + 1) * skipped, self._in_a_row)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint stores. Waits for the device."""
        norms = self._norms[self._norms.isfinite()].tolist()
        return {"norms": norms, "skipped_in_a_row": int(self._in_a_row)}

    @state.setter
    def state(self, values: Mapping[str, Any]) -> None:
        """Take the last norms of those stored; `values` may be empty."""
        norms = list(values.get("norms", []))[-len(self._norms) :]
        filled = [math.nan] * (len(self._norms) - len(norms)) + norms
        self._norms = torch.tensor(filled, device=self._norms.device)
        self._in_a_row = torch.full_like(self._in_a_row, values.get("skipped_in_a_row", 0))


def _median(values: Tensor) -> Tensor:
    """The median of those of `values` [n] that are numbers, a scalar; torch.nanmedian is the lower of two middle ones.

    The index is looked up on the device.
    """
    ordered, count = values.sort().values, values.isfinite().sum()  # what is no number comes last
    middle = torch.stack(((count - 1) // 2, count // 2)).clamp(min=0, max=len(values) - 1)
    return ordered.gather(0, middle).mean()


def clip_and_skip(
    optimizer: Optimizer,
    norm: Callable[[], Tensor | float],
    maximum: float,
    on_device: bool,
    limit: NormLimit | None = None,
) -> None:
    """Before each step of `optimizer`, clip its gradients by the global norm `norm()`; skip it if that is not finite.

    A skipped step is not counted by the optimizer.
    maximum: the largest norm; 0: no clip. on_device: the optimizer divides gradients by `grad_scale` as it reads them
    and obeys `found_inf`, as torch's fused optimizers do, and the host does not wait for the device. For any other
    optimizer the gradients of a skipped step are set to None, which makes the host wait once a step.
    limit: skips steps with a larger norm as well.
    """

    def before_step(*_: object) -> None:
        total = torch.as_tensor(norm(), dtype=torch.float32)
        skipped = total.isfinite().logical_not()
        if limit is not None:
            limit.judge(total.to(limit.value.device))
            skipped = skipped | (total > limit.value.to(total.device))
        excess = torch.clamp((total + 1e-6) / maximum, min=1.0) if maximum else None
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if on_device:
            # on the device of the parameters: the host if they are offloaded
            device, fused = stepped[0].device if stepped else total.device, cast(Any, optimizer)
            fused.found_inf = skipped.float().to(device)
            if excess is not None:
                fused.grad_scale = excess.to(device)
        elif skipped:
            for parameter in stepped:
                parameter.grad = None
        elif excess is not None:
            torch._foreach_mul_([p.grad for p in stepped if p.grad is not None], 1.0 / excess)

    optimizer.register_step_pre_hook(before_step)


class GradientNorm:
    """Computes the global gradient norm just before each optimizer step and keeps it."""

    def __init__(self, optimizer: Optimizer, weights: Sequence[nn.Parameter], grid: ParallelGrid) -> None:
        """Attach to `optimizer`. weights: the model's, on this rank."""
        self.value = torch.zeros((), device=grid.device)  # of the last step, before the clip
        self._weights, self._grid = weights, grid
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, *_: object) -> None:
        self.value = self._global_norm()

    def _global_norm(self) -> Tensor:
        """The 2-norm over each element of the model once. All-reduces over the tensor and pipe axes."""
        mine = [p.grad for p in self._weights if p.grad is not None and self._counts_here(p)]
        square = torch.zeros((), device=self._grid.device)
        if mine:
            square = torch.stack(torch._foreach_norm(mine, 2, dtype=torch.float32)).square().sum()
        for axis in _SPLIT_OVER:
            if self._grid.size(axis) > 1:
                dist.all_reduce(square, group=self._grid.group(axis))
        return square.sqrt()

    def _counts_here(self, parameter: nn.Parameter) -> bool:
        """Count a shard on its rank, a replicated parameter on tensor-parallel rank 0, a tied copy nowhere."""
        if is_tied_copy(parameter):
            return False
        return cast(PlacedParameter, parameter).shard_dim is not None or self._grid.rank("tensor") == 0
