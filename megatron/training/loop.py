"""The training loop. Everything else is set-up (`run.py`) or a hook."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from megatron.checkpoint.state import TrainState
from megatron.metrics.writers import MetricWriters
from megatron.optimizers.schedules import learning_rate
from megatron.training.hooks.base import FinishedStep, Hook, MicroBatches, Run
from megatron.training.rewinding import Rewinding
from megatron.training.stopping import StopVote


def train_steps(
    run: Run,
    state: TrainState,
    batches: Iterator[MicroBatches],
    hooks: Sequence[Hook],
    writers: MetricWriters,
    stop_vote: StopVote | None = None,
    rewinding: Rewinding | None = None,
) -> TrainState:
    """Train from `state` until `run.last_step` steps are done, and return the state there. Collective over all ranks.

    batches: this rank's micro-batches, starting at `state.consumed_samples`. stop_vote: is held during every step but
    the last, and may end the run with that step, or have `rewinding` take it back. After every step the hooks are
    called in turn, and what they return is written as the step's metrics.
    """
    batch, last_step = run.plan.batch, run.last_step
    with ExitStack() as closing:
        for hook in hooks:
            closing.callback(hook.close)
        batches = _watched(batches, hooks)
        while state.step < last_step:
            vote = stop_vote if state.step + 1 < last_step else None
            if vote is not None:
                vote.begin(rewinding.asked if rewinding else None)
            rate = learning_rate(run.plan.schedule, state.step)
            output = run.engine.train_batch(next(batches), step=state.step, learning_rate=rate)
            state = state.after_step(batch.global_size, batch.tokens_per_step)
            stop = vote is not None and vote.ends_run()
            metrics: dict[str, float] = {}
            step = FinishedStep(state, output, rate, stop or state.step == last_step, metrics, is_stop=stop)
            for hook in hooks:
                metrics |= hook.after_step(step)
            writers.write(state.step, metrics)
            if stop:
                break
            if rewinding and vote and vote.spike and (back := rewinding.go_back(vote.spike, state)):
                state = back
                batches = _watched(rewinding.read_batches(state), hooks)
                writers.go_back(state.step)
    return state


def _watched(batches: Iterator[MicroBatches], hooks: Sequence[Hook]) -> Iterator[MicroBatches]:
    for hook in hooks:
        batches = hook.watched(batches)
    return batches


def final_step(done: int, train_iters: int, exit_interval: int | None) -> int:
    """The last step of a run: `train_iters`, or the next multiple of `exit_interval` if that comes first."""
    if exit_interval is None:
        return train_iters
    return min(train_iters, (done // exit_interval + 1) * exit_interval)
