"""Read the tensors of a checkpoint without executing anything that a file may contain.

torch.distributed.checkpoint describes its files in a pickle, `.metadata`, and a pickle can call any function. Only the
classes that describe tensors are allowed here. torch reads the tensors themselves with `weights_only`.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron.errors import UserError

# matched as whole names: a dotted name such as "os.system" would reach what a module imports
_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_METADATA, "Metadata"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # its name in Python 3.13
}


class RefusedPickle(pickle.UnpicklingError):
    """A pickle asks for what describes no tensor."""


class _DescriptionUnpickler(pickle.Unpickler):
    """Unpickles descriptions of tensors and refuses all other classes and functions."""

    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _ALLOWED or is_type:
            return super().find_class(module, name)
        raise RefusedPickle(f"it asks for {module}.{name}, which describes no tensor")


class SafeReader(dcp.FileSystemReader):
    """torch's reader of files, with the unpickler above. The description, which may be large, is read only once."""

    _description: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The description of all tensors. Raises UserError if the file is damaged or asks for anything else."""
        if self._description is None:
            self._description = self._read_description()
        return self._description

    def _read_description(self) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _DescriptionUnpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise RefusedPickle("it does not describe tensors")
        except RefusedPickle as error:
            raise UserError(f"{path} is refused: {error}") from error
        except Exception as error:  # a damaged pickle may raise nearly anything
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise UserError(f"{path} is refused: it cannot be decoded ({reason})") from error
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


def tensor_shapes(reader: SafeReader) -> dict[str, torch.Size]:
    """Name and global shape of every tensor."""
    entries = reader.read_metadata().state_dict_metadata.items()
    return {name: entry.size for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def read_tensors(checkpoint: Path | SafeReader, names: list[str] | None = None) -> dict[str, Tensor]:
    """Global fp32 tensors of `checkpoint`, all or those in `names`, read by this process alone.

    Raises UserError if they cannot be read.
    """
    reader = checkpoint if isinstance(checkpoint, SafeReader) else SafeReader(checkpoint / "state")
    shapes = tensor_shapes(reader)
    tensors = {name: torch.empty(shapes[name]) for name in (shapes if names is None else names)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        except dcp.CheckpointException as error:
            raise UserError(f"{reader.path} cannot be read: {causes(error)}") from error
    return tensors


def causes(error: dcp.CheckpointException) -> str:
    """What failed on the ranks, each cause once."""
    failures = [failure[0] if isinstance(failure, tuple) else failure for failure in error.failures.values()]
    return "; ".join(sorted({in_words(failure) for failure in failures}))


def in_words(error: BaseException) -> str:
    """An exception of a library for a message of ours: the system's and our own as they are, others with their type."""
    if isinstance(error, UserError | OSError):
        return str(error)
    if isinstance(error, pickle.UnpicklingError):  # torch's text would end with advice on how to run the pickle
        return "a file holds no tensor"
    return f"{type(error).__name__}: {error}"
