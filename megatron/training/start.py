"""Where a run begins: fresh, or from a checkpoint."""

import os
from collections.abc import Callable
from pathlib import Path

from megatron.checkpoint.folder import find_checkpoint
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.store import agree_on_checkpoint, load_checkpoint, load_weights
from megatron.config.schema.run_keys import CheckpointKeys
from megatron.engine.training import TrainingEngine
from megatron.errors import UserError


def checkpoint_to_load(keys: CheckpointKeys) -> Path | None:
    """The checkpoint that the run goes on from; None: it starts fresh.

    `load` equal to `save` and still empty is a fresh start: the same command begins a run and goes on with it.
    Only sizes of files are looked at yet: hashes are for all ranks together, when they have met (`agreed`).
    Raises UserError where anything else that `load` names is not there, and where `save` holds another run's
    checkpoints, which a fresh start would mix with its own.
    """
    save, load = keys.save, keys.load
    goes_on = save is not None and load is not None and _same(save, load) and not keys.finetune
    found = find_checkpoint(Path(load), keys.iteration) if load is not None else None
    if load is not None and found is None and not goes_on:
        raise UserError(f"load ({load}) has no checkpoint. To start afresh, leave load unset or equal to save")
    if save is not None and not goes_on and (held := find_checkpoint(Path(save))) is not None:
        raise UserError(
            f"save ({save}) already holds {held.name} of another run. To go on from it, set load to the same folder"
            f"{' and leave finetune out' if keys.finetune else ''}; otherwise choose an empty one"
        )
    return found


def check_writable(folder: Path, key: str) -> None:
    """Make `folder`. Raises UserError, naming `key`, where this process cannot write into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key} ({folder}) cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{key} ({folder}) cannot be written to")


def agreed(checkpoint: Path | None, keys: CheckpointKeys, check: Callable[[Path], None]) -> Path | None:
    """The checkpoint that all ranks go on from, which is `checkpoint` unless its content turns out to be damaged.

    Collective. check: what `checkpoint` was held to, if another is taken for it; raises UserError.
    """
    chosen = agree_on_checkpoint(checkpoint, keys.verify, keys.iteration)
    if chosen is not None and chosen != checkpoint:
        check(chosen)
    return chosen


def begin(engine: TrainingEngine, checkpoint: Path | None, keys: CheckpointKeys) -> tuple[TrainState, str]:
    """Bring `engine` to where the run begins. Returns the state there and a line that says so. Collective."""
    if checkpoint is None:
        return TrainState(), "starting fresh: weights from the seed, step 0"
    if keys.finetune:
        load_weights(engine, checkpoint)
        return TrainState(), f"starting at step 0 with the weights of {checkpoint} (finetune)"
    state = load_checkpoint(engine, checkpoint, optimizer=not keys.no_load_optim)
    without = ", without the optimizer's state (no_load_optim)" if keys.no_load_optim else ""
    return state, f"resuming from {checkpoint}{without}: step {state.step}, {state.consumed_samples:,} samples seen"


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()
