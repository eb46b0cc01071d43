"""What the installed torch was built for, read from its files: importing it takes seconds. Standard library only."""

import mmap
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# c10d::ProcessGroupNCCL in a mangled name: the bindings of a torch with NCCL contain it, the text of no docstring does.
_NCCL_BINDINGS = b"4c10d16ProcessGroupNCCL"


@dataclass(frozen=True)
class TorchBuild:
    """folder: of the package. cuda: the version that it was built with, None without CUDA."""

    folder: Path
    version: str
    cuda: tuple[int, int] | None

    def has_nccl(self) -> bool:
        """Whether it was built with NCCL; True where its files are not those of a usual build, and nothing is known."""
        library = self.folder / "lib" / "libtorch_python.so"
        try:
            with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(_NCCL_BINDINGS) >= 0
        except (OSError, ValueError):  # ValueError: an empty file
            return True


def installed_torch() -> TorchBuild | None:
    """The torch that a rank would import, None without one."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    text = (folder / "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__\s*=\s*'([^']+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b.*?=\s*'(\d+)\.(\d+)", text, re.MULTILINE)
    built_with = (int(cuda[1]), int(cuda[2])) if cuda else None
    return TorchBuild(folder, version[1] if version else "of an unknown version", built_with)
