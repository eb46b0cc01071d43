"""Write a checkpoint from weights that something else has stored: one process, one tensor in memory at a time.

The checkpoint holds weights without an optimizer's state. It is loaded under any layout, with `finetune: true`, by
generate.py and by evaluate.py.
"""

import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron.checkpoint import folder as folders
from megatron.checkpoint.chunks import LocalChunks, SavePlanner
from megatron.checkpoint.reading import SafeReader, causes, read_tensors, tensor_shapes
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.writing import Writer
from megatron.config.schema.config import Config
from megatron.config.yaml_file import yaml_text
from megatron.engine.optimizer_state import MASTER
from megatron.errors import RunError, UserError
from megatron.files import FolderLock, replaced_when_complete
from megatron.progress import Progress
from megatron.units import short_number


@dataclass(frozen=True)
class StoredWeight:
    """A whole parameter that is read when it is needed: `read` gives a tensor of `shape`, in any type."""

    shape: Sequence[int]
    read: Callable[[], Tensor]


def checkpoint_weights(path: Path) -> dict[str, StoredWeight]:
    """The parameters of a checkpoint of ours by global name, each read when it is needed."""
    reader = SafeReader(path / "state")

    def read(name: str) -> Tensor:
        return read_tensors(reader, [name])[name]

    return {
        name.removesuffix(f"/{MASTER}"): StoredWeight(tuple(shape), partial(read, name))
        for name, shape in tensor_shapes(reader).items()
        if name.endswith(f"/{MASTER}")
    }


class _Reading:
    """Reads one weight at a time, in fp32, and frees the one before.

    torch keeps every tensor of a file until the file is complete, so its storage is emptied once it is written.
    """

    def __init__(self, done: Callable[[], object]) -> None:
        self._last, self._done = torch.empty(0), done

    def __call__(self, name: str, weight: StoredWeight) -> Tensor:
        self._last.untyped_storage().resize_(0)
        stored = weight.read()
        if stored.shape != torch.Size(weight.shape):
            raise ValueError(f"{name} was read as {list(stored.shape)} instead of {list(weight.shape)}")
        self._last = torch.empty(stored.shape, dtype=torch.float32).copy_(stored)  # never the file's own memory
        self._done()
        return self._last


class _LazyChunks(LocalChunks):
    """A whole tensor that is read when torch asks for it."""

    def __init__(self, name: str, weight: StoredWeight, reading: _Reading) -> None:
        super().__init__(weight.shape)
        self.chunks[torch.Size([0] * len(weight.shape))] = torch.empty(tuple(weight.shape), device="meta")
        self._read = partial(reading, name, weight)

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self._read()


def refuse_occupied(save: Path) -> None:
    """Raise UserError where `save` holds checkpoints already, ours or another program's, or cannot be made."""
    folders.check_save_folder(save)
    if steps := folders.steps_in(save):
        raise UserError(f"{save} already holds {folders.checkpoint_name(steps[-1])}; choose an empty folder")
    try:
        save.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{save} cannot be created: {error.strerror}") from error


def write_converted(
    save: Path,
    weights: Mapping[str, StoredWeight],
    config: Mapping[str, Any],
    done: Callable[[], object] = lambda: None,
    base: Mapping[str, str] | None = None,
) -> Path:
    """Write `weights`, by global name, as checkpoint 0 in the folder `save`, and return its path.

    config: the flat configuration of the model. done: called after each tensor. base: of adapters, what `describe_base`
    says. Nothing is left behind on failure.
    Raises UserError for a folder that holds checkpoints, and RunError if the disk fails.
    """
    refuse_occupied(save)
    final = save / folders.checkpoint_name(0)
    unfinished = save / f".{final.name}.unfinished"
    reading = _Reading(done)
    chunks = {f"{name}/{MASTER}": _LazyChunks(name, weight, reading) for name, weight in weights.items()}
    progress = asdict(TrainState()) | {"optimizer_updates": 0, "validation_loss": None, "loss_scale": {}}
    documents = {"config.json": dict(config), "identity.json": {}, "progress.json": progress}
    if base is not None:
        documents["base.json"] = dict(base)
    with FolderLock(save, "save") as lock, _removed_on_failure(unfinished):
        lock.take()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended
                dcp.save(chunks, storage_writer=Writer(unfinished / "state"), planner=SavePlanner(), no_dist=True)
            files = sorted(path for path in (unfinished / "state").iterdir())
            entries = {str(path.relative_to(unfinished)): folders.describe_file(path) for path in files}
            folders.publish(unfinished, final, documents, entries)
        except dcp.CheckpointException as error:
            free = shutil.disk_usage(save).free
            raise RunError(f"cannot save {final} ({free:,} bytes are free there): {causes(error)}") from error
        except OSError as error:
            raise RunError(f"cannot save {final}: {error}") from error
    return final


def write_model(
    folder: Path, parameters: Mapping[str, tuple[Sequence[int], Callable[[], Tensor]]], config: Config
) -> str:
    """`write_converted` with its progress, and FOLDER/model.yml with the keys of `config` that were written.

    parameters: by global name, the shape and a function that reads it. Returns a summary of what was written.
    """
    weights = {name: StoredWeight(shape, read) for name, (shape, read) in parameters.items()}
    with Progress(f"writing {folder}", len(weights), "tensors") as progress:
        path = write_converted(folder, weights, config.to_flat(), progress.add)
    keys = config.to_flat() | {"load": str(folder), "finetune": True}
    with replaced_when_complete(folder / "model.yml") as file:
        file.write(yaml_text(keys))
    count = sum(math.prod(weight.shape) for weight in weights.values())
    return f"{path}: {short_number(count)} parameters in {len(weights)} tensors, described by {folder / 'model.yml'}"


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
