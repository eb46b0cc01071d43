"""What a pair of token files was made of, written beside it. No torch."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("deepy", "numpy", "tokenizers", "tiktoken", "gigatoken", "sentencepiece", "ftfy")


def manifest_path(output_prefix: str) -> Path:
    """Where the manifest of a run lies."""
    return Path(f"{output_prefix}_manifest.json")


def write_manifest(output_prefix: str, outputs: Iterable[str], **facts: Any) -> None:
    """Write the manifest: `facts`, what is in the files `outputs`, the versions, and the time. Whole or not at all."""
    content = {"format": "deepy-data-manifest 1", **facts}
    content["outputs"] = [file_facts(path) for path in outputs]
    content["versions"] = versions()
    content["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    path = manifest_path(output_prefix)
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    partial.replace(path)


def read_manifest(output_prefix: str) -> dict[str, Any] | None:
    """The manifest of a run that was completed; None if there is none that can be read."""
    try:
        content: dict[str, Any] = json.loads(manifest_path(output_prefix).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content


def file_facts(path: str) -> dict[str, Any]:
    """Name, size and SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return {
            "path": path,
            "bytes": Path(path).stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide about the output, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
