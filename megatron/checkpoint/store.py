"""Save the state of a training engine, and load it under any layout.

Every element is written once, by the rank that owns it, under its global name.
Random streams are functions of (seed, step) and learning rates of the step: neither is stored.
"""

import logging
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megatron import registry
from megatron.checkpoint import folder as folders
from megatron.checkpoint.adapter_base import describe_base, find_base, read_base
from megatron.checkpoint.chunks import LoadPlanner, LocalChunks, SavePlanner, local_chunks
from megatron.checkpoint.reading import SafeReader, causes, in_words, tensor_shapes
from megatron.checkpoint.snapshot import Snapshot
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.writing import Writer
from megatron.config.parameter_shapes import is_adapter
from megatron.engine.inference import InferenceEngine
from megatron.engine.optimizer_state import MASTER
from megatron.engine.training import TrainingEngine
from megatron.errors import RunError, UserError
from megatron.progress import Progress

log = logging.getLogger(__name__)

ADAPTER_BASE = "adapter_base"  # kind in the registry


class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time; with `asynchronous`, in the background."""

    def __init__(
        self,
        engine: TrainingEngine,
        folder: Path,
        config: dict[str, Any],
        retention: folders.Retention | None = None,
        asynchronous: bool = False,
        identity: dict[str, Any] | None = None,
    ) -> None:
        """Collective. config: the flat configuration; identity: of tokenizer and data. Each checkpoint holds both.

        asynchronous: `save` queues a copy of the state to host memory and returns; a thread writes the copy. The memory
        (12 bytes for each parameter that this rank owns) is allocated here and pinned on a GPU: raises UserError where
        it cannot be.
        """
        self._engine, self._folder = engine, folder
        self._documents = {"config.json": config, "identity.json": identity or {}}
        if engine.base is not None:
            self._documents["base.json"] = engine.base
        self._retention = retention or folders.Retention()
        self._snapshot = Snapshot(self._owned_chunks(), engine.grid.device) if asynchronous else None
        # a group of its own: collectives of the writing thread must not interleave with those of the training
        self._group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._on_rank_0(lambda: folders.clear_remains(folder))

    def save(self, state: TrainState, validation_loss: float | None = None, is_best: bool = False) -> None:
        """Write a checkpoint of `state` once the previous one is complete. Collective.

        validation_loss: of these weights, stored with them. is_best: make `best` name this checkpoint, so that it is
        not pruned. Raises RunError on every rank if any rank cannot write this one or, with `asynchronous`, the one
        before; checkpoints already on disk stay as they are.
        """
        self.finish()
        chunks = self._owned_chunks()
        progress = asdict(state) | {
            "optimizer_updates": self._engine.state.updates,
            "validation_loss": validation_loss,
            "loss_scale": self._engine.state.loss_scale,
            "gradient_norms": self._engine.gradient_norms,
        }
        if self._snapshot is None:
            self._write(chunks, state.step, progress, is_best)
            return
        self._snapshot.fill(chunks)
        self._thread = threading.Thread(
            target=self._write_in_background, args=(self._snapshot, state.step, progress, is_best)
        )
        self._thread.start()

    def save_again(self, state: TrainState) -> None:
        """Replace the checkpoint of `state.step` by one of `state`, with the same validation loss. Collective."""
        document = folders.read_document(folders.checkpoint_path(self._folder, state.step) / "progress.json")
        self.save(state, document.get("validation_loss"))

    @property
    def asynchronous(self) -> bool:
        """Whether `save` returns before the checkpoint is on disk."""
        return self._snapshot is not None

    def agree(self, value: bool) -> bool:
        """The `value` of rank 0, so that a decision to save is the same on all ranks. Collective."""
        decision = [value]
        dist.broadcast_object_list(decision, src=0, group=self._group)
        return decision[0]

    def finish(self) -> None:
        """Wait until everything saved is on disk. Raises RunError if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _owned_chunks(self) -> dict[str, LocalChunks]:
        state, grid = self._engine.state, self._engine.grid
        owned = local_chunks(state.fragments(), grid, owned_only=True, replicated_over_data=state.replicated_over_data)
        if self._engine.base is None:
            return owned
        return {name: local for name, local in owned.items() if is_adapter(name)}

    def _write_in_background(self, snapshot: Snapshot, *arguments: Any) -> None:
        device = self._engine.grid.device
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a new thread begins with device 0, whatever its process uses
            snapshot.wait()
            self._write(snapshot.chunks, *arguments)
        except BaseException as error:  # raised by `finish` in the training thread
            self._failure = error

    def _write(self, chunks: dict[str, LocalChunks], step: int, progress: dict[str, Any], is_best: bool) -> None:
        final = self._folder / folders.checkpoint_name(step)
        unfinished = self._folder / f".{final.name}.unfinished"
        self._on_rank_0(lambda: _fresh_folder(unfinished))
        try:
            with Progress(f"saving {final}", _bytes(chunks), "B") as written:
                writer = Writer(unfinished / "state", written.add)
                dcp.save(chunks, storage_writer=writer, planner=SavePlanner(), process_group=self._group)
        except dcp.CheckpointException as error:
            self._on_rank_0(lambda: shutil.rmtree(unfinished, ignore_errors=True))
            free = shutil.disk_usage(self._folder).free
            raise RunError(f"cannot save {final} ({free:,} bytes are free there): {causes(error)}") from error
        files = self._describe_files(unfinished)
        documents = self._documents | {"progress.json": progress}
        self._on_rank_0(lambda: folders.publish(unfinished, final, documents, files))
        if is_best:
            self._on_rank_0(lambda: folders.point_to(final, folders.BEST))
        self._on_rank_0(lambda: folders.prune(self._folder, self._retention))

    def _describe_files(self, unfinished: Path) -> dict[str, dict[str, Any]]:
        """Manifest entries of the tensor files: every rank hashes what it wrote, rank 0 also `.metadata`."""
        rank = dist.get_rank()
        mine = list((unfinished / "state").glob(f"__{rank}_*"))
        mine += [unfinished / "state" / ".metadata"] if rank == 0 else []
        described: Any
        try:
            described = {str(path.relative_to(unfinished)): folders.describe_file(path) for path in mine}
        except OSError as error:
            described = error
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, described, group=self._group)
        for failure in gathered:
            if isinstance(failure, OSError):
                raise RunError(f"cannot save into {self._folder}: {failure}")
        return {name: entry for entries in gathered for name, entry in entries.items()}

    def _on_rank_0(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0 while the others wait. Raises RunError on all ranks if it fails."""
        failure: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                failure[0] = str(error)
        dist.broadcast_object_list(failure, src=0, group=self._group)
        if failure[0]:
            raise RunError(f"cannot save into {self._folder}: {failure[0]}")


def load_checkpoint(
    engine: TrainingEngine, path: Path, *, optimizer: bool = True, base: str | None = None
) -> TrainState:
    """Load the state saved in `path` into `engine`, whatever layout wrote it. Collective.

    optimizer: False keeps moments, update count and loss scale of the fresh engine. base: where the base of adapters is
    now, if it has moved: a folder of checkpoints, or hf:MODEL.
    Raises UserError if the checkpoint holds another model.
    """
    document = folders.read_document(path / "progress.json")
    try:
        progress = TrainState.of(document)
        updates, loss_scale = document["optimizer_updates"], document["loss_scale"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / 'progress.json'} does not hold the progress of a run ({in_words(error)})") from error
    if engine.is_adapted and not _holds_adapters(path):
        raise UserError(
            f"{path} holds no adapters, but the configuration has lora; to adapt this model: finetune: true"
        )
    _load(engine, path, None if optimizer else (MASTER,), base)
    if optimizer:
        engine.state.updates = updates
        engine.state.loss_scale = loss_scale
        engine.gradient_norms = document.get("gradient_norms", {})
    return progress


def load_weights(engine: TrainingEngine | InferenceEngine, path: Path, base: str | None = None) -> None:
    """Load the weights of `path` and nothing else. Collective. Raises UserError if it holds another model.

    Adapters that it does not hold keep their values in training. base: as of `load_checkpoint`.
    """
    if isinstance(engine, InferenceEngine) and engine.is_adapted and not _holds_adapters(path):
        raise UserError(f"{path} holds no adapters, but the configuration has lora; leave lora out")
    _load(engine, path, (MASTER,), base)


def checkpoint_config(path: Path) -> dict[str, Any]:
    """The flat configuration of the run that wrote `path`. Raises UserError if it cannot be read."""
    return folders.read_document(path / "config.json")


def _holds_adapters(path: Path) -> bool:
    return any(map(is_adapter, tensor_shapes(SafeReader(path / "state"))))


def _load(
    engine: TrainingEngine | InferenceEngine, path: Path, kinds: tuple[str, ...] | None, base: str | None
) -> None:
    """Load what `path` holds; adapters after their base."""
    held = local_chunks(engine.state.fragments(), engine.grid, owned_only=False, replicated_over_data=False)
    if not _holds_adapters(path):
        chunks = {name: local for name, local in held.items() if not is_adapter(name)}
        if engine.is_adapted:
            engine.base = describe_base(path)
            chunks = {name: local for name, local in chunks.items() if name.endswith(f"/{MASTER}")}
    elif not engine.is_adapted:
        raise UserError(f"{path} holds adapters only; set lora as in its config.json, or merge them into their base")
    else:
        _load_base(engine, path, base, {name: local for name, local in held.items() if not is_adapter(name)})
        chunks = {name: local for name, local in held.items() if is_adapter(name)}
    chunks = {name: local for name, local in chunks.items() if kinds is None or name.rpartition("/")[2] in kinds}
    _load_chunks(engine, path, chunks)
    engine.state.finish_loading()


def _load_base(
    engine: TrainingEngine | InferenceEngine, path: Path, moved: str | None, chunks: dict[str, LocalChunks]
) -> None:
    """Load the base of the adapters in `path` from where it was, or from `moved`."""
    kind, _, model = (moved or read_base(path)["path"]).partition(":")
    if kind in registry.names(ADAPTER_BASE):
        registry.resolve(ADAPTER_BASE, kind)(engine, model, path)
        return
    base = find_base(path, moved)
    engine.base = describe_base(base)
    _load_chunks(engine, base, chunks)


def _load_chunks(engine: TrainingEngine | InferenceEngine, path: Path, chunks: dict[str, LocalChunks]) -> None:
    reader = SafeReader(path / "state")
    stored = tensor_shapes(reader)
    if all(name.endswith(f"/{MASTER}") for name in stored) and not all(name.endswith(f"/{MASTER}") for name in chunks):
        raise UserError(f"{path} holds weights without an optimizer's state; finetune: true starts a run with them")
    if frozen := [name for name in chunks if name not in stored and f"{name.rpartition('/')[0]}/{MASTER}" in stored]:
        raise UserError(
            f"{path} holds no optimizer state of {frozen[0].rpartition('/')[0]}, which was frozen there; "
            "no_load_optim: true resumes with a fresh optimizer, finetune: true starts a run with the weights"
        )
    _check_same_model(chunks, stored, path, engine)
    try:
        with Progress(f"loading {path}", _bytes(chunks), "B") as loaded:
            dcp.load(chunks, storage_reader=reader, planner=LoadPlanner(loaded.add))
    except dcp.CheckpointException as error:
        raise UserError(
            f"{path} cannot be read: {causes(error)}",
            "with verify: full, files are checked first, and the newest whole checkpoint is taken",
        ) from error


def agree_on_checkpoint(
    path: Path | None, verify: folders.Verification = "quick", iteration: int | None = None
) -> Path | None:
    """Check that all ranks have found the same checkpoint, and return the one to load. Collective.

    Each rank reads the folder by itself: another run may save meanwhile, or nodes may see different disks. Then all
    raise RunError. verify: "full" hashes the files, divided among the ranks; a damaged checkpoint is treated as in
    `find_checkpoint`, and rank 0 decides which is the next.
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
        if not (problems := _collective_damage(candidate)):
            return Path(candidate)
        if iteration is not None:
            raise folders.damaged(candidate, problems)
        log.warning("%s is damaged and not used: %s", candidate, "; ".join(problems))
    raise folders.nothing_whole(path.parent)


def checkpoint_before(
    folder: Path, steps: range, state: TrainState, patience: int, verify: folders.Verification = "quick"
) -> Path | None:
    """The newest whole checkpoint of so many `steps` on the way to `state`; None if there is none. Collective.

    Not on the way are those of a way that was given up. Nor is one to which the run has gone back twice, if it has to a
    third time within `patience` steps of it: its weights are at fault, and not the samples.
    """
    found: list[Any] = [_on_the_way(folder, steps, state, patience) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(found, src=0)
    for candidate in found[0]:
        problems = _collective_damage(candidate, verify)
        if not problems:
            return Path(candidate)
        log.warning("%s is damaged and not used: %s", candidate, "; ".join(problems))
    return None


def _on_the_way(folder: Path, steps: range, state: TrainState, patience: int) -> list[Path]:
    """The paths of such checkpoints, the newest first."""
    paths, skipped = [], state.skipped_samples
    for path in folders.newest_first(folder):
        try:
            saved = TrainState.of(folders.read_document(path / "progress.json"))
        except (UserError, KeyError, TypeError, ValueError):
            continue
        count = len(saved.skipped_samples)
        led_here = saved.skipped_samples == skipped[:count] and (
            count == len(skipped) or saved.consumed_samples < skipped[count][0]
        )
        is_ill = saved.has_gone_back_here_again and steps.stop - saved.step <= patience
        if saved.step in steps and led_here and not is_ill:
            paths.append(path)
    return paths


def _collective_damage(path: Path, verify: folders.Verification = "full") -> list[str]:
    """What is wrong with the files of a checkpoint; each rank checks its share of them. Collective."""
    gathered: list[Any] = [None] * dist.get_world_size()
    mine = folders.damage(path, verify, (dist.get_rank(), len(gathered)))
    dist.all_gather_object(gathered, mine)
    return sorted({problem for problems in gathered for problem in problems})


def _check_same_model(
    chunks: dict[str, LocalChunks], stored: dict[str, Any], path: Path, engine: TrainingEngine | InferenceEngine
) -> None:
    """Compare names and shapes over all pipeline stages, with the same result on all ranks."""
    problems = [
        f"{name}: the configuration makes it {list(local.size())}, "
        + (f"the checkpoint has {list(stored[name])}" if name in stored else "the checkpoint has no such tensor")
        for name, local in chunks.items()
        if stored.get(name) != local.size()
    ]
    stages: list[Any] = [None] * engine.grid.size("pipe")
    dist.all_gather_object(stages, (engine.parameter_names, problems), group=engine.grid.group("pipe"))
    known = {f"{name}/{MASTER}" for names, _ in stages for name in names}
    problems = [problem for _, of_stage in stages for problem in of_stage]
    weights = sorted(name for name in stored if name.endswith(f"/{MASTER}") and name not in known)
    problems += [f"{name}: the checkpoint has it, the configured model does not" for name in weights]
    if problems:
        more = [f"... and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise UserError(f"{path} holds another model than the configuration describes:", *problems[:5], *more)


def _bytes(chunks: dict[str, LocalChunks]) -> int:
    """The size of what this rank holds of them."""
    return sum(chunk.nbytes for local in chunks.values() for chunk in local.chunks.values())


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
