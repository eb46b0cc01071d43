"""What a hook of the training loop is, and what it is made from.

A hook is one file beside this one and one line in the registry's kind "hook": a function of `Run` that returns the
hook, or None where the run does not ask for it. The order of the table is the order in which hooks look at a step.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from megatron import registry
from megatron.checkpoint.state import TrainState
from megatron.config.plan import Plan
from megatron.config.schema.config import Config
from megatron.data.datasets import Sources
from megatron.engine.training import MicroBatch, StepOutput, TrainingEngine
from megatron.tokenizer.base import Tokenizer
from megatron.training.clock import Clock
from megatron.training.liveness import Liveness

NOTHING: Mapping[str, float] = {}
MicroBatches = list[MicroBatch]  # this rank's, of one step


@dataclass(frozen=True)
class Run:
    """A training run about to begin.

    clock: measures training; a hook that takes long pauses it. liveness: gets a beat from a hook that takes long.
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


@dataclass(frozen=True)
class FinishedStep:
    """One optimizer step, done: `state` counts it in."""

    state: TrainState
    output: StepOutput
    learning_rate: float
    is_last: bool  # of this run
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the hooks that looked before this one
    is_stop: bool = False  # it is the last because somebody asked for an end: there may be little time left

    def is_due(self, interval: int | None) -> bool:
        """Whether something that happens every `interval` steps (None: never) and at the end happens now."""
        return self.is_last or (interval is not None and self.state.step % interval == 0)


class Hook(ABC):
    """Looks at each finished step, on every rank; it may do work of its own there, but not change the training."""

    @abstractmethod
    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Do what is due after `step`, and return the metrics to put on record with it."""

    def watched(self, batches: Iterator[MicroBatches]) -> Iterator[MicroBatches]:
        """`batches`, one of which is asked for as each step begins: the place to act before and after it is there."""
        return batches

    def close(self) -> None:  # noqa: B027  # most hooks have nothing to close
        """The loop has ended, well or badly; called once."""


def build_hooks(run: Run) -> list[Hook]:
    """The hooks that `run` asks for, in their order."""
    built = [registry.resolve("hook", name)(run) for name in registry.names("hook")]
    return [hook for hook in built if hook is not None]
