"""Optimizers by name, and which parameters they decay.

An optimizer is a function of groups and plan that returns a torch optimizer, with an entry in the registry. Its traits
are found by running it (`traits.py`). The engine passes it to DeepSpeed, which shards it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from megatron import registry
from megatron.config.plan import OptimizerPlan


def build_optimizer(parameters: Iterable[nn.Parameter], plan: OptimizerPlan) -> Optimizer:
    """The optimizer that `plan.kind` names, over this rank's `parameters`."""
    groups = parameter_groups(parameters, plan.weight_decay)
    optimizer: Optimizer = registry.resolve("optimizer", plan.kind)(groups, plan)
    return optimizer


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices decay, vectors (biases, norm weights) do not. Empty groups are omitted.

    Zero is not a natural centre for a norm's scale or a bias.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if _is_matrix(p)], "weight_decay": weight_decay},
        {"params": [p for p in trained if not _is_matrix(p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Its own shape says nothing under ZeRO 3, which keeps partitions elsewhere."""
    return len(getattr(parameter, "global_shape", parameter.shape)) > 1


def adamw(groups: Sequence[dict[str, Any]], plan: OptimizerPlan) -> Optimizer:
    """AdamW with decoupled weight decay (https://arxiv.org/abs/1711.05101), in one fused kernel."""
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=plan.betas, eps=plan.epsilon, fused=True)


def sgd(groups: Sequence[dict[str, Any]], plan: OptimizerPlan) -> Optimizer:
    """Stochastic gradient descent in one fused kernel; the first of `betas` is its momentum.

    Its weight decay is L2: added to the gradient, and thus part of the momentum.
    """
    return torch.optim.SGD(groups, lr=plan.learning_rate, momentum=plan.betas[0], fused=True)
