"""Weights of linear layers in the form that a CPU multiplies fastest, for inference.

Shapes: t tokens, i input width, o output width.
A product of few tokens reads each weight once and does little else, so its layout in memory decides how long it takes.
Packed once, it serves products of any number of tokens. There are three forms:

oneDNN's blocks, in the type of the weight: fp32, and bf16 on processors with AVX-512 or AMX.
FBGEMM's blocks of fp16, for 16-bit weights on other x86 processors: torch's products in bf16 and fp16 take 2 to 7 times
as long there. fp16 has 3 bits more than bf16 for numbers from 6e-5 to 65504, and is exact for them. Smaller ones are
rounded by at most 3e-8; `pack_weight` leaves a weight as it is where that would be more than `LARGEST_CHANGE`.
int8, each row with its own scale, if asked for: half the memory of 16 bits. The weights are rounded, and in products of
few tokens the inputs too, to bf16.

The others round once, from a sum in fp32 to the type of the inputs, as torch's products do.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.errors import UserError

LARGEST_CHANGE = 2.0**-12  # of a bf16 weight by fp16, relative to its norm; bf16 itself rounds by up to 2^-9
FEW_TOKENS = 32  # up to here the int8 kernel is faster than fp32 products of the converted weight
INT8_MULTIPLE = 16  # of i; torch 2.13's int8 kernel reads beyond other rows
_TOKENS = 8  # for which oneDNN chooses the blocks; those are fast for one token and for hundreds too


class PackedWeight:
    """A weight [o, i] whose product a kernel computes from its own form of it. Not differentiable."""

    requires_grad = False

    def __init__(self, shape: torch.Size, form: str, product: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        """form: for the log. product: inputs [..., i] and bias [o] or None -> [..., o], of the type of the inputs."""
        self.shape, self.form, self.product = shape, form, product

    def __len__(self) -> int:
        """The number of outputs."""
        return self.shape[0]


def pack_weight(weight: Tensor) -> PackedWeight | None:
    """`weight` [o, i] as this processor multiplies it fastest; None: as it is. It needs memory of the same size."""
    if weight.device.type != "cpu":
        return None
    if weight.dtype == torch.float32 or has_products(weight.dtype):
        return _by_onednn(weight)
    if "fbgemm" in torch.backends.quantized.supported_engines:
        return _by_fbgemm(weight)
    return None


def check_quantization(device: torch.device) -> None:
    """Raise UserError where `device` has no products with int8 weights."""
    if device.type != "cpu":
        raise UserError(f"quantization (int8) is for CPUs, and this is a {device.type.upper()} device; leave it out")


def has_products(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of a 16-bit type, rather than converting them."""
    mkldnn = torch.ops.mkldnn
    supported: bool = (
        mkldnn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported()
    )
    return supported


def _by_onednn(weight: Tensor) -> PackedWeight | None:
    if not torch.backends.mkldnn.is_available():
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _TOKENS)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def product(inputs: Tensor, bias: Tensor | None) -> Tensor:
        outputs: Tensor = multiply(inputs, packed, bias, "none", [], "")
        return outputs

    return PackedWeight(weight.shape, "oneDNN", product)


def _by_fbgemm(weight: Tensor) -> PackedWeight | None:
    exact = weight.float()
    if not (exact.half().float() - exact).norm() <= LARGEST_CHANGE * exact.norm():
        return None
    packed = torch.ops.quantized.linear_prepack_fp16(exact, None)
    multiply = torch.ops.quantized.linear_dynamic_fp16.default

    def product(inputs: Tensor, bias: Tensor | None) -> Tensor:
        outputs: Tensor = multiply(inputs.float(), packed)
        return (outputs if bias is None else outputs.add_(bias)).to(inputs.dtype)

    return PackedWeight(weight.shape, "FBGEMM in fp16", product)


def quantize_weight(weight: Tensor) -> PackedWeight | None:
    """`weight` [o, i] in int8, rounded to 254 steps from minus to plus the largest of each row; None: it cannot be.

    Rows of outputs share nothing, so a shard along o is quantized like the whole weight.
    """
    if weight.device.type != "cpu" or weight.shape[1] % INT8_MULTIPLE:
        return None
    scales = (weight.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    steps = (weight.float() / scales.float().unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)

    def product(inputs: Tensor, bias: Tensor | None) -> Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        if len(rows) <= FEW_TOKENS:  # torch has a fast kernel for bf16 alone
            outputs = torch._weight_int8pack_mm(rows.to(torch.bfloat16).contiguous(), steps, scales)
        else:
            outputs = F.linear(rows.float(), steps.float()).mul_(scales)
        outputs = outputs.to(inputs.dtype).view(*inputs.shape[:-1], -1)
        return outputs if bias is None else outputs + bias

    return PackedWeight(weight.shape, "int8", product)
