"""How a run starts: afresh, or from a checkpoint."""

import os
from collections.abc import Callable
from pathlib import Path

from megatron.checkpoint.folder import check_save_folder, find_checkpoint
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.store import agree_on_checkpoint, load_checkpoint, load_weights
from megatron.config.schema.run_keys import CheckpointKeys
from megatron.engine.training import TrainingEngine
from megatron.errors import UserError
from megatron.hugging_face.published import PublishedModel, load_published, published_name
from megatron.launch.protocol.attempt import Attempt


def keys_of_attempt(keys: CheckpointKeys, attempt: Attempt) -> CheckpointKeys:
    """What this attempt of a run loads: once the run has saved, the newest whole checkpoint of `save`."""
    if not attempt.resumes or keys.save is None:
        return keys
    load = keys.load if published_name(keys.load) is not None else keys.save
    return keys.model_copy(update={"load": load, "finetune": False, "iteration": None, "no_load_optim": False})


def checkpoint_to_load(keys: CheckpointKeys) -> Path | None:
    """The checkpoint to resume from; None for a fresh start.

    `load` equal to `save` and still empty is a fresh start, so the same command starts a run and resumes it. With a
    published model in `load` it is a start from this model.
    Only file sizes are verified here; hashes are verified by all ranks together (`agreed`).
    Raises UserError if anything else that `load` names is missing, and if `save` holds checkpoints of another run or
    another program, which a fresh start would mix with its own.
    """
    save, load = keys.save, keys.save if published_name(keys.load) else keys.load
    resumes = save is not None and load is not None and _same(save, load) and not keys.finetune
    found = find_checkpoint(Path(load), keys.iteration) if load is not None else None
    if load is not None and found is None and not resumes:
        raise UserError(f"load ({load}) has no checkpoint. To start afresh, leave load unset or equal to save")
    if save is None:
        return found
    check_save_folder(Path(save))
    if not resumes and (held := find_checkpoint(Path(save))) is not None:
        raise UserError(
            f"save ({save}) already holds {held.name} of another run. To resume it, set load to the same folder"
            f"{' and leave finetune out' if keys.finetune else ''}; otherwise choose an empty one"
        )
    return found


def check_writable(folder: Path, key: str) -> None:
    """Create `folder`. Raises UserError, naming `key`, where this process cannot write into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{key} ({folder}) cannot be created: {reason}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{key} ({folder}) cannot be written to")


def agreed(checkpoint: Path | None, keys: CheckpointKeys, check: Callable[[Path], None]) -> Path | None:
    """The checkpoint that all ranks resume from: `checkpoint`, unless its content turns out to be damaged.

    Collective. check: applied to the one that is taken instead; raises UserError.
    """
    chosen = agree_on_checkpoint(checkpoint, keys.verify, keys.iteration)
    if chosen is not None and chosen != checkpoint:
        check(chosen)
    return chosen


def begin(
    engine: TrainingEngine,
    checkpoint: Path | None,
    keys: CheckpointKeys,
    published: PublishedModel | None = None,
    base: str | None = None,
) -> tuple[TrainState, str]:
    """Load `checkpoint`, or else `published`, if any, into `engine`. Collective.

    base: the folder of the base of adapters, if it has moved. Returns the first state and a line for the log.
    """
    if checkpoint is None and published is not None:
        load_published(engine, published)
        return TrainState(), f"starting at step 0 with the weights of {published.folder} ({published.family.name})"
    if checkpoint is None:
        return TrainState(), "starting fresh: weights from the seed, step 0"
    if keys.finetune:
        load_weights(engine, checkpoint, base)
        return TrainState(), f"starting at step 0 with the weights of {checkpoint} (finetune)"
    state = load_checkpoint(engine, checkpoint, optimizer=not keys.no_load_optim, base=base)
    without = ", without the optimizer's state (no_load_optim)" if keys.no_load_optim else ""
    left_out = ", ".join(f"{first:,} to {end - 1:,}" for first, end in state.skipped_samples)
    return state, (
        f"resuming from {checkpoint}{without}: step {state.step}, {state.trained_samples:,} samples seen"
        f"{f', left out: {left_out}' if left_out else ''}"
    )


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
