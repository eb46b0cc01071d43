"""The folder `save`: which checkpoints it holds, whether they are whole, and which of them stay.

    <save>/latest                      the name of the newest checkpoint
    <save>/global_step1000/            state/ (tensors), progress.json, config.json, identity.json, manifest.json
    <save>/.global_step2000.unfinished what a crash may leave; it is never read
    <save>/.global_step1000.replaced   likewise; it is read where the one that was to replace it is not there

A checkpoint is written under another name, its manifest last, and renamed when everything is on disk: a folder
`global_step*` was whole once, and its manifest tells whether it still is. No tensors here.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
BEST = "best"
Verification = Literal["quick", "full"]  # of the files of tensors the sizes, or the hashes as well; of others both
TENSORS = ".distcp"  # the ending of their files
_HASHED_AT_ONCE = 4  # files, in threads: hashing lets go of Python's lock


@dataclass(frozen=True)
class Retention:
    """Which checkpoints pruning leaves: the last few, those of `milestones`, and the best. `last` None: all stay."""

    last: int | None = None
    milestones: frozenset[int] = frozenset()
    best: bool = False


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after `step` steps."""
    return f"global_step{step}"


def steps_in(folder: Path) -> list[int]:
    """Steps with a checkpoint in `folder`, damaged ones included, in order."""
    return sorted(_checkpoints(folder))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return _checkpoints(folder).get(step, folder / checkpoint_name(step))


def find_checkpoint(folder: Path, iteration: int | None = None, verify: Verification = "quick") -> Path | None:
    """The checkpoint to load: that of `iteration`, else the newest whole one; None where `folder` holds none at all.

    A damaged one is passed over, with a warning that names its files. Raises UserError for an iteration that is not
    there or damaged, and for a folder with nothing but damaged checkpoints.
    """
    steps = steps_in(folder)
    if iteration is not None:
        return _of_iteration(folder, iteration, steps, verify)
    _warn_of_pointer(folder, steps)
    for path in newest_first(folder):
        if not (problems := damage(path, verify)):
            return path
        log.warning("%s is damaged and not used: %s", path, "; ".join(problems))
    if steps or _pointer(folder):
        raise nothing_whole(folder)
    return None


def newest_first(folder: Path) -> list[Path]:
    """The checkpoint that `latest` names, then those before it; last those after it, which a run left that went back.

    Damaged ones included.
    """
    steps, named = steps_in(folder), _pointer(folder)
    current = next((step for step in steps if checkpoint_name(step) == named), None)
    newest = max(steps, default=0) if current is None else current
    ordered = sorted(steps, key=lambda step: (step <= newest, step), reverse=True)
    return [checkpoint_path(folder, step) for step in ordered]


def nothing_whole(folder: Path) -> UserError:
    """To raise where `folder` holds nothing but damaged checkpoints."""
    return UserError(f"{folder} holds no whole checkpoint; restore one, or remove the folder to start afresh")


def damaged(path: Path, problems: list[str]) -> UserError:
    """To raise where the checkpoint that was asked for is damaged."""
    return UserError(f"{path} is damaged:", *(f"  {problem}" for problem in problems))


