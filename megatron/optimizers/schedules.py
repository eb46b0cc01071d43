"""Learning rate as a pure function of the step.

A resumed run computes the same rate for the same step, so checkpoints store no schedule.
Every schedule warms up linearly, decays from `peak` towards `minimum`, and stays at its final value.
"""

import math

from megatron import registry
from megatron.config.plan import SchedulePlan


def learning_rate(schedule: SchedulePlan, step: int) -> float:
    """The rate for `step` (0 is the first step of the run).

    Warm-up reaches `peak` at step `warmup_steps`; the rate of step 0 is `peak / (warmup_steps + 1)`.
    """
    if step < schedule.warmup_steps:
        return schedule.peak * (step + 1) / (schedule.warmup_steps + 1)
    span = max(1, schedule.decay_steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    rate: float = registry.resolve("lr_schedule", schedule.kind)(progress, schedule.peak, schedule.minimum)
    return rate


def constant(progress: float, peak: float, minimum: float) -> float:
    """No decay: always `peak`."""
    return peak


def linear(progress: float, peak: float, minimum: float) -> float:
    """A straight line from `peak` to `minimum`."""
    return minimum + (peak - minimum) * (1.0 - progress)


def cosine(progress: float, peak: float, minimum: float) -> float:
    """Half a cosine wave (Loshchilov and Hutter, https://arxiv.org/abs/1608.03983, without restarts)."""
    return minimum + (peak - minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))


def exponential(progress: float, peak: float, minimum: float) -> float:
    """Down to half of `peak` at the end of the decay, as in GPT-NeoX, and never below `minimum`."""
    return max(minimum, peak * math.pow(0.5, progress))
