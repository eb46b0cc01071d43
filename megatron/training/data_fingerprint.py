"""Fingerprint the datasets of a run by sampling, to detect changes in place.

Counts come from the index. Contents are sampled: 64 blocks of 4 KiB, evenly spaced over each of the two files, which is
all of a small file and takes milliseconds for a terabyte. The index holds the offset of every document, so a document
that is added, removed or changes its length is detected wherever it is. One that is overwritten with the same length is
detected by the hash of the whole file in the manifest of `preprocess_data.py` or `merge_datasets.py`, if there is one
next to the files. Each rank computes the fingerprints by itself.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from megatron.config.schema.data_keys import DataKeys
from megatron.data.indexed import IndexedDataset
from megatron.data.manifest import read_manifest

# the keys that name the datasets trained on
DATASET_KEYS = ("data_path", "train_data_paths", "train_label_data_paths")
BLOCKS, BLOCK_BYTES = 64, 4096

Fingerprints = dict[str, list[dict[str, Any]]]  # key of the configuration -> its datasets, in order


def fingerprints_of(data: DataKeys) -> Fingerprints:
    """The fingerprint of each dataset that is trained on. Raises UserError where one cannot be read."""
    named = {} if data.data_impl == "mock" else {key: getattr(data, key) for key in DATASET_KEYS}
    return {
        key: [_fingerprint(path) for path in ([paths] if isinstance(paths, str) else paths)]
        for key, paths in named.items()
        if paths
    }


def compare_fingerprints(here: Fingerprints, there: Fingerprints) -> tuple[list[str], list[str]]:
    """One line per dataset that differs, and one per dataset that is the same under another path."""
    differences, moved = [], []
    for key in DATASET_KEYS:
        mine, theirs = here.get(key, []), there.get(key, [])
        if len(mine) != len(theirs):
            differences.append(f"{key} is {_paths(mine)} here, and was {_paths(theirs)} there")
            continue
        for one, other in zip(mine, theirs, strict=True):
            if not _same(one, other):
                differences.append(f"{key}: {_described(one)} here, and {_described(other)} there")
            elif one["path"] != other["path"]:
                moved.append(f"{key}: {one['path']} has the content that {other['path']} had")
    return differences, moved


def _fingerprint(path: str) -> dict[str, Any]:
    dataset = IndexedDataset(path)
    fingerprint = {
        "path": dataset.prefix,
        "documents": len(dataset),
        "tokens": dataset.num_tokens,
        "sample": _sample(dataset.prefix),
    }
    hashes = _hashes(dataset.prefix)
    return fingerprint | ({"sha256": hashes} if hashes else {})


def _sample(prefix: str) -> str:
    """A hash of the sizes of both files and of `BLOCKS` blocks of each."""
    digest = hashlib.sha256()
    for ending in (".idx", ".bin"):
        with Path(prefix + ending).open("rb", buffering=BLOCK_BYTES) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            for block in range(BLOCKS):
                file.seek(max(0, size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]


def _hashes(prefix: str) -> list[str]:
    """SHA-256 of the .bin and the .idx from the manifest next to them; empty without a matching manifest."""
    manifest = read_manifest(prefix) or read_manifest(re.sub("_[^_/]+_document$", "", prefix)) or {}
    names = [Path(prefix + ending).name for ending in (".bin", ".idx")]
    try:
        found = {Path(entry["path"]).name: entry["sha256"] for entry in manifest.get("outputs", [])}
    except (KeyError, TypeError):
        return []
    return [str(found[name]) for name in names] if all(name in found for name in names) else []


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two fingerprints match; hashes of whole files are compared if both have them."""
    keys = {"documents", "tokens", "sample"} | ({"sha256"} & one.keys() & other.keys())
    return all(one[key] == other.get(key) for key in keys)


def _described(fingerprint: dict[str, Any]) -> str:
    bin_hash = f", SHA-256 {fingerprint['sha256'][0][:12]}" if "sha256" in fingerprint else ""
    return (
        f"{fingerprint['path']} with {fingerprint['documents']:,} documents and {fingerprint['tokens']:,} tokens "
        f"(content {fingerprint['sample']}{bin_hash})"
    )


def _paths(fingerprints: list[dict[str, Any]]) -> str:
    return f"[{', '.join(each['path'] for each in fingerprints)}]" if fingerprints else "not read"
