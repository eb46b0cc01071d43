"""Hook: the norm of the weights with every log line; norms of each parameter and statistics of blocks on request."""

from collections.abc import Iterator, Mapping
from math import sqrt

from megatron.checkpoint.state import TrainState
from megatron.config.schema.run_keys import LoggingKeys
from megatron.engine.optimizer_state import MASTER
from megatron.engine.training import TrainingEngine
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, MicroBatches, Run

GRADIENT = "gradient"


class Norms(Hook):
    """Norms of the whole model. What is read of a step's gradients and activations is read in logged steps only."""

    def __init__(self, engine: TrainingEngine, keys: LoggingKeys, first_step: int, last_step: int) -> None:
        """first_step, last_step: steps done before the run, and when it ends. Collective over all ranks."""
        self._keys, self._done, self._last_step = keys, first_step, last_step
        self._figures = engine.parameter_figures()
        self._gradients = engine.gradient_squares(self._figures) if keys.log_grad_norm else None
        self._outputs = engine.block_outputs() if keys.log_activations else None
        self._moments = engine.state.moments if keys.log_optimizer_states else ()

    def watched(self, batches: Iterator[MicroBatches]) -> Iterator[MicroBatches]:
        """Look at the gradients and activations of the next step if it is logged."""
        while True:
            batch = next(batches)
            due = (self._done + 1) % self._keys.log_interval == 0 or self._done + 1 == self._last_step
            for watch in (self._gradients, self._outputs):
                if watch is not None:
                    watch.wanted = due
            yield batch

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """The norms if they are due. Collective over all ranks."""
        self._done = step.state.step
        if not step.is_due(self._keys.log_interval):
            return NOTHING
        found = self._figures.state_squares(MASTER, *self._moments)
        if self._gradients is not None and (squares := self._gradients.take()) is not None:
            found[GRADIENT] = squares
        sums = dict(zip(found, self._figures.over_all_ranks(list(found.values())).tolist(), strict=True))
        metrics = {"train/param_norm": sqrt(sum(sums[MASTER]))}
        if self._keys.log_param_norm:
            metrics |= self._by_name("parameter_norms/{}", sums[MASTER])
        if GRADIENT in sums:
            metrics |= self._by_name("gradient_norms/{}", sums[GRADIENT])
        for moment in self._moments:
            metrics |= self._by_name(f"optimizer_state_norms/{{}}_{moment}", sums[moment])
        return metrics | self._statistics()

    def rewound(self, state: TrainState) -> None:
        """Count the steps from there."""
        self._done = state.step

    def _by_name(self, form: str, squares: list[float]) -> dict[str, float]:
        return {form.format(name): sqrt(square) for name, square in zip(self._figures.names, squares, strict=True)}

    def _statistics(self) -> dict[str, float]:
        if self._outputs is None or not self._outputs.wanted:
            return {}
        roots, largest = self._outputs.take()
        named = {f"activations_rms/blocks.{index}": value for index, value in enumerate(roots)}
        return named | {f"activations_max/blocks.{index}": value for index, value in enumerate(largest)}


def norms(run: Run) -> Norms:
    """Registry entry: in every run."""
    return Norms(run.engine, run.config.logging, run.first_step, run.last_step)
