"""What the corpora of a run hold, told by a look of bounded size, so that data which changed in place are noticed.

Counts come from the index. The content is told by 64 looks of 4 KiB, evenly spread over each of the two files: all of
a small file, some milliseconds of a terabyte. The index holds the place of every document, so that a document that
comes, goes or changes its length is seen from wherever it is. One that is overwritten in place shows in the hash that
the manifest of `preprocess_data.py` or `merge_datasets.py` has of the whole file, where it lies beside the files.
Each rank looks for itself.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from megatron.config.schema.data_keys import DataKeys
from megatron.data.indexed import IndexedDataset
from megatron.data.manifest import read_manifest

# the keys that name what is trained on
CORPORA = ("data_path", "train_data_paths", "train_label_data_paths")
LOOKS, BYTES = 64, 4096

Contents = dict[str, list[dict[str, Any]]]  # of each key that is set: its corpora, in order


def contents_of(data: DataKeys) -> Contents:
    """What each corpus that is trained on holds. Raises UserError where one cannot be read."""
    named = {} if data.data_impl == "mock" else {key: getattr(data, key) for key in CORPORA}
    return {
        key: [_content(path) for path in ([paths] if isinstance(paths, str) else paths)]
        for key, paths in named.items()
        if paths
    }


def compare_contents(here: Contents, there: Contents) -> tuple[list[str], list[str]]:
    """Differences in what is trained on, a line each; and what only lies elsewhere, or has another name, now."""
    differences, moved = [], []
    for key in CORPORA:
        mine, theirs = here.get(key, []), there.get(key, [])
        if len(mine) != len(theirs):
            differences.append(f"{key} is {_paths(mine)} here, and was {_paths(theirs)} there")
            continue
        for one, other in zip(mine, theirs, strict=True):
            if not _same(one, other):
                differences.append(f"{key}: {_told(one)} here, and {_told(other)} there")
            elif one["path"] != other["path"]:
                moved.append(f"{key}: {one['path']} has the content that {other['path']} had")
    return differences, moved


def _content(path: str) -> dict[str, Any]:
    dataset = IndexedDataset(path)
    content = {
        "path": dataset.prefix,
        "documents": len(dataset),
        "tokens": dataset.num_tokens,
        "sample": _sample(dataset.prefix),
    }
    hashes = _hashes(dataset.prefix)
    return content | ({"sha256": hashes} if hashes else {})


def _sample(prefix: str) -> str:
    """A hash of the sizes of both files and of `LOOKS` pieces of each."""
    digest = hashlib.sha256()
    for ending in (".idx", ".bin"):
        with Path(prefix + ending).open("rb", buffering=BYTES) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            for look in range(LOOKS):
                file.seek(max(0, size - BYTES) * look // (LOOKS - 1))
                digest.update(file.read(BYTES))
    return digest.hexdigest()[:16]


def _hashes(prefix: str) -> list[str]:
    """SHA-256 of the .bin and the .idx, as the manifest beside them has it; empty without one that fits."""
    manifest = read_manifest(prefix) or read_manifest(re.sub("_[^_/]+_document$", "", prefix)) or {}
    names = [Path(prefix + ending).name for ending in (".bin", ".idx")]
    try:
        found = {Path(entry["path"]).name: entry["sha256"] for entry in manifest.get("outputs", [])}
    except (KeyError, TypeError):
        return []
    return [str(found[name]) for name in names] if all(name in found for name in names) else []


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two corpora hold the same; hashes of the whole files count where both have them."""
    keys = {"documents", "tokens", "sample"} | ({"sha256"} & one.keys() & other.keys())
    return all(one[key] == other.get(key) for key in keys)


def _told(content: dict[str, Any]) -> str:
    bin_hash = f", SHA-256 {content['sha256'][0][:12]}" if "sha256" in content else ""
    return (
        f"{content['path']} with {content['documents']:,} documents and {content['tokens']:,} tokens "
        f"(content {content['sample']}{bin_hash})"
    )


def _paths(contents: list[dict[str, Any]]) -> str:
    return f"[{', '.join(content['path'] for content in contents)}]" if contents else "not read"
