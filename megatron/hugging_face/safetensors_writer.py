"""Write safetensors files one tensor at a time.

A file is the length of a JSON header (8 bytes, little endian), the header, and the bytes of the tensors in its order
(https://huggingface.co/docs/safetensors). The library writes a file only from tensors that are all in memory.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from megatron.hugging_face.stored import DTYPES, SAFE, SAFE_INDEX

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # bytes, of the first tensor; transformers maps the file


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    largest: int,
    done: Callable[[], object] = lambda: None,
) -> None:
    """Write `tensors`, which come in the order of `shapes`, as `dtype`.

    largest: bytes of a file; a tensor that is larger gets a file of its own. Several files get an index.
    done: called after each tensor. Raises OSError.
    """
    size = dtype.itemsize
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        needed = math.prod(shape) * size
        if shards[-1] and filled + needed > largest:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += needed
    files = [SAFE] if len(shards) == 1 else [shard_name(index, len(shards)) for index in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        _write(folder / file, shard, tensors, dtype, done)
    if len(shards) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * size
        places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / SAFE_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def shard_name(index: int, count: int) -> str:
    """The name of a shard, counted from 0."""
    return f"model-{index + 1:05}-of-{count:05}.safetensors"


def _write(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    done: Callable[[], object],
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            found, tensor = next(tensors)
            if found != name or tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{found} {list(tensor.shape)} was read instead of {name} {list(shapes[name])}")
            stored = tensor.to(dtype).contiguous()
            del tensor
            file.write(cast(Any, stored.view(-1).view(torch.uint8).numpy()))
            done()
        file.flush()
        os.fsync(file.fileno())
        with suppress(AttributeError, OSError):  # pages of what is on disk would count as this process' memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
