"""State of a training engine to disk and back.

Every element is written once, by the rank that owns it, under its global name; so any layout can read it.
Random streams are functions of (seed, step) and learning rates of the step: neither needs to be stored.
"""

import json
import logging
import pickle
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megatron.checkpoint import folder as folders
from megatron.checkpoint.reading import SafeReader, tensor_shapes
from megatron.checkpoint.slices import LoadPlanner, SavePlanner, Slices, global_slices
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.writing import Writer
from megatron.engine.inference import InferenceEngine
from megatron.engine.optimizer_state import MASTER
from megatron.engine.training import TrainingEngine
from megatron.errors import RunError, UserError

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time; with `asynchronous`, while training goes on."""

    def __init__(
        self,
        engine: TrainingEngine,
        folder: Path,
        config: dict[str, Any],
        retention: folders.Retention | None = None,
        asynchronous: bool = False,
        identity: dict[str, Any] | None = None,
    ) -> None:
        """Collective. config: the flat configuration; identity: of tokenizer and data. Both go with each checkpoint.

        asynchronous: `save` only copies the state to host memory (12 bytes for each parameter that this rank owns)
        and returns; a thread writes the copy.
        """
        self._engine, self._folder = engine, folder
        self._documents = {"config.json": config, "identity.json": identity or {}}
        self._retention = retention or folders.Retention()
        self.asynchronous = asynchronous
        # messages of the writing thread must not mix with those of the training
        self._group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._on_rank_0(lambda: folders.clear_remains(folder))

    def save(self, state: TrainState, validation_loss: float | None = None, is_best: bool = False) -> None:
        """Write a checkpoint of `state`, after the one before is complete. Collective.

        validation_loss: measured with these weights, kept beside them. is_best: let `best` name this checkpoint too,
        which pruning spares. Raises RunError on every rank when any rank cannot write this one or, with
        `asynchronous`, the one before; the checkpoints on disk are untouched by that.
        """
        self.finish()
        slices = global_slices(
            self._engine.state.runs(),
            self._engine.grid,
            owned_only=True,
            replicated_over_data=self._engine.state.replicated_over_data,
        )
        progress = asdict(state) | {
            "optimizer_updates": self._engine.state.updates,
            "validation_loss": validation_loss,
            "loss_scale": self._engine.state.loss_scale,
        }
        if not self.asynchronous:
            self._write(slices, state.step, progress, is_best)
            return
        copies = {name: piece.copied_to_host() for name, piece in slices.items()}
        self._thread = threading.Thread(target=self._write_behind, args=(copies, state.step, progress, is_best))
        self._thread.start()

    def agree(self, value: bool) -> bool:
        """What rank 0 says: a decision to save must be the same on all ranks. Collective."""
        decision = [value]
        dist.broadcast_object_list(decision, src=0, group=self._group)
        return decision[0]

    def finish(self) -> None:
        """Wait until what was saved is on disk. Raises RunError where it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write_behind(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:  # handed to the thread that trains, by `finish`
            self._failure = error

    def _write(self, slices: dict[str, Slices], step: int, progress: dict[str, Any], is_best: bool) -> None:
        final = self._folder / folders.checkpoint_name(step)
        unfinished = self._folder / f".{final.name}.unfinished"
        self._on_rank_0(lambda: _fresh_folder(unfinished))
        try:
            dcp.save(
                slices, storage_writer=Writer(unfinished / "state"), planner=SavePlanner(), process_group=self._group
            )
        except dcp.CheckpointException as error:
            self._on_rank_0(lambda: shutil.rmtree(unfinished, ignore_errors=True))
            free = shutil.disk_usage(self._folder).free
            raise RunError(f"cannot save {final} ({free:,} bytes are free there): {_causes(error)}") from error
        files = self._describe_files(unfinished)
        documents = self._documents | {"progress.json": progress}
        self._on_rank_0(lambda: folders.publish(unfinished, final, documents, files))
        if is_best:
            self._on_rank_0(lambda: folders.point_to(final, folders.BEST))
        self._on_rank_0(lambda: folders.prune(self._folder, self._retention))

    def _describe_files(self, unfinished: Path) -> dict[str, dict[str, Any]]:
        """Manifest entries of the tensor files: every rank hashes what it wrote, rank 0 also the description."""
        rank = dist.get_rank()
        mine = list((unfinished / "state").glob(f"__{rank}_*"))
        mine += [unfinished / "state" / ".metadata"] if rank == 0 else []
        described: Any
        try:
            described = {str(path.relative_to(unfinished)): folders.describe_file(path) for path in mine}
        except OSError as error:
            described = error
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, described, group=self._group)
        for failure in everyones:
            if isinstance(failure, OSError):
                raise RunError(f"cannot save into {self._folder}: {failure}")
        return {name: entry for entries in everyones for name, entry in entries.items()}

    def _on_rank_0(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0 while the others wait; every rank learns of a failure."""
        failure: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                failure[0] = str(error)
        dist.broadcast_object_list(failure, src=0, group=self._group)
        if failure[0]:
            raise RunError(f"cannot save into {self._folder}: {failure[0]}")


def load_checkpoint(engine: TrainingEngine, path: Path, *, optimizer: bool = True) -> TrainState:
    """Bring `engine` to the state saved in `path`, whatever layout wrote it. Collective.

    optimizer: False leaves moments, update count and loss scale as they are in a fresh engine.
    Raises UserError when the checkpoint holds another model.
    """
    progress = json.loads((path / "progress.json").read_text())
    _load(engine, path, None if optimizer else (MASTER,))
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
    reader = SafeReader(path / "state")
    _check_same_model(wanted, tensor_shapes(reader), path, engine)
    try:
        dcp.load(wanted, storage_reader=reader, planner=LoadPlanner())
    except dcp.CheckpointException as error:
        raise UserError(
            f"{path} cannot be read: {_causes(error)}",
            "with verify: full, files are checked first, and the newest whole checkpoint is taken",
        ) from error
    engine.state.finish_loading()


def agree_on_checkpoint(
    path: Path | None, verify: folders.Verification = "quick", iteration: int | None = None
) -> Path | None:
    """Make sure that every rank has found the same checkpoint, and return the one to load. Collective.

    Ranks look into the folder each for itself: another run may save meanwhile, or nodes may see different disks. That
    raises RunError on all of them. verify: "full" hashes the files, which the ranks share out among them; a damaged
    one is treated as in `find_checkpoint`, and what comes after it is what rank 0 sees.
    """
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, path and str(path))
    if len(set(found)) > 1:
        seen = "; ".join(f"rank {rank}: {name or 'none'}" for rank, name in enumerate(found[:8]))
        raise RunError(f"ranks found different checkpoints ({seen}); all nodes must see the same folder")
    if path is None or verify == "quick":
        return path
    candidates = [path]
    if iteration is None:
        order = folders.newest_first(path.parent)
        candidates = order[order.index(path) :] if path in order else candidates
    agreed: list[Any] = [candidates]
    dist.broadcast_object_list(agreed, src=0)
    for candidate in agreed[0]:
        if not (problems := _damage_found_together(candidate)):
            return Path(candidate)
        if iteration is not None:
            raise folders.damaged(candidate, problems)
        log.warning("%s is damaged and not used: %s", candidate, "; ".join(problems))
    raise folders.nothing_whole(path.parent)


def _damage_found_together(path: Path) -> list[str]:
    """What is wrong with the content of a checkpoint; each rank hashes its share of the files. Collective."""
    everyones: list[Any] = [None] * dist.get_world_size()
    mine = folders.damage(path, "full", (dist.get_rank(), len(everyones)))
    dist.all_gather_object(everyones, mine)
    return sorted({problem for problems in everyones for problem in problems})


def _check_same_model(
    wanted: dict[str, Slices], stored: dict[str, Any], path: Path, engine: TrainingEngine | InferenceEngine
) -> None:
    """Compare names and shapes over all stages of the pipeline, so that all ranks come to the same result."""
    problems = [
        f"{name}: the configuration makes it {list(piece.size())}, "
        + (f"the checkpoint has {list(stored[name])}" if name in stored else "the checkpoint has no such tensor")
        for name, piece in wanted.items()
        if stored.get(name) != piece.size()
    ]
    stages: list[Any] = [None] * engine.grid.size("pipe")
    dist.all_gather_object(stages, (engine.parameter_names, problems), group=engine.grid.group("pipe"))
    known = {f"{name}/{MASTER}" for names, _ in stages for name in names}
    problems = [problem for _, of_stage in stages for problem in of_stage]
    weights = sorted(name for name in stored if name.endswith(f"/{MASTER}") and name not in known)
    problems += [f"{name}: the checkpoint has it, the configured model has not" for name in weights]
    if problems:
        more = [f"... and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise UserError(f"{path} holds another model than the configuration describes:", *problems[:5], *more)


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _causes(error: dcp.CheckpointException) -> str:
    """What the ranks ran into, each cause once."""
    causes = [failure[0] if isinstance(failure, tuple) else failure for failure in error.failures.values()]
    # what torch says of a pickle that it will not run ends with how to run it
    told = {"a file holds no tensor" if isinstance(e, pickle.UnpicklingError) else str(e) for e in causes}
    return "; ".join(sorted(told))
