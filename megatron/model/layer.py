"""One layer of a model, described: what a pipeline deals to its stages and a plain module runs in a row.

Floor 3.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """A recipe for one module, called as `module(inputs, cache=None)`. Layers with the same `tied` share one module."""

    module_class: type[nn.Module]  # what `build` returns: a pipeline balances its stages by the names of classes
    build: Callable[[], nn.Module]  # makes the module, with named and initialised parameters
    tied: str | None = None  # where both fall to one rank, the first layer of this key builds for all
    tied_forward: Callable[[nn.Module, Tensor], Tensor] | None = None  # used in place of the module's own forward
    recompute: bool = False  # a pure function of its input and the random state: may be computed again in backward
