"""Gradient norm, clip and skipped updates.

The clip is ours under every optimizer: DeepSpeed's reads the norm on the host, and without ZeRO it ignores what
replicated parameters of later pipeline stages contribute, so that there the norm is ours too. An update from gradients
that are not finite is skipped; all ranks agree because they judge by the same global norm.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron.engine.deepspeed_internals import is_tied_copy
from megatron.parallel.grid import Axis, ParallelGrid
from megatron.parallel.parameter import PlacedParameter

_SPLIT_OVER: tuple[Axis, ...] = ("tensor", "pipe")  # the axes along which ranks hold different parameters


def clip_and_skip(optimizer: Optimizer, norm: Callable[[], Tensor | float], maximum: float, on_device: bool) -> None:
    """Before each step of `optimizer`, clip its gradients by the global norm `norm()`; skip it if that is not finite.

    A skipped step is not counted by the optimizer.
    maximum: the largest norm; 0: no clip. on_device: the optimizer divides gradients by `grad_scale` as it reads them
    and obeys `found_inf`, as torch's fused optimizers do, and the host does not wait for the device. For any other
    optimizer the gradients of a skipped step are set to None, which makes the host wait once a step.
    """

    def before_step(*_: object) -> None:
        total = torch.as_tensor(norm(), dtype=torch.float32)
        excess = torch.clamp((total + 1e-6) / maximum, min=1.0) if maximum else None
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if on_device:
            # on the device of the parameters: the host if they are offloaded
            device, fused = stepped[0].device if stepped else total.device, cast(Any, optimizer)
            fused.found_inf = total.isfinite().logical_not().float().to(device)
            if excess is not None:
                fused.grad_scale = excess.to(device)
        elif not total.isfinite():
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
