"""Activations of the feed-forward layer, plain and gated.

A gated layer computes `function(gate(x)) * up(x)` (https://arxiv.org/abs/2002.05202), a plain one
`function(up(x))`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """An element-wise function, with or without a gate."""

    function: Callable[[Tensor], Tensor]
    gated: bool = False


gelu = Activation(F.gelu)  # exact, with the error function
gelu_tanh = Activation(partial(F.gelu, approximate="tanh"))  # GPT-2's
relu = Activation(F.relu)
silu = Activation(F.silu)
swiglu = Activation(F.silu, gated=True)
geglu = Activation(F.gelu, gated=True)
reglu = Activation(F.relu, gated=True)
