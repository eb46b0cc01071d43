"""What happens between the gradients and the update where DeepSpeed does not see to it.

The clip where no ZeRO optimizer is at work: DeepSpeed's own for this case leaves out what replicated parameters of
later stages contribute. And, under every optimizer, no update from gradients that are not finite, judged by the norm
that is known by then on all ranks.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron.parallel.grid import Axis, ParallelGrid
from megatron.parallel.parameter import PlacedParameter

_SPLIT_OVER: tuple[Axis, ...] = ("tensor", "pipe")  # the axes along which ranks hold different parameters


def skip_if_not_finite(optimizer: Optimizer, norm: Callable[[], Tensor | float], on_device: bool) -> None:
    """Make every step of `optimizer` do nothing, its step count included, when `norm()` is not finite by then.

    on_device: the optimizer reads `found_inf`, as the fused ones of torch do; then nothing waits for the device.
    From any other the gradients are taken away, since none touches a parameter without one; that waits once a step.
    """

    def before_step(*_: object) -> None:
        finite = torch.as_tensor(norm(), dtype=torch.float32).isfinite()
        if on_device:
            # wherever its parameters are: on the host if they are offloaded
            devices = [parameter.device for group in optimizer.param_groups for parameter in group["params"]]
            cast(Any, optimizer).found_inf = finite.logical_not().float().to(devices[0] if devices else finite.device)
        elif not finite:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    optimizer.register_step_pre_hook(before_step)


class GradientClip:
    """Clips just before each optimizer step, and remembers the norm it found."""

    def __init__(
        self,
        optimizer: Optimizer,
        weights: Sequence[nn.Parameter],
        grid: ParallelGrid,
        maximum: float,
        on_device: bool = False,
    ) -> None:
        """Attach to `optimizer`, whose gradients are clipped. weights: the model's, whose norm is taken.

        maximum: the largest norm to let through, 0 for no clip (the norm is still taken).
        on_device: the optimizer divides gradients by its `grad_scale` as it reads them, as the fused ones of torch do.
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
        above = torch.clamp((self.norm + 1e-6) / self._maximum, min=1.0)
        if self._divides:
            self._divides.grad_scale = above
        else:
            stepped = (p for group in self._optimizer.param_groups for p in group["params"])
            torch._foreach_mul_([p.grad for p in stepped if p.grad is not None], 1.0 / above)

    def _global_norm(self) -> Tensor:
        """The 2-norm over every element of the model once: all-reduces over the tensor and pipe axes."""
        mine = [p.grad for p in self._weights if p.grad is not None and self._counts_here(p)]
        square = torch.zeros((), device=self._grid.device)
        if mine:
            square = torch.stack(torch._foreach_norm(mine, 2, dtype=torch.float32)).square().sum()
        for axis in _SPLIT_OVER:
            if self._grid.size(axis) > 1:
                dist.all_reduce(square, group=self._grid.group(axis))
        return square.sqrt()

    def _counts_here(self, parameter: nn.Parameter) -> bool:
        """A shard counts where it is; a copy on tensor-parallel rank 0; a tied copy of a later stage never."""
        if getattr(parameter, "ds_pipe_replicated", False):
            return False
        return cast(PlacedParameter, parameter).shard_dim is not None or self._grid.rank("tensor") == 0
