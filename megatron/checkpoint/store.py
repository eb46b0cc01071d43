"""Checkpoints on disk: save, find, load.

    <save>/latest                      the name of the newest complete checkpoint
    <save>/global_step1000/state/      tensors, by torch.distributed.checkpoint: "<parameter>/fp32", ".../exp_avg", ...
    <save>/global_step1000/progress.json, config.json

Floor 5. Every element is written once, by the rank that owns it, under its global name; so any layout can read it.
Random streams are functions of (seed, step) and learning rates of the step: neither needs to be stored.
A checkpoint is written under another name and renamed when complete: a folder `global_step*` is whole or absent.
"""

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron.checkpoint.slices import LoadPlanner, SavePlanner, Slices, global_slices
from megatron.checkpoint.state import TrainState
from megatron.engine.inference import InferenceEngine
from megatron.engine.optimizer_state import MASTER
from megatron.engine.training import TrainingEngine
from megatron.errors import RunError, UserError

FORMAT = 1


def save_checkpoint(
    engine: TrainingEngine, folder: Path, state: TrainState, config: dict[str, Any], keep_last: int | None = None
) -> Path:
    """Write `<folder>/global_step<step>`, point `latest` at it and prune to `keep_last`. Collective.

    Raises RunError on every rank when any rank cannot write; what was there before is then untouched.
    """
    final = folder / f"global_step{state.step}"
    unfinished = folder / f".{final.name}.unfinished"
    slices = global_slices(
        engine.state.runs(),
        engine.grid,
        owned_only=True,
        replicated_over_data=engine.state.replicated_over_data,
    )
    _on_rank_0(lambda: _fresh_folder(unfinished))
    try:
        dcp.save(slices, storage_writer=dcp.FileSystemWriter(unfinished / "state"), planner=SavePlanner())
    except dcp.CheckpointException as error:
        _on_rank_0(lambda: shutil.rmtree(unfinished, ignore_errors=True))
        free = shutil.disk_usage(folder).free
        raise RunError(f"cannot save {final} ({free:,} bytes are free there): {_causes(error)}") from error
    progress = {
        "format": FORMAT,
        **asdict(state),
        "optimizer_updates": engine.state.updates,
        "loss_scale": engine.state.loss_scale,
    }
    _on_rank_0(lambda: _publish(unfinished, final, progress, config))
    _on_rank_0(lambda: _prune(folder, keep_last))
    return final


def find_checkpoint(folder: Path, iteration: int | None = None) -> Path | None:
    """The checkpoint to load: that of `iteration`, else the one `latest` names; None where `folder` holds none.

    Raises UserError for an iteration that is not there, and for a folder with nothing but damaged checkpoints.
    """
    steps = sorted(_steps(folder))
    if iteration is not None:
        if iteration not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise UserError(f"iteration {iteration}: no such checkpoint in {folder}; complete ones are: {known}")
        return folder / f"global_step{iteration}"
    latest = folder / "latest"
    if latest.is_file():
        named = folder / latest.read_text().strip()
        if _is_complete(named):
            return named
    if steps:
        return folder / f"global_step{steps[-1]}"
    if latest.is_file() or (folder.is_dir() and any(folder.glob("global_step*"))):
        raise UserError(f"{folder} holds no complete checkpoint; restore one, or remove the folder to start afresh")
    return None


def load_checkpoint(engine: TrainingEngine, path: Path, *, optimizer: bool = True) -> TrainState:
    """Bring `engine` to the state saved in `path`, whatever layout wrote it. Collective.

    optimizer: False leaves moments, update count and loss scale as they are in a fresh engine.
    Raises UserError when the checkpoint holds another model.
    """
    progress = json.loads((path / "progress.json").read_text())
    kinds = None if optimizer else (MASTER,)
    _load(engine, path, kinds)
    if optimizer:
        engine.state.updates = progress["optimizer_updates"]
        engine.state.loss_scale = progress["loss_scale"]
    return TrainState(progress["step"], progress["consumed_samples"], progress["consumed_tokens"])


def load_weights(engine: TrainingEngine | InferenceEngine, path: Path) -> None:
    """Take the weights of `path` and nothing else. Collective. Raises UserError when it holds another model."""
    _load(engine, path, (MASTER,))


def checkpoint_config(path: Path) -> dict[str, Any]:
    """The flat configuration of the run that wrote `path`."""
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


def _load(engine: TrainingEngine | InferenceEngine, path: Path, kinds: tuple[str, ...] | None) -> None:
    slices = global_slices(engine.state.runs(), engine.grid, owned_only=False, replicated_over_data=False)
    wanted = {name: piece for name, piece in slices.items() if kinds is None or name.rpartition("/")[2] in kinds}
    reader = dcp.FileSystemReader(path / "state")
    _check_same_model(wanted, reader, path)
    dcp.load(wanted, storage_reader=reader, planner=LoadPlanner())
    engine.state.finish_loading()


def _check_same_model(wanted: dict[str, Slices], reader: dcp.FileSystemReader, path: Path) -> None:
    stored = {
        name: entry.size
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    problems = [
        f"{name}: the configuration makes it {list(piece.size())}, "
        + (f"the checkpoint has {list(stored[name])}" if name in stored else "the checkpoint has no such tensor")
        for name, piece in wanted.items()
        if stored.get(name) != piece.size()
    ]
    if problems:
        more = [f"... and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise UserError(f"{path} holds another model than the configuration describes:", *problems[:5], *more)


def _on_rank_0(action: Any) -> None:
    """Run `action` on rank 0 while the others wait; every rank learns of a failure."""
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            failure[0] = str(error)
    dist.broadcast_object_list(failure, src=0)
    if failure[0]:
        raise RunError(f"cannot save the checkpoint: {failure[0]}")


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(unfinished: Path, final: Path, progress: dict[str, Any], config: dict[str, Any]) -> None:
    _write_durably(unfinished / "progress.json", json.dumps(progress, indent=2))
    _write_durably(unfinished / "config.json", json.dumps(config, indent=2))
    if final.exists():  # the same step saved again, by a run that went back to an earlier one
        replaced = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        unfinished.rename(final)
        shutil.rmtree(replaced)
    else:
        unfinished.rename(final)
    pointer = final.parent / ".latest.unfinished"
    _write_durably(pointer, final.name)
    pointer.rename(final.parent / "latest")
    _sync_folder(final.parent)


def _prune(folder: Path, keep_last: int | None) -> None:
    if keep_last:
        for step in sorted(_steps(folder))[:-keep_last]:
            shutil.rmtree(folder / f"global_step{step}")


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _steps(folder: Path) -> list[int]:
    named = ((re.fullmatch(r"global_step(\d+)", path.name), path) for path in folder.glob("global_step*"))
    return [int(match[1]) for match, path in named if match and _is_complete(path)]


def _is_complete(path: Path) -> bool:
    return all((path / name).is_file() for name in ("progress.json", "config.json", "state/.metadata"))


def _causes(error: dcp.CheckpointException) -> str:
    """What the ranks ran into, each cause once."""
    causes = {str(failure[0] if isinstance(failure, tuple) else failure) for failure in error.failures.values()}
    return "; ".join(sorted(causes))
