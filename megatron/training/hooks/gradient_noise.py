"""Hook: the gradient noise scale, with `log_gradient_noise_scale`.

The simple noise scale of appendix A.1 of https://arxiv.org/abs/1812.06162: from the squared norms of gradients of small
batches (B samples) and of a big one (n B samples),

    |G|^2 = (nB |G_big|^2 - B |G_small|^2) / (nB - B)        S = (|G_small|^2 - |G_big|^2) / (1/B - 1/(nB))

are without bias, and their quotient S / |G|^2 is the batch size, in samples, beyond which larger batches help little.
The small batches are n whole steps, and the big one is all of them together: gradients of single micro-batches and
replicas are not kept apart under ZeRO and in pipelines, and so it is the same under every layout. The weights move
during the n steps, which at usual learning rates changes the gradient little.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from megatron.checkpoint.state import TrainState
from megatron.engine.figures import GradientSum
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, Run

DECAY = 0.95  # of a window's weight, with each window: the mean is over about 20 of them


@dataclass
class NoiseScale:
    """Moving averages of S and |G|^2. A quotient of averages is biased far less than an average of quotients."""

    small: int  # samples of a small batch
    big: int
    noise: float = 0.0
    signal: float = 0.0

    def add(self, small_square: float, big_square: float) -> None:
        """Take the squared norms of one window, `small_square` a mean over its small batches."""
        noise = (small_square - big_square) / (1 / self.small - 1 / self.big)
        signal = (self.big * big_square - self.small * small_square) / (self.big - self.small)
        self.noise = DECAY * self.noise + (1 - DECAY) * noise
        self.signal = DECAY * self.signal + (1 - DECAY) * signal

    @property
    def value(self) -> float | None:
        """In samples; None while one of the averages is not positive."""
        return self.noise / self.signal if self.noise > 0 and self.signal > 0 else None


class GradientNoise(Hook):
    """Adds up the gradients of `steps` steps, on the device, and reads the norms in logged steps."""

    def __init__(self, total: GradientSum, steps: int, batch: int, interval: int) -> None:
        """steps: of a window, at least 2. batch: samples of a step. interval: of log lines."""
        self._total, self._steps, self._interval = total, steps, interval
        self._norms: list[Tensor] = []
        self._windows: list[Tensor] = []  # of two squares each: of a small batch, of the big one
        self._scale = NoiseScale(batch, steps * batch)

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """The noise scale if it is due, and known. Collective over all ranks at the end of a window."""
        self._norms.append(step.output.norm)
        if len(self._norms) == self._steps:
            small = torch.stack(self._norms).square().mean()
            big = self._total.take_square() / self._steps**2
            self._windows.append(torch.stack((small, big)))
            self._norms = []
        if not step.is_due(self._interval) or not self._windows:
            return NOTHING
        for small_square, big_square in torch.stack(self._windows).tolist():
            if isfinite(small_square) and isfinite(big_square):  # else the window has a skipped step
                self._scale.add(small_square, big_square)
        self._windows = []
        return NOTHING if self._scale.value is None else {"train/noise_scale": self._scale.value}

    def rewound(self, state: TrainState) -> None:
        """Begin the next window."""
        self._norms, self._windows = [], []
        self._total.forget()


def gradient_noise(run: Run) -> GradientNoise | None:
    """Registry entry: with `log_gradient_noise_scale`."""
    keys = run.config.logging
    if not keys.log_gradient_noise_scale:
        return None
    total = run.engine.gradient_sum(run.engine.parameter_figures())
    return GradientNoise(total, keys.gradient_noise_scale_n_batches, run.plan.batch.global_size, keys.log_interval)
