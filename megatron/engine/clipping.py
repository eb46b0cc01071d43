"""Gradient norm, clip and skipped updates where DeepSpeed does not handle them.

Without ZeRO, DeepSpeed's clip ignores what replicated parameters of later pipeline stages contribute, so norm and clip
are ours. Under every optimizer, an update from gradients that are not finite is skipped; all ranks agree because they
judge by the same global norm.
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


def skip_if_not_finite(optimizer: Optimizer, norm: Callable[[], Tensor | float], on_device: bool) -> None:
    """Skip every step of `optimizer`, its step count included, for which `norm()` is not finite.

    on_device: the optimizer reads `found_inf`, as torch's fused optimizers do, and the host does not synchronize.
    For any other optimizer the gradients are set to None, which synchronizes once a step.
    """

    def before_step(*_: object) -> None:
        finite = torch.as_tensor(norm(), dtype=torch.float32).isfinite()
        if on_device:
            # on the device of the parameters: the host if they are offloaded
            devices = [parameter.device for group in optimizer.param_groups for parameter in group["params"]]
            cast(Any, optimizer).found_inf = finite.logical_not().float().to(devices[0] if devices else finite.device)
        elif not finite:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    optimizer.register_step_pre_hook(before_step)


class GradientClip:
    """Clips gradients just before each optimizer step and keeps the norm."""

    def __init__(
        self,
        optimizer: Optimizer,
        weights: Sequence[nn.Parameter],
        grid: ParallelGrid,
        maximum: float,
        on_device: bool = False,
    ) -> None:
        """Attach to `optimizer`, whose gradients are clipped by the norm of the gradients of `weights`, the model's.

        maximum: the largest norm; 0 disables the clip (the norm is still computed).
        on_device: the optimizer divides gradients by its `grad_scale` as it reads them, as torch's fused ones do.
        """
        self.norm = torch.zeros((), device=grid.device)  # of the last step, before the clip
        self._optimizer, self._weights = optimizer, weights
        self._grid = grid
        self._maximum = maximum
        self._divides = cast(Any, optimizer) if on_device else None
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, *_: object) -> None:
        self.norm = self._global_norm()
        if self._maximum == 0:
            return
        excess = torch.clamp((self.norm + 1e-6) / self._maximum, min=1.0)
        if self._divides:
            self._divides.grad_scale = excess
        else:
            stepped = (p for group in self._optimizer.param_groups for p in group["params"])
            torch._foreach_mul_([p.grad for p in stepped if p.grad is not None], 1.0 / excess)

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
