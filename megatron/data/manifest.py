"""The manifest of preprocessed data: what a pair of token files was made of, written next to it. No torch."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron.files import replaced_when_complete

FORMAT = "deepy-data-manifest 1"
MANIFEST_ENDING = "_manifest.json"
PACKAGES = ("deepy", "numpy", "tokenizers", "tiktoken", "gigatoken", "sentencepiece", "ftfy")


def manifest_path(output_prefix: str) -> Path:
    """The path of a run's manifest."""
    return Path(output_prefix + MANIFEST_ENDING)


def write_manifest(output_prefix: str, outputs: Iterable[str], **facts: Any) -> None:
    """Write `facts`, the sizes and hashes of `outputs`, the versions of packages, and the time. Atomic."""
    content = {"format": FORMAT, **facts}
    content["outputs"] = [file_facts(path) for path in outputs]
    content["versions"] = versions()
    content["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    with replaced_when_complete(manifest_path(output_prefix)) as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_manifest(output_prefix: str) -> dict[str, Any] | None:
    """The manifest of a completed run; None where there is none, or the file is something else."""
    try:
        with manifest_path(output_prefix).open(encoding="utf-8") as file:
            head = file.read(len(FORMAT) + 100)  # other files may be large
            content = json.loads(head + file.read()) if FORMAT in head else None
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def file_facts(path: str) -> dict[str, Any]:
    """Name, size and SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return {
            "path": path,
            "bytes": Path(path).stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that the output depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
