"""Properties of an optimizer that the engine and checkpoints depend on, found by running it on a small tensor.

So an optimizer declares nothing: it is a torch optimizer with a registry entry. In a run it steps fragments of
flattened parameters, and its state is resharded element by element. That is correct for element-wise optimizers (Adam,
SGD, Lion, ...). One that uses whole matrices (Muon, Shampoo, LAMB's norms) would train differently under each layout
and is refused.
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
    """The state that an optimizer keeps for each tensor it steps, and how it skips an update."""

    moments: dict[str, float]  # names of tensors shaped like the parameter -> their elements before the first update
    counters: tuple[str, ...]  # names of the counts of updates
    counts_in_tensors: bool  # whether counters are tensors of one element
    on_device: bool  # like torch's fused ones, it reads `found_inf` and keeps counters on the device

    def fill(self, state: dict[str, Any], stepped: Tensor) -> None:
        """Add missing entries to the `state` of the tensor `stepped`, with their values before the first update."""
        for name, value in self.moments.items():
            if name not in state:
                state[name] = torch.full_like(stepped.detach(), value, memory_format=torch.preserve_format)
        device = stepped.device if self.on_device else torch.device("cpu")
        for name in self.counters:
            if name not in state:
                state[name] = torch.zeros((), device=device) if self.counts_in_tensors else 0


def traits_of(plan: OptimizerPlan) -> OptimizerTraits:
    """The traits of the optimizer that `plan.kind` names.

    Raises UserError if it cannot be sharded: its update of an element depends on other elements, or it keeps state
    that is neither shaped like the parameter nor a count of updates.
    """
    try:
        # without gradient and decay, moments keep their values from before the first update
        optimizer, parameter = _stepped(replace(plan, weight_decay=0.0), [torch.zeros(_SHAPE)])
        traits = _traits(optimizer, optimizer.state[parameter])
        gradients = list(torch.randn((_UPDATES, *_SHAPE), generator=torch.Generator().manual_seed(1)))
        whole, flat = _stepped(plan, gradients), _stepped(plan, [g.flatten() for g in gradients], traits)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise _refusal(plan.kind, f"{type(error).__name__}: {error}") from error
    if not torch.equal(whole[1].detach().flatten(), flat[1].detach()):
        raise _refusal(plan.kind, "a matrix and its flattened copy get different updates")
    return traits


def _stepped(
    plan: OptimizerPlan, gradients: Sequence[Tensor], traits: OptimizerTraits | None = None
) -> tuple[Optimizer, nn.Parameter]:
    """The optimizer after one update per gradient. traits: create its state beforehand, as in a run."""
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
    """Classify the state after one update with a zero gradient."""
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
