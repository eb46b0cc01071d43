"""The training loop. Everything else is set-up (`run.py`) or a hook."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from megatron.checkpoint.state import TrainState
from megatron.config.plan import BatchPlan
from megatron.engine.training import TrainingEngine
from megatron.metrics.writers import MetricWriters
from megatron.training.hooks.base import FinishedStep, Hook, MicroBatches


def train_steps(
    engine: TrainingEngine,
    batches: Iterator[MicroBatches],
    learning_rate: Callable[[int], float],
    state: TrainState,
    last_step: int,
    batch: BatchPlan,
    hooks: Sequence[Hook],
    writers: MetricWriters,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Train from `state` until `last_step` steps are done, and return the state there. Collective over all ranks.

    asked_to_stop: asked after every step but the last; true ends the run with that step, on all ranks alike.

    batches: this rank's micro-batches, from the one after `state.consumed_samples` on. learning_rate: of a step,
    counted from 0. After every step each hook looks at it in turn, and what they return is written as its metrics.
    """
    with ExitStack() as closing:
        for hook in hooks:
            closing.callback(hook.close)
            batches = hook.watched(batches)
        while state.step < last_step:
            rate = learning_rate(state.step)
            output = engine.train_batch(next(batches), step=state.step, learning_rate=rate)
            state = state.after_step(batch.global_size, batch.tokens_per_step)
            stop = state.step < last_step and asked_to_stop()
            metrics: dict[str, float] = {}
            step = FinishedStep(state, output, rate, stop or state.step == last_step, metrics, is_stop=stop)
            for hook in hooks:
                metrics |= hook.after_step(step)
            writers.write(state.step, metrics)
            if stop:
                break
    return state


def final_step(done: int, train_iters: int, exit_interval: int | None) -> int:
    """The step that a run ends at: `train_iters`, or the next multiple of `exit_interval` if that comes first."""
    if exit_interval is None:
        return train_iters
    return min(train_iters, (done // exit_interval + 1) * exit_interval)
