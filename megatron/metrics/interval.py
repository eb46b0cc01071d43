"""Metrics of one logging interval, and its log line.

A step's loss is the mean over the tokens of its global batch, and the interval's is the mean over its steps. Learning
rate, gradient norm and loss scale are those of the last step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.engine.phases import PHASES
from megatron.units import duration, short_number


@dataclass(frozen=True)
class Workload:
    """Work of one step. `flops_per_token` as in `metrics/flops.py`; `peak_flops` of one device, None if unknown."""

    tokens_per_step: int
    flops_per_token: float
    ranks: int
    peak_flops: float | None


@dataclass(frozen=True)
class Interval:
    """Steps since the last log line. `seconds`: time spent training, without validation and saving."""

    steps: int
    seconds: float
    loss: float
    learning_rate: float
    grad_norm: float | None
    loss_scale: float | None
    skipped_steps: int


def interval_metrics(interval: Interval, work: Workload) -> dict[str, float]:
    """Metrics by name, for all writers.

    runtime/iteration_time is in seconds per step; rates are totals of all ranks, except for
    runtime/flops_per_sec_per_gpu (FLOP/s of one rank) and runtime/model_flops_utilization (0 to 1).
    """
    seconds = max(interval.seconds, 1e-9)
    tokens_per_second = interval.steps * work.tokens_per_step / seconds
    flops = tokens_per_second * work.flops_per_token / work.ranks
    values: dict[str, float | None] = {
        "train/lm_loss": interval.loss,
        "train/learning_rate": interval.learning_rate,
        "train/grad_norm": interval.grad_norm,
        "train/loss_scale": interval.loss_scale,
        "train/skipped_steps": interval.skipped_steps or (None if interval.loss_scale is None else 0),
        "runtime/iteration_time": seconds / interval.steps,
        "runtime/tokens_per_sec": tokens_per_second,
        "runtime/flops_per_sec_per_gpu": flops,
        "runtime/model_flops_utilization": flops / work.peak_flops if work.peak_flops else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def log_line(step: int, last_step: int, metrics: Mapping[str, float], on_gpu: bool) -> str:
    """One line, units in the names: `step 1200/320000 | loss 3.214 | lr 5.9e-04 | ... | ETA 1d 4h`.

    metrics: those of `interval_metrics` and `runtime/<phase>_seconds` of PHASES; missing ones are left out of the line.
    """
    per_step = metrics["runtime/iteration_time"]
    parts = [
        f"step {step}/{last_step}",
        f"loss {metrics['train/lm_loss']:.3f}",
        f"lr {metrics['train/learning_rate']:.1e}",
    ]
    if "train/grad_norm" in metrics:
        parts.append(f"grad norm {metrics['train/grad_norm']:.2f}")
    if "train/loss_scale" in metrics:
        parts.append(f"loss scale {metrics['train/loss_scale']:.0f}")
    if metrics.get("train/skipped_steps"):
        parts.append(f"skipped {metrics['train/skipped_steps']:.0f}")
    parts.append(f"{per_step * 1000:.0f} ms/step")
    phases = {name: metrics.get(f"runtime/{name}_seconds") for name in PHASES}
    timed = [
        f"{name.replace('_', ' ')} {1000 * seconds:.1f}" for name, seconds in phases.items() if seconds is not None
    ]
    if timed:
        parts[-1] += f" ({', '.join(timed)})"
    parts.append(f"{short_number(metrics['runtime/tokens_per_sec'])} tokens/s")
    flops_unit = "FLOP/s/gpu" if on_gpu else "FLOP/s/rank"
    parts.append(short_number(metrics["runtime/flops_per_sec_per_gpu"], flops_unit))
    if "runtime/model_flops_utilization" in metrics:
        parts.append(f"MFU {100 * metrics['runtime/model_flops_utilization']:.0f}%")
    parts.append(f"ETA {duration((last_step - step) * per_step)}")
    return " | ".join(parts)