def best_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint that `best` names, if there is one."""
    name = _pointer(folder, BEST)
    return folder / name if name and not damage(folder / name) else None


def damage(path: Path, verify: Verification = "quick", share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with the files of a checkpoint, one message a file; empty when it is whole.

    share: (number, of how many), to look at a part of the files only; together the parts are all of them.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return [f"its format is {manifest['format']}, and this version of Deepy reads format {FORMAT}"]
        files = sorted(manifest["files"].items())[share[0] :: share[1]]
        with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
            checks = list(pool.map(lambda file: _file_damage(path / file[0], file[1], verify), files))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"]
    return [problem for problem in checks if problem]


def describe_file(path: Path) -> dict[str, Any]:
    """The entry of a file in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(unfinished: Path, final: Path, documents: Mapping[str, Any], files: Mapping[str, dict[str, Any]]) -> None:
    """Make a finished checkpoint appear: write its JSON `documents` and manifest, rename it, move `latest`.

    files: manifest entries of the tensor files that are there already.
    """
    for name, document in documents.items():
        write_durably(unfinished / name, json.dumps(document, indent=2))
    entries = dict(files) | {name: describe_file(unfinished / name) for name in documents}
    write_durably(unfinished / MANIFEST, json.dumps({"format": FORMAT, "files": entries}, indent=2))
    for folder in {(unfinished / name).parent for name in entries} | {unfinished}:
        _sync_folder(folder)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():  # a run that went back to an earlier step comes by again
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    unfinished.rename(final)
    point_to(final, "latest")
    shutil.rmtree(replaced, ignore_errors=True)


def point_to(checkpoint: Path, pointer: str) -> None:
    """Let `pointer` ("latest", "best") name `checkpoint`, at one stroke."""
    new = checkpoint.parent / f".{pointer}.unfinished"
    write_durably(new, checkpoint.name)
    new.rename(checkpoint.parent / pointer)
    _sync_folder(checkpoint.parent)


def prune(folder: Path, retention: Retention) -> None:
    """Delete the checkpoints that `retention` does not keep, oldest first."""
    if retention.last is None:
        return
    best = _pointer(folder, BEST) if retention.best else None
    kept = {checkpoint_name(step) for step in retention.milestones} | {best}
    for path in reversed(newest_first(folder)[retention.last :]):
        if path.name not in kept:
            # out of sight first: a crash in the middle must not leave half a checkpoint under its name
            doomed = path.rename(path.with_name(f".{path.name}.deleted"))
            shutil.rmtree(doomed)


def clear_remains(folder: Path) -> None:
    """Remove what crashed runs left: unfinished and half-deleted checkpoints.

    One that was just being replaced, and whose place is empty, comes back.
    """
    for path in folder.glob(".global_step*.replaced"):
        final = path.with_name(path.name[1:].removesuffix(".replaced"))
        if not final.exists():
            path.rename(final)
    for path in folder.glob(".global_step*"):
        shutil.rmtree(path, ignore_errors=True)


def write_durably(path: Path, text: str) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _of_iteration(folder: Path, iteration: int, steps: list[int], verify: Verification) -> Path:
    if iteration not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise UserError(f"iteration {iteration}: no such checkpoint in {folder}; there are: {known}")
    path = checkpoint_path(folder, iteration)
    if problems := damage(path, verify):
        raise damaged(path, problems)
    return path


def _warn_of_pointer(folder: Path, steps: list[int]) -> None:
    """Say so where `latest` names nothing that is there."""
    named = _pointer(folder)
    if steps and named not in [checkpoint_name(step) for step in steps]:
        what = f'names "{named}", which is not there' if named else "is missing or empty"
        log.warning("%s %s: taking the newest whole checkpoint", folder / "latest", what)


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> its checkpoint; one that was to be replaced counts while the new one is not there."""
    found: dict[int, Path] = {}
    for pattern in (r"\.global_step(\d+)\.replaced", r"global_step(\d+)"):
        matches = ((path, re.fullmatch(pattern, path.name)) for path in folder.glob("*global_step*"))
        found |= {int(match[1]): path for path, match in matches if match}
    return found


def _pointer(folder: Path, pointer: str = "latest") -> str | None:
    """What a pointer file names; None where it is missing, "" where it is empty."""
    path = folder / pointer
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None


def _file_damage(path: Path, entry: dict[str, Any], verify: Verification) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"{path.name} has {size:,} bytes instead of {entry['bytes']:,}"
    if (verify == "full" or path.suffix != TENSORS) and file_hash(path) != entry["sha256"]:
        return f"{path.name} has other content than was written"
    return None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
