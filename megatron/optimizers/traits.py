"""What the engine and the checkpoints must know of an optimizer, found out by trying it on a handful of numbers.

So an optimizer declares nothing: it is a torch optimizer, one entry of the registry. In a run it steps pieces of
flattened parameters, and its state is cut, moved and put together again element by element. That changes nothing for
optimizers that treat each element by itself (Adam, SGD, Lion, ...); one that looks at whole matrices (Muon, Shampoo,
LAMB's norms) would train otherwise under every layout, and is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron import registry
from megatron.config.plan import OptimizerPlan
from megatron.errors import UserError

_SHAPE, _UPDATES = (4, 6), 3


@dataclass(frozen=True)
class OptimizerTraits:
    """The state that an optimizer keeps for each tensor it steps, and how it is told to leave an update out."""

    moments: dict[str, float]  # names of tensors shaped like the parameter -> their elements before the first update
    counters: tuple[str, ...]  # names of numbers that say how many updates there were
    counts_in_tensors: bool  # whether those are tensors of one element
    on_device: bool  # it reads `found_inf` and keeps its counters where the parameter is, as torch's fused ones do

    def fill(self, state: dict[str, Any], stepped: Tensor) -> None:
        """Put what is missing into the `state` kept for the tensor `stepped`, as before the first update."""
        for name, value in self.moments.items():
            if name not in state:
                state[name] = torch.full_like(stepped.detach(), value, memory_format=torch.preserve_format)
        device = stepped.device if self.on_device else torch.device("cpu")
        for name in self.counters:
            if name not in state:
                state[name] = torch.zeros((), device=device) if self.counts_in_tensors else 0


def traits_of(plan: OptimizerPlan) -> OptimizerTraits:
    """Try the optimizer that `plan.kind` names.

    Raises UserError where it cannot be sharded: its update of an element depends on other elements, or it keeps state
    that is neither shaped like the parameter nor a count of updates.
    """
    try:
        # where nothing pulls, neither a gradient nor a decay, moments stay what they are before the first update
        optimizer, parameter = _stepped(replace(plan, weight_decay=0.0), [torch.zeros(_SHAPE)])
        traits = _traits(optimizer, optimizer.state[parameter])
        gradients = list(torch.randn((_UPDATES, *_SHAPE), generator=torch.Generator().manual_seed(1)))
        whole, flat = _stepped(plan, gradients), _stepped(plan, [g.flatten() for g in gradients], traits)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise _refusal(plan.kind, f"{type(error).__name__}: {error}") from error
    if not torch.equal(whole[1].detach().flatten(), flat[1].detach()):
        raise _refusal(plan.kind, "a matrix and the same numbers in a row get different updates")
    return traits


def _stepped(
    plan: OptimizerPlan, gradients: Sequence[Tensor], traits: OptimizerTraits | None = None
) -> tuple[Optimizer, nn.Parameter]:
    """The optimizer after one update for each gradient. traits: its state is made beforehand, as in a run."""
    parameter = nn.Parameter(torch.ones_like(gradients[0]))
    build = registry.resolve("optimizer", plan.kind)
    optimizer: Optimizer = build([{"params": [parameter], "weight_decay": plan.weight_decay}], plan)
    if traits is not None:
        optimizer.state.clear()
        traits.fill(optimizer.state[parameter], parameter)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return optimizer, parameter


def _traits(optimizer: Optimizer, state: dict[str, Any]) -> OptimizerTraits:
    """Sort the state after one update by a gradient of zeros."""
    kept = {name: value for name, value in state.items() if value is not None}
    shaped = {name: v for name, v in kept.items() if isinstance(v, Tensor) and tuple(v.shape) == _SHAPE}
    counters = {name: value for name, value in kept.items() if name not in shaped}
    for name, value in counters.items():
        if not isinstance(value, Tensor | int | float) or float(value) != 1.0:
            raise ValueError(f"it keeps {name}, which is neither shaped like the parameter nor a count of updates")
    for name, value in shaped.items():
        if not torch.equal(value, value.flatten()[0].expand(_SHAPE)):
            raise ValueError(f"it keeps {name}, whose elements differ before the first gradient")
    return OptimizerTraits(
        moments={name: float(value.flatten()[0]) for name, value in shaped.items()},
        counters=tuple(counters),
        counts_in_tensors=any(isinstance(value, Tensor) for value in counters.values()),
        on_device=getattr(optimizer, "_step_supports_amp_scaling", False),
    )


def _refusal(kind: str, reason: str) -> UserError:
    return UserError(f'optimizer "{kind}" cannot be sharded, so it cannot be used: {reason}')
