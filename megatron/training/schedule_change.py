"""What resuming with other settings changes silently: the learning rate of a step, and the samples of a step.

Both are allowed. The schedule's length follows `train_iters`, so training longer moves the learning rate as well.
"""

from collections.abc import Mapping
from typing import Any

from megatron import registry
from megatron.checkpoint.state import TrainState
from megatron.config.plan import Plan, SchedulePlan
from megatron.config.resolve import schedule_of
from megatron.config.schema.config import Config
from megatron.optimizers.schedules import learning_rate

_LENGTH = ("train_iters", "lr_decay_iters", "lr_decay_fraction")
_COMPARED = 256  # steps at which two schedules are compared, spread over the rest of the run


def resumed_changes(config: Config, plan: Plan, written: Mapping[str, Any], state: TrainState) -> list[str]:
    """One line each for another learning rate and another batch size than in the run that is resumed.

    written: the flat configuration of the run that wrote the checkpoint. state: what was loaded from it.
    """
    return [*_schedule_changes(config, plan.schedule, written, state.step), *_batch_changes(plan, written, state)]


def _schedule_changes(config: Config, here: SchedulePlan, written: Mapping[str, Any], step: int) -> list[str]:
    before = _with_schedule_of(config, written)
    there = schedule_of(before)
    if there.kind not in registry.names("lr_schedule"):
        return [f"another learning rate than before: lr_decay_style is {here.kind}, was {there.kind} of a plugin"]
    if (moved := _first_difference(here, there, step, config.training.train_iters or step)) is None:
        return []
    keys = _schedule_keys(config, before)
    causes = [f"{key} is {mine}, was {theirs}" for key, mine, theirs in keys if mine != theirs]
    return [
        f"another learning rate than before: at step {moved} it is {learning_rate(here, moved):.4g} instead of "
        f"{learning_rate(there, moved):.4g} ({', '.join(causes)}); to keep the schedule: "
        f"{' '.join(_restoring(config, before, here, there))}"
    ]


def _with_schedule_of(config: Config, written: Mapping[str, Any]) -> Config:
    """`config` with the schedule of the configuration that was written; keys that it lacks stay as they are."""
    keys, params = config.optimizer, written.get("optimizer", {}).get("params", {})
    names = ("lr_decay_style", "lr_decay_iters", "lr_decay_fraction", "min_lr", "warmup")
    chosen = {name: written[name] for name in names if name in written}
    lr = keys.optimizer.params.model_copy(update={"lr": params["lr"]} if "lr" in params else {})
    chosen |= {"optimizer": keys.optimizer.model_copy(update={"params": lr})}
    length = {"train_iters": written["train_iters"]} if "train_iters" in written else {}
    return config.model_copy(
        update={
            "optimizer": keys.model_copy(update=chosen),
            "training": config.training.model_copy(update=length),
        }
    )


def _first_difference(here: SchedulePlan, there: SchedulePlan, step: int, last_step: int) -> int | None:
    """The first step compared, from `step` on, at which the learning rates differ; None if they never do."""
    left = last_step - step
    if here == there or left <= 0:
        return None
    compared = sorted({step + left * number // _COMPARED for number in range(_COMPARED)})
    return next((each for each in compared if learning_rate(here, each) != learning_rate(there, each)), None)


def _schedule_keys(here: Config, there: Config) -> list[tuple[str, Any, Any]]:
    """(key, value here, value there) of all keys that the schedules follow from, those of their length first."""
    mine, theirs = here.optimizer, there.optimizer
    lengths = [(key, getattr(mine, key), getattr(theirs, key)) for key in ("lr_decay_iters", "lr_decay_fraction")]
    if mine.lr_decay_iters is None or theirs.lr_decay_iters is None:
        lengths.insert(0, ("train_iters", here.training.train_iters, there.training.train_iters))
    others = [(key, getattr(mine, key), getattr(theirs, key)) for key in ("lr_decay_style", "warmup", "min_lr")]
    return [*lengths, *others, ("optimizer.params.lr", mine.optimizer.params.lr, theirs.optimizer.params.lr)]


def _restoring(config: Config, before: Config, here: SchedulePlan, there: SchedulePlan) -> list[str]:
    """The overrides that give the old schedule back."""
    overrides = []
    if here.decay_steps != there.decay_steps:
        overrides.append(f"lr_decay_iters={there.decay_steps}")
        if config.optimizer.lr_decay_fraction is not None:
            overrides.append("lr_decay_fraction=null")
    changed = ((key, theirs) for key, mine, theirs in _schedule_keys(config, before) if mine != theirs)
    return [*overrides, *(f"{key}={value}" for key, value in changed if key not in _LENGTH)]


def _batch_changes(plan: Plan, written: Mapping[str, Any], state: TrainState) -> list[str]:
    size = written.get("train_batch_size")
    if size is None and state.step and state.trained_samples % state.step == 0:
        size = state.trained_samples // state.step
    if size is None or size == plan.batch.global_size:
        return []
    return [
        f"another batch size than before: a step is {plan.batch.global_size} samples instead of {size}; train_iters "
        f"and the learning rate count steps; to keep it: train_batch_size={size}"
    ]
