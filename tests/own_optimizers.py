"""A plugin with optimizers that Deepy does not know: its own ones, and some of torch."""

import torch
from torch.optim import Optimizer

DEEPY_REGISTRY = {
    "optimizer": {
        "signs": "tests.own_optimizers:signs",
        "adagrad": "tests.own_optimizers:adagrad",
        "muon": "tests.own_optimizers:muon",
        "nadam": "tests.own_optimizers:nadam",
        "whole_norm": "tests.own_optimizers:whole_norm",
    }
}


class Signs(Optimizer):
    """Lion (https://arxiv.org/abs/2302.06675), and a count of its updates, as a plain number."""

    def __init__(self, groups, lr, betas):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(momentum=torch.zeros_like(parameter), updates=0)
                state["updates"] += 1
                direction = state["momentum"].lerp(parameter.grad, 1 - first).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
                state["momentum"].lerp_(parameter.grad, 1 - second)


class WholeNorm(Optimizer):
    """Steps whose length depends on the rows of a matrix: it cannot work on slices of it."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                length = parameter.grad.norm(dim=-1, keepdim=True).clamp(min=1e-8)
                parameter.sub_(parameter.grad / length, alpha=group["lr"])


def signs(groups, plan):
    return Signs(groups, plan.learning_rate, plan.betas)


def adagrad(groups, plan):
    return torch.optim.Adagrad(groups, lr=plan.learning_rate, initial_accumulator_value=0.1)


def muon(groups, plan):
    return torch.optim.Muon(groups, lr=plan.learning_rate)


def nadam(groups, plan):
    return torch.optim.NAdam(groups, lr=plan.learning_rate)


def whole_norm(groups, plan):
    return WholeNorm(groups, plan.learning_rate)
