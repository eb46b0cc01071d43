"""Read files that torch.save has written, without running anything that they may contain."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.errors import UserError, first_line

# What checkpoints hold beside tensors and plain values: the state of numpy's random numbers, in arrays. The names are
# those of numpy 1 and 2. None of them calls anything that a file could choose.
_RECONSTRUCT = np.array([0]).__reduce__()[0]
_ARRAYS: list[Any] = [
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("u1", "u4", "u8", "i4", "i8", "f4", "f8")),
]


def read_torch_file(path: Path) -> Any:
    """The content of a file of tensors and plain values; tensors are mapped from the disk.

    Raises UserError if the file cannot be read, is damaged, or asks for anything but tensors and plain values.
    """
    try:
        archive = _is_archive(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        with torch.serialization.safe_globals(_ARRAYS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {_reason(error)}") from error
    except Exception as error:  # a damaged file may raise nearly anything
        raise UserError(f"{path} cannot be decoded: {first_line(error)}") from error


def _is_archive(path: Path) -> bool:
    """Whether torch can map the file: what torch wrote before version 1.6 is no archive and is read as a whole."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _reason(error: pickle.UnpicklingError) -> str:
    """What the file asks for, without torch's advice on how to run it."""
    words = str(error).split()
    asked = words[words.index("GLOBAL") + 1] if "GLOBAL" in words else None
    if asked is None:
        return "it holds more than tensors and plain values"
    return f"it asks for {asked}, and only tensors and plain values are read, because a file could run anything else"
