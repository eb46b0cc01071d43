"""Activations of the feed-forward layer, plain and gated.

A gated layer computes `function(gate(x)) * up(x)` (https://arxiv.org/abs/2002.05202), a plain one
`function(up(x))`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """An element-wise function, with or without a gate."""

    function: Callable[[Tensor], Tensor]
    gated: bool = False


def _identity(x: Tensor) -> Tensor:
    return x


gelu = Activation(F.gelu)  # exact, with the error function
gelu_tanh = Activation(partial(F.gelu, approximate="tanh"))  # GPT-2's
relu = Activation(F.relu)
silu = Activation(F.silu)
mish = Activation(F.mish)  # https://arxiv.org/abs/1908.08681
softsign = Activation(F.softsign)  # x / (1 + |x|)
glu = Activation(torch.sigmoid, gated=True)
bilinear = Activation(_identity, gated=True)  # gate(x) * up(x)
swiglu = Activation(F.silu, gated=True)
geglu = Activation(F.gelu, gated=True)
geglu_tanh = Activation(partial(F.gelu, approximate="tanh"), gated=True)  # Gemma's
reglu = Activation(F.relu, gated=True)
