"""The gradient noise scale finds the noise and the signal of gradients that are made up."""

import math

import pytest
import torch

from megatron.checkpoint.state import TrainState
from megatron.engine.figures import BeforeUpdate, GradientSum
from megatron.engine.training import StepOutput
from megatron.training.hooks.base import FinishedStep
from megatron.training.hooks.gradient_noise import GradientNoise, NoiseScale

SIZE, BATCH, STEPS = 1000, 8, 4


class Sum:
    """The sum of gradients, as the engine has it."""

    def __init__(self) -> None:
        self.total = torch.zeros(SIZE)

    def take_square(self) -> torch.Tensor:
        square, self.total = self.total.square().sum(), torch.zeros(SIZE)
        return square


def test_the_noise_scale_is_the_trace_of_the_covariance_over_the_squared_gradient():
    generator = torch.Generator().manual_seed(5)
    gradient, deviation = torch.full((SIZE,), 0.1), 0.8  # of a sample's gradient, in each element
    total = Sum()
    hook = GradientNoise(total, STEPS, BATCH, interval=STEPS)
    told = []
    for number in range(1, 801):
        seen = gradient + deviation / math.sqrt(BATCH) * torch.randn(SIZE, generator=generator)
        total.total += seen
        output = StepOutput(torch.tensor(1.0), seen.norm())
        told.append(hook.after_step(FinishedStep(TrainState(number), output, 1e-3, False)).get("train/noise_scale"))
    assert told[-1] == pytest.approx(deviation**2 * SIZE / (0.1**2 * SIZE), rel=0.1)
    assert [number for number, value in enumerate(told, 1) if value] == list(range(STEPS, 801, STEPS))


class OneRank:
    """Figures of parameters that this rank owns whole."""

    def owned(self, stepped: torch.Tensor, values: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        return [("", values.view(-1))]

    def squares(self, views: list[tuple[str, torch.Tensor]]) -> torch.Tensor:
        return torch.stack([view.square().sum() for _, view in views])

    def over_all_ranks(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(parts)


def test_a_sum_has_the_gradients_since_the_last_one_also_of_a_parameter_that_comes_later():
    three, two = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([three, two], lr=0.1)
    total = GradientSum(OneRank(), BeforeUpdate(optimizer))

    def step(of_three: float, of_two: float | None) -> None:
        three.grad = torch.full((3,), of_three)
        two.grad = None if of_two is None else torch.full((2,), of_two)
        optimizer.step()

    for gradients, square in (
        ([(1.0, None), (2.0, 4.0)], 3 * 3**2 + 2 * 4**2),
        ([(math.nan, 1.0)], math.nan),
        ([(1.0, None), (1.0, None)], 3 * 2**2),
        ([(1.0, 5.0), (1.0, -1.0)], 3 * 2**2 + 2 * 4**2),
    ):
        for pair in gradients:
            step(*pair)
        assert total.take_square().item() == pytest.approx(square, nan_ok=True)
    step(7.0, 7.0)
    total.forget()
    step(1.0, 1.0)
    assert total.take_square().item() == 5


def test_a_window_with_a_skipped_step_counts_for_nothing():
    total = Sum()
    hook = GradientNoise(total, 2, BATCH, interval=1)
    scales = []
    for number, (element, norm) in enumerate([(1.0, 1.0), (-0.9, 0.9), (1.0, math.inf), (math.nan, 1.0)], 1):
        total.total[0] += element
        output = StepOutput(torch.tensor(1.0), torch.tensor(norm))
        hook.after_step(FinishedStep(TrainState(number), output, 1e-3, False))
        scales.append((hook._scale.noise, hook._scale.signal))
    assert scales[1] == scales[3] != (0, 0)


def test_there_is_no_scale_while_the_signal_drowns():
    scale = NoiseScale(8, 16)
    scale.add(1.0, 0.5)  # the big gradient is as small as noise alone makes it
    assert scale.value is None
