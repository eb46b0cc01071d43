"""The interface of a hook, and the run that hooks are built from.

A hook is one file in this folder and one line in the registry's kind "hook": a function of `Run` that returns the hook,
or None if the run does not need it. Hooks are called in the order of that table.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from megatron import registry
from megatron.checkpoint.state import TrainState
from megatron.config.plan import Plan
from megatron.config.schema.config import Config
from megatron.data.build import Sources
from megatron.engine.training import MicroBatch, StepOutput, TrainingEngine
from megatron.events import EventLog
from megatron.tokenizer.base import Tokenizer
from megatron.training.clock import Clock, ReadingTime
from megatron.training.liveness import Liveness

NOTHING: Mapping[str, float] = {}
MicroBatches = list[MicroBatch]  # this rank's, of one step


@dataclass(frozen=True)
class Run:
    """A training run that is set up.

    clock: measures training; a slow hook pauses it. liveness: a slow hook reports its phase to it. events: a file and
    listeners on rank 0, nothing elsewhere. reading: measures the loader of samples.
    """

    config: Config
    plan: Plan
    tokenizer: Tokenizer
    sources: Sources
    engine: TrainingEngine
    first_step: int  # steps done before this run
    last_step: int  # steps done when it ends
    clock: Clock
    liveness: Liveness = field(default_factory=Liveness)
    events: EventLog = field(default_factory=EventLog)
    reading: ReadingTime = field(default_factory=ReadingTime)


@dataclass(frozen=True)
class FinishedStep:
    """An optimizer step that is done; `state` is the state after it."""

    state: TrainState
    output: StepOutput
    learning_rate: float
    is_last: bool  # of this run
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the hooks called before this one
    is_stop: bool = False  # the last because of a signal or time limit: there may be little time left

    def is_due(self, interval: int | None) -> bool:
        """Whether this step is the last one or a multiple of `interval` (None: no interval)."""
        return self.is_last or (interval is not None and self.state.step % interval == 0)


class Hook(ABC):
    """Called after each step on every rank. It must not change the training."""

    @abstractmethod
    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Do what is due after `step`, and return the metrics to record for it."""

    def watched(self, batches: Iterator[MicroBatches]) -> Iterator[MicroBatches]:
        """Wrap `batches`, to act before and after the batch of a step is loaded."""
        return batches

    def before_rewind(self) -> None:  # noqa: B027  # most hooks have nothing under way
        """Called before the run goes back to a checkpoint: finish what uses checkpoints or the process group."""

    def rewound(self, state: TrainState) -> None:  # noqa: B027  # most hooks remember nothing
        """Called when the run has gone back to `state`: forget the steps after it."""

    def close(self) -> None:  # noqa: B027  # most hooks have nothing to close
        """Called once when the loop has ended, by an exception or not."""


def build_hooks(run: Run) -> list[Hook]:
    """The hooks of `run`, in the order of the registry."""
    built = [registry.resolve("hook", name)(run) for name in registry.names("hook")]
    return [hook for hook in built if hook is not None]
