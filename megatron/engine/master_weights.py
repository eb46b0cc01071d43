"""fp32 masters of 16-bit weights without ZeRO.

DeepSpeed's wrappers for this case flatten all parameters, copy each gradient up to five times, and start with a step on
zero gradients, which shifts Adam's bias correction. Here gradients accumulate in fp32 in autograd, the optimizer steps
the masters with the same tensors, and the weights are rounded from the masters.
"""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class MasterWeights:
    """16-bit weights, and the fp32 tensors that the optimizer steps instead of them."""

    def __init__(self, module: nn.Module, weight_type: torch.dtype, gradient_type: torch.dtype = torch.float32) -> None:
        """Round the weights of `module` to `weight_type`; buffers stay as they are.

        gradient_type: of accumulated gradients. Masters start as the rounded weights, until they are drawn or loaded.
        """
        self.weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for weight in self.weights:
            weight.data = weight.data.to(weight_type)
            weight.grad_dtype = gradient_type
        self.masters = [nn.Parameter(weight.detach().float()) for weight in self.weights]
        self._weight_of = dict(zip(self.masters, self.weights, strict=True))

    def weight_of(self, master: nn.Parameter) -> nn.Parameter:
        """The 16-bit weight of `master`."""
        return self._weight_of[master]

    def attach(self, optimizer: Optimizer) -> None:
        """Make `optimizer`, built over the masters, use the gradients of the weights. Attach before other hooks."""
        optimizer.register_step_pre_hook(self._take_gradients)
        optimizer.register_step_post_hook(self._finish_step)

    @torch.no_grad()
    def push(self) -> None:
        """Round the masters into the weights."""
        torch._foreach_copy_(list[Tensor](self.weights), list[Tensor](self.masters))

    def _take_gradients(self, *_: object) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.to(master.dtype)

    def _finish_step(self, *_: object) -> None:
        for master in self.masters:
            master.grad = None
        self.push()
