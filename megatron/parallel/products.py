"""The three matrix products of a linear layer, in the type of their operands or in float8.

Shapes: t tokens, i input width, o output width.

float8 follows https://arxiv.org/abs/2209.05433 with the scaling of torchao (https://github.com/pytorch/ao,
torchao/float8): each operand is cast just before its product, to e4m3 (activations and weights: 3 bits of mantissa) or
e5m2 (gradients of outputs: 2 bits, more range), with one scale for the whole tensor that maps its largest element to
the largest number of the type. The product is summed in fp32 and returned in the operands' type. Weights and what is
stored for the backward pass stay as they are, so checkpoints do not depend on it.

A rank scales its shard by itself, without communication: a scale cancels in the product, and that of a shard is at
least as fine as that of the whole tensor.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.errors import UserError
from megatron.parallel.packed_weights import PackedWeight

WEIGHTS, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
FIRST_CAPABILITY = (8, 9)  # Ada and Hopper
_SMALLEST = 1e-12  # largest element of a tensor of zeros, as in torchao


def linear(inputs: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, float8: bool = False) -> Tensor:
    """[..., i], [o, i], [o] -> [..., o]. Differentiable, but for a packed weight."""
    if isinstance(weight, PackedWeight):
        return weight.product(inputs, bias)
    if not float8:
        return F.linear(inputs, weight, bias)
    outputs: Tensor = _Float8Linear.apply(inputs, weight)
    return outputs if bias is None else outputs + bias


def gradient_of_inputs(gradient: Tensor, weight: Tensor, float8: bool = False) -> Tensor:
    """The gradient of outputs [..., o] and the weight [o, i] -> [..., i]."""
    if not float8:
        return gradient @ weight
    rows = _product(gradient.flatten(0, -2), weight, GRADIENTS)
    return rows.view(*gradient.shape[:-1], weight.shape[1])


def gradient_of_weight(gradient: Tensor, inputs: Tensor, float8: bool = False) -> Tensor:
    """The gradient of outputs [t, o] and the inputs [t, i] -> [o, i]."""
    return _product(gradient.t(), inputs, GRADIENTS) if float8 else gradient.t() @ inputs


def check_float8(device: torch.device) -> None:
    """Raise UserError where `device` has no float8 products."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY:
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    raise UserError(
        f"precision_linear (float8) needs a GPU of compute capability {'.'.join(map(str, FIRST_CAPABILITY))} or above "
        f"(Ada, Hopper or newer), and this is {name}; leave precision_linear out"
    )


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        # the sums of activations may be less exact than those of gradients, as in torchao
        rows = _product(inputs.flatten(0, -2), weight.t(), WEIGHTS, fast=True)
        return rows.view(*inputs.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = gradient_of_weight(gradient.flatten(0, -2), inputs.flatten(0, -2), float8=True)
        return gradient_of_inputs(gradient, weight, float8=True), of_weight


def _product(left: Tensor, right: Tensor, left_type: torch.dtype, fast: bool = False) -> Tensor:
    """[m, k] x [k, n] -> [m, n]. The kernel takes the rows of `left` and the columns of `right`, each contiguous."""
    (rows, of_rows), (columns, of_columns) = _scaled(left, left_type), _scaled(right.t(), WEIGHTS)
    result: Tensor = torch._scaled_mm(rows, columns.t(), of_rows, of_columns, out_dtype=left.dtype, use_fast_accum=fast)
    return result


def _scaled(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`tensor` in `dtype`, contiguous, and the fp32 number that multiplies it back."""
    limit = torch.finfo(dtype).max
    scale = limit / tensor.abs().amax().float().clamp(min=_SMALLEST)
    return (tensor.float() * scale).clamp(-limit, limit).to(dtype).contiguous(), scale.reciprocal()
