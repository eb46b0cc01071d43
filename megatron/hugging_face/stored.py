"""The tensors in a folder of Hugging Face: safetensors files or pytorch_model.bin, whole or in shards.

Nothing that a file contains is run. A tensor is read when it is needed and its file closed with it, so that the memory
of a process holds the tensors in use and nothing else.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.convert.torch_file import read_torch_file
from megatron.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
# The names that transformers writes, in the order in which it looks for them.
SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. dtype: None for one that cannot be a weight, such as a mask of booleans."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    kind: str  # of its elements, as the file names it


class StoredTensors:
    """The tensors of a folder by name."""

    def __init__(self, folder: Path) -> None:
        """Read the names and shapes. Raises UserError with every file that is missing or damaged."""
        self.folder = folder
        self._open_torch_file: tuple[Path, Mapping[str, Tensor]] | None = None
        self.tensors: dict[str, StoredTensor] = {}
        problems: list[str] = []
        for file, expected in self._files().items():
            try:
                held = self._describe(file)
            except UserError as error:
                problems += error.problems
                continue
            problems += [
                f"{file} has no {name}, which the index says is in it" for name in sorted(expected - set(held))
            ]
            self.tensors |= held
        if problems:
            raise UserError(*problems)

    def read(self, name: str) -> Tensor:
        """The tensor, in its own type; its memory is the file's, mapped, where the format allows it."""
        file = self.tensors[name].file
        if file.suffix != ".safetensors":
            return self._torch_file(file)[name]
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as opened:
                found: Tensor = opened.get_tensor(name)
                return found
        except SafetensorError as error:
            raise UserError(f"{file} cannot be read: {error}") from error

    @cached_property
    def elements(self) -> int:
        """Of all tensors together."""
        return sum(torch.Size(tensor.shape).numel() for tensor in self.tensors.values())

    def _files(self) -> dict[Path, set[str]]:
        """The files of weights, and the names that an index expects in each."""
        for whole, index in ((SAFE, SAFE_INDEX), (TORCH, TORCH_INDEX)):
            if (self.folder / whole).is_file():
                return {self.folder / whole: set()}
            if (self.folder / index).is_file():
                return self._files_of(self.folder / index)
        if (self.folder / "adapter_config.json").is_file():
            raise UserError(
                f"{self.folder} holds adapters, not a model; name the checkpoint of the model they adapt (--base)"
            )
        found = ", ".join(sorted(path.name for path in self.folder.iterdir())[:8]) or "nothing"
        raise UserError(
            f"{self.folder} holds no weights: {SAFE}, {TORCH} or the index of either is needed, and there is: {found}"
        )

    def _files_of(self, index: Path) -> dict[Path, set[str]]:
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise UserError(f"{index} has no weight_map, from the names of tensors to those of files")
        files: dict[Path, set[str]] = {}
        for name, place in places.items():
            files.setdefault(self.folder / Path(place).name, set()).add(name)
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(
                f"{self.folder}: of {len(files)} files of weights {len(missing)} are missing: {_few(missing)}"
            )
        return files

    def _describe(self, file: Path) -> dict[str, StoredTensor]:
        if file.suffix != ".safetensors":
            tensors = {name: value for name, value in self._torch_file(file).items() if isinstance(value, Tensor)}
            return {
                name: StoredTensor(
                    file,
                    tuple(tensor.shape),
                    tensor.dtype if tensor.dtype in DTYPES.values() else None,
                    str(tensor.dtype),
                )
                for name, tensor in tensors.items()
            }
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it has no __iter__)
                return {
                    name: StoredTensor(file, tuple(part.get_shape()), DTYPES.get(part.get_dtype()), part.get_dtype())
                    for name, part in slices.items()
                }
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or cut short: {error}") from error

    def _torch_file(self, file: Path) -> Mapping[str, Tensor]:
        if self._open_torch_file is None or self._open_torch_file[0] != file:
            content = read_torch_file(file)
            if not isinstance(content, dict):
                raise UserError(f"{file} holds no tensors by name")
            self._open_torch_file = file, content
        return self._open_torch_file[1]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not JSON: {error}"
        raise UserError(f"{path} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def _few(names: Iterable[str], count: int = 5) -> str:
    listed = sorted(names)
    return ", ".join(listed[:count]) + (f" and {len(listed) - count} more" if len(listed) > count else "")
