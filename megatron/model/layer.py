"""The description of one layer, from which a pipeline stage or a sequential module is built.

Shapes: b micro-batch, s sequence, h hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

Targets = tuple[Tensor, Tensor]  # labels [b, s] int64, loss weights [b, s] fp32

# What layers pass on: hidden states [b, s, h] (token ids [b, s] int64 before the first layer, logits after the last),
# and the tensors of `Masking` that there are. A pipeline sends tensors only.
LayerInput = Tensor | tuple[Tensor, ...]


class Masking(NamedTuple):
    """What the blocks need to know of a micro-batch to mask attention; the same tensors for all of them.

    w attention windows of the model that are computed by blocks, c blocks in a sequence; see `block_mask.py`.
    """

    document_start: Tensor | None = None  # int32 [b, s], the column in which each token's document begins; None: 0
    counts: Tensor | None = None  # int32 [w, 4, b or 1, 1, c]
    indices: Tensor | None = None  # int32 [w, 4, b or 1, 1, c, c]


NO_MASKING = Masking()


def unpack(inputs: LayerInput) -> tuple[Tensor, Masking]:
    """The hidden states, and what masks attention."""
    if isinstance(inputs, Tensor):
        return inputs, NO_MASKING
    hidden, *tensors = inputs
    by_blocks = len(tensors) > 1
    return hidden, Masking(tensors[0] if len(tensors) != 2 else None, *(tensors[-2:] if by_blocks else ()))


def pack(hidden: Tensor, masking: Masking) -> LayerInput:
    """The inverse of `unpack`."""
    tensors = [tensor for tensor in masking if tensor is not None]
    return (hidden, *tensors) if tensors else hidden


@dataclass(frozen=True)
class Layer:
    """How to build one module, called as `module(inputs, cache=None)`. Layers with the same `tied` share one module.

    The last layer is the head: `module(inputs, cache=None, targets=None)` gives logits, or with `Targets` the loss.
    """

    module_class: type[nn.Module]  # the class of the module; a pipeline balances its stages by class names
    build: Callable[[], nn.Module]  # makes the module, with named parameters that are zero
    tied: str | None = None  # if one rank has several layers of this key, the first one's module serves all
    tied_forward: Callable[..., Tensor] | None = None  # replaces the module's own forward
    recompute: bool = False  # a pure function of its input and the random state: may be recomputed in backward
