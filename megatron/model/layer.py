"""One layer of a model, described: what a pipeline deals to its stages and a plain module runs in a row.

Shapes: b micro-batch, s sequence, h hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

# What passes between layers: hidden states [b, s, h] (tokens [b, s] before the first layer, logits after the last), and
# beside them, where documents are kept apart, the column in which each token's document begins, int32 [b, s].
Flow = Tensor | tuple[Tensor, Tensor]


def taken_apart(flow: Flow) -> tuple[Tensor, Tensor | None]:
    """The hidden states, and where documents begin, or None."""
    return flow if isinstance(flow, tuple) else (flow, None)


def put_together(hidden: Tensor, document_start: Tensor | None) -> Flow:
    """The other way round."""
    return hidden if document_start is None else (hidden, document_start)


@dataclass(frozen=True)
class Layer:
    """A recipe for one module, called as `module(flow, cache=None)`. Layers with the same `tied` share one module."""

    module_class: type[nn.Module]  # what `build` returns: a pipeline balances its stages by the names of classes
    build: Callable[[], nn.Module]  # makes the module, with named and initialised parameters
    tied: str | None = None  # where both fall to one rank, the first layer of this key builds for all
    tied_forward: Callable[[nn.Module, Flow], Tensor] | None = None  # used in place of the module's own forward
    recompute: bool = False  # a pure function of its input and the random state: may be computed again in backward
