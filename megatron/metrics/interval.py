"""Metrics of one logging interval, and its log line.

A step's loss is the mean over the tokens of its global batch, and the interval's is the mean over its steps. Learning
rate, gradient norm and loss scale are those of the last step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.config.flops import TokenFlops
from megatron.engine.phases import PHASES
from megatron.units import duration, short_number


@dataclass(frozen=True)
class Workload:
    """Work of one step. `flops` are those of one token; `peak_flops` of one device, None if unknown."""

    tokens_per_step: int
    samples_per_step: int
    flops: TokenFlops
    ranks: int
    peak_flops: float | None
    peak_name: str = ""  # what `peak_flops` is, if not the peak of the device in the run's precision


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

    runtime/iteration_time is in seconds per step; rates are totals of all ranks, except for FLOP/s, which are those of
    one rank. Utilizations are 0 to 1. FLOPs are counted in up to three ways (`config/flops.py`):
    runtime/flops_per_sec_per_gpu and runtime/model_flops_utilization by the common formula of MFU;
    runtime/executed_flops_per_sec_per_gpu and runtime/executed_flops_utilization by what the model executes, without
    recomputation; runtime/hardware_flops_per_sec_per_gpu and runtime/hardware_flops_utilization, only if blocks are
    recomputed, with what is recomputed.
    """
    seconds = max(interval.seconds, 1e-9)
    tokens_per_second = interval.steps * work.tokens_per_step / seconds
    rate, peak = tokens_per_second / work.ranks, work.peak_flops
    recomputes = work.flops.recomputed > 0
    values: dict[str, float | None] = {
        "train/lm_loss": interval.loss,
        "train/learning_rate": interval.learning_rate,
        "train/grad_norm": interval.grad_norm,
        "train/loss_scale": interval.loss_scale,
        "train/skipped_steps": interval.skipped_steps,
        "runtime/iteration_time": seconds / interval.steps,
        "runtime/tokens_per_sec": tokens_per_second,
        "runtime/samples_per_sec": interval.steps * work.samples_per_step / seconds,
        "runtime/flops_per_sec_per_gpu": rate * work.flops.common,
        "runtime/executed_flops_per_sec_per_gpu": rate * work.flops.executed,
        "runtime/hardware_flops_per_sec_per_gpu": rate * work.flops.hardware if recomputes else None,
        "runtime/model_flops_utilization": rate * work.flops.common / peak if peak else None,
        "runtime/executed_flops_utilization": rate * work.flops.executed / peak if peak else None,
        "runtime/hardware_flops_utilization": rate * work.flops.hardware / peak if peak and recomputes else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def log_line(step: int, last_step: int, metrics: Mapping[str, float], on_gpu: bool, peak_name: str = "") -> str:
    """One line, units in the names: `step 1200/320000 | loss 3.214 | lr 5.9e-04 | ... | ETA 1d 4h`.

    peak_name: as in `Workload`; the line then says of what the utilization is a share.
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
    unit = "FLOP/s/gpu" if on_gpu else "FLOP/s/rank"
    rates = (metrics.get(f"runtime/{way}flops_per_sec_per_gpu") for way in ("", "executed_", "hardware_"))
    parts.append(_counted(*(None if rate is None else short_number(rate, unit) for rate in rates)))
    if "runtime/model_flops_utilization" in metrics:
        shares = (metrics.get(f"runtime/{way}_flops_utilization") for way in ("model", "executed", "hardware"))
        parts.append(f"MFU {_counted(*(None if share is None else f'{share:.0%}' for share in shares))}")
        parts[-1] += f" of {peak_name}" if peak_name else ""
    parts.append(f"ETA {duration((last_step - step) * per_step)}")
    return " | ".join(parts)


def _counted(common: str | None, executed: str | None, hardware: str | None) -> str:
    """A figure by the ways of counting FLOPs; `hardware` is None without recomputation."""
    return f"{common} (executed {executed}{f', with recomputation {hardware}' if hardware else ''})"
