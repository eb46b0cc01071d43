"""The description of one layer, from which a pipeline stage or a sequential module is built.

Shapes: b micro-batch, s sequence, h hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

# What layers pass on: hidden states [b, s, h] (token ids [b, s] int64 before the first layer, logits after the last).
# Where documents are kept apart, also the column in which each token's document begins, int32 [b, s].
LayerInput = Tensor | tuple[Tensor, Tensor]


def unpack(inputs: LayerInput) -> tuple[Tensor, Tensor | None]:
    """The hidden states, and the document starts or None."""
    return inputs if isinstance(inputs, tuple) else (inputs, None)


def pack(hidden: Tensor, document_start: Tensor | None) -> LayerInput:
    """The inverse of `unpack`."""
    return hidden if document_start is None else (hidden, document_start)


@dataclass(frozen=True)
class Layer:
    """How to build one module, called as `module(inputs, cache=None)`. Layers with the same `tied` share one module."""

    module_class: type[nn.Module]  # the class of the module; a pipeline balances its stages by class names
    build: Callable[[], nn.Module]  # makes the module, with named parameters that are zero
    tied: str | None = None  # if one rank has several layers of this key, the first one's module serves all
    tied_forward: Callable[[nn.Module, LayerInput], Tensor] | None = None  # replaces the module's own forward
    recompute: bool = False  # a pure function of its input and the random state: may be recomputed in backward
