"""Tensors of a checkpoint, read without running anything that a file may contain.

torch.distributed.checkpoint describes its files in a pickle, `.metadata`, and a pickle can call any function. Here only
the classes that describe tensors are let in. The tensors themselves torch reads with `weights_only`.
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

# whole names only: a dotted name such as "os.system" would reach through what a module imports
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


class _DescriptionUnpickler(pickle.Unpickler):
    """Builds the description of tensors, and refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _ALLOWED or is_type:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which describes no tensor")


class SafeReader(dcp.FileSystemReader):
    """torch's reader of files, with the unpickler above. It reads the description once, which may be large."""

    _description: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The description of all tensors. Raises UserError when the file is damaged or asks for more."""
        if self._description is None:
            self._description = self._read_description()
        return self._description

    def _read_description(self) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _DescriptionUnpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise ValueError("it describes no tensors")
        except Exception as error:  # a damaged pickle may raise nearly anything
            raise UserError(f"{path} is refused: {error}") from error
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


def tensor_shapes(reader: SafeReader) -> dict[str, torch.Size]:
    """Name and global shape of every tensor."""
    entries = reader.read_metadata().state_dict_metadata.items()
    return {name: entry.size for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def read_tensors(checkpoint: Path | SafeReader, names: list[str] | None = None) -> dict[str, Tensor]:
    """Whole fp32 tensors of `checkpoint`, all or those in `names`, in this process alone; ranks need not exist."""
    reader = checkpoint if isinstance(checkpoint, SafeReader) else SafeReader(checkpoint / "state")
    shapes = tensor_shapes(reader)
    tensors = {name: torch.empty(shapes[name]) for name in (shapes if names is None else names)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is the point
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
