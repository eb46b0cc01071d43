"""Hook: log line and metrics, every `log_interval` steps."""

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron.checkpoint.state import TrainState
from megatron.config.flops import token_flops
from megatron.engine.settings import DTYPES
from megatron.metrics.interval import Interval, Workload, interval_metrics, log_line
from megatron.metrics.peaks import measured_flops, peak_flops
from megatron.training.clock import Clock
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, Run

log = logging.getLogger(__name__)

MEASURED = "a measured matmul"


class MetricsLog(Hook):
    """Keeps losses on the device and reads them once per interval, so that steps do not synchronize with it."""

    def __init__(self, interval: int, last_step: int, work: Workload, clock: Clock, shows_phases: bool = False) -> None:
        """interval: in steps. last_step: of the whole training, for the time left. shows_phases: in the log line."""
        self._shows_phases = shows_phases
        self._interval, self._last_step, self._work, self._clock = interval, last_step, work, clock
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Log if due, and at the last step of the run."""
        self._losses.append(step.output.loss.detach().float())
        self._norms.append(step.output.norm)
        if not step.is_due(self._interval):
            return NOTHING
        losses, norms = (torch.stack(collected).tolist() for collected in (self._losses, self._norms))
        skipped = [not math.isfinite(norm) for norm in norms]
        self._losses, self._norms = [], []
        figures = Interval(
            steps=len(losses),
            seconds=self._clock.lap(),
            loss=mean_loss(losses, skipped),
            learning_rate=step.learning_rate,
            grad_norm=None if skipped[-1] else norms[-1],
            loss_scale=step.output.loss_scale,
            skipped_steps=sum(skipped),
        )
        metrics = interval_metrics(figures, self._work)
        on_gpu = step.output.loss.is_cuda
        known = {**(step.metrics if self._shows_phases else NOTHING), **metrics}
        log.info("%s", log_line(step.state.step, self._last_step, known, on_gpu, self._work.peak_name))
        return metrics

    def rewound(self, state: TrainState) -> None:
        """Drop what was collected since the last line, and start a new interval."""
        self._losses, self._norms = [], []
        self._clock.lap()


def mean_loss(losses: Sequence[float], skipped: Sequence[bool]) -> float:
    """The mean over steps, without losses of skipped steps that are not finite: those are counted separately."""
    counted = [loss for loss, out in zip(losses, skipped, strict=True) if math.isfinite(loss) or not out]
    return sum(counted) / len(counted) if counted else math.nan


def workload(run: Run) -> Workload:
    """Tokens, samples and FLOPs of a step, for the rates in the log."""
    plan, device = run.plan, run.engine.grid.device
    configured, name = run.config.logging.peak_theoretical_tflops, peak_name(run)
    peak: float | None
    if name == MEASURED:
        peak = measured_flops(DTYPES[plan.engine.precision])
    else:
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_flops(configured, card, plan.engine.precision)
    batch, ranks = plan.batch, plan.layout.world_size
    return Workload(batch.tokens_per_step, batch.global_size, token_flops(plan), ranks, peak, name)


def peak_name(run: Run) -> str:
    """What utilizations are shares of, if it is not the peak of the device in the run's precision; otherwise ""."""
    if run.engine.grid.device.type == "cpu" and run.config.logging.peak_theoretical_tflops is None:
        return MEASURED
    return "the bf16 peak" if run.plan.model.float8 else ""


def metrics_log(run: Run) -> MetricsLog:
    """Registry entry: in every run."""
    last_step = run.config.training.train_iters or run.last_step
    shows_phases = run.config.profiling.wall_clock_breakdown
    return MetricsLog(run.config.logging.log_interval, last_step, workload(run), run.clock, shows_phases)
