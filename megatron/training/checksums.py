"""Checksums of tensors, computed where they are, to tell whether two ranks hold the same bits."""

import torch
from torch import Tensor

_AT_ONCE = 1 << 22  # elements, of which a copy in 64 bits is made
_ODD = -7046029254386353131  # 2 ** 64 divided by the golden ratio, odd, as a signed number
_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """A number of 64 bits, a scalar on the tensor's device: each element's bits times an odd number of its place.

    Products and sums are modulo 2 ** 64. So one element with other bits always changes the result, and so do, but for
    a chance of about 2 ** -64, several of them and elements that are exchanged.
    """
    bits = tensor.detach().reshape(-1).view(_OF_SIZE[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for at in range(0, bits.numel(), _AT_ONCE):
        part = bits[at : at + _AT_ONCE]
        places = torch.arange(at, at + part.numel(), device=bits.device)
        total += (part.long() * (places * _ODD | 1)).sum()
    return total
