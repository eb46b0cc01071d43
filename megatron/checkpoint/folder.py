"""The folder `save`: find, verify, publish and prune its checkpoints. No tensors here.

    <save>/latest                      the name of the newest checkpoint
    <save>/global_step1000/            state/ (tensors), progress.json, config.json, identity.json, manifest.json
    <save>/.global_step2000.unfinished left by a crash; never read
    <save>/.global_step1000.replaced   left by a crash; read if its replacement is missing

A checkpoint is written under a temporary name, its manifest last, and renamed when everything is on disk. So a folder
`global_step*` was complete once, and its manifest shows whether it still is.
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

from megatron.checkpoint.foreign import ForeignCheckpoint, foreign_checkpoint, is_own, names_in, recognize
from megatron.errors import UserError
from megatron.files import exists, is_file, is_folder
from megatron.progress import Progress
from megatron.text_files import decode_text

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
BEST = "best"
_STEP = r"global_step(0|[1-9][0-9]*)"
Verification = Literal["quick", "full"]  # tensor files: sizes only, or hashes too; other files: always both
TENSORS = ".distcp"  # suffix of tensor files
_HASHING_THREADS = 4  # hashing releases Python's lock


@dataclass(frozen=True)
class Retention:
    """Which checkpoints pruning keeps: the `last` few (None: all), those of `milestones`, and the best."""

    last: int | None = None
    milestones: frozenset[int] = frozenset()
    best: bool = False


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after `step` steps."""
    return f"global_step{step}"


def steps_in(folder: Path) -> list[int]:
    """Steps with a checkpoint of Deepy in `folder`, damaged ones included, in order."""
    return sorted(_checkpoints(folder))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Path of the checkpoint after `step` steps."""
    path, replaced = folder / checkpoint_name(step), folder / f".{checkpoint_name(step)}.replaced"
    return replaced if exists(replaced) and not exists(path) else path


def find_checkpoint(folder: Path, iteration: int | None = None, verify: Verification = "quick") -> Path | None:
    """The checkpoint to load: that of `iteration`, else the newest intact one; None where `folder` holds none at all.

    A damaged one is passed over, with a warning that names its files. Raises UserError for an iteration that is
    missing or damaged, for a folder with nothing but damaged checkpoints, for a path into a checkpoint, and where the
    checkpoint to load was written by another program.
    """
    _refuse_path_into_checkpoint(folder)
    steps, pointer = steps_in(folder), _pointer(folder)
    _refuse_foreign(folder, steps, pointer if iteration is None else checkpoint_name(iteration))
    if iteration is not None:
        return _of_iteration(folder, iteration, steps, verify)
    _warn_of_pointer(folder, steps)
    for path in newest_first(folder):
        if not (problems := damage(path, verify)):
            return path
        log.warning("%s is damaged and not used: %s", path, "; ".join(problems))
    if steps or pointer:
        raise nothing_whole(folder)
    return None


def check_save_folder(folder: Path) -> None:
    """Raise UserError where checkpoints written to `folder` would mix with another program's or lie inside of one."""
    if (inside := _enclosing_checkpoint(folder)) is not None:
        raise UserError(f"save ({folder}) lies inside the checkpoint {inside}; choose a folder outside of it")
    foreign = next(iter(_foreign_steps(folder)), None)
    if foreign is None and not steps_in(folder):
        foreign = foreign_checkpoint(folder, _pointer(folder))
    if foreign is not None:
        raise UserError(f"save ({folder}): {foreign}; choose another folder for save")


def newest_first(folder: Path) -> list[Path]:
    """The checkpoint that `latest` names, then earlier ones; last those after it, left by a run that went back.

    Damaged ones included.
    """
    steps, named = steps_in(folder), _pointer(folder)
    current = next((step for step in steps if checkpoint_name(step) == named), None)
    newest = max(steps, default=0) if current is None else current
    ordered = sorted(steps, key=lambda step: (step <= newest, step), reverse=True)
    return [checkpoint_path(folder, step) for step in ordered]


def nothing_whole(folder: Path) -> UserError:
    """To raise where `folder` holds nothing but damaged checkpoints."""
    return UserError(
        f"{folder} holds no whole checkpoint; restore one, or start afresh with another folder for save and load"
    )


def damaged(path: Path, problems: list[str]) -> UserError:
    """To raise where the requested checkpoint is damaged."""
    return UserError(f"{path} is damaged:", *(f"  {problem}" for problem in problems))


def best_checkpoint(folder: Path) -> Path | None:
    """The intact checkpoint that `best` names, if there is one."""
    name = _pointer(folder, BEST)
    return folder / name if name and not damage(folder / name) else None


def damage(path: Path, verify: Verification = "quick", share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with the files of a checkpoint, one message per file; empty if it is intact.

    share: (index, count), to check every count-th file only, so that ranks can divide the work.
    """
    try:
        manifest = read_document(path / MANIFEST)
        if manifest["format"] != FORMAT:
            return [f"its format is {manifest['format']}, and this version of Deepy reads format {FORMAT}"]
        files = sorted(manifest["files"].items())[share[0] :: share[1]]
        total = sum(int(entry["bytes"]) for _, entry in files)
        with Progress(f"checking {path}", total, "B") as progress, ThreadPoolExecutor(_HASHING_THREADS) as pool:

            def check(file: tuple[str, dict[str, Any]]) -> str | None:
                name, entry = file
                problem = _file_damage(path / name, entry, verify)
                progress.add(entry["bytes"])
                return problem

            checks = list(pool.map(check, files))
    except UserError:
        return [f"{MANIFEST} is missing or cannot be read"]
    except OSError as error:
        return [f"{error.filename} cannot be read: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} does not describe the files of a checkpoint"]
    return [problem for problem in checks if problem]


def read_document(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint, such as progress.json. Raises UserError if it cannot be read or is not one."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not JSON: {error}"
        raise UserError(f"{path} cannot be read: {reason}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} cannot be read: it is not a JSON object")
    return document


def describe_file(path: Path) -> dict[str, Any]:
    """The manifest's entry for a file."""
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(unfinished: Path, final: Path, documents: Mapping[str, Any], files: Mapping[str, dict[str, Any]]) -> None:
    """Publish a finished checkpoint: write its JSON `documents` and manifest, rename it, update `latest`.

    files: manifest entries of the tensor files, which have been written already.
    """
    for name, document in documents.items():
        write_durably(unfinished / name, json.dumps(document, indent=2))
    entries = dict(files) | {name: describe_file(unfinished / name) for name in documents}
    write_durably(unfinished / MANIFEST, json.dumps({"format": FORMAT, "files": entries}, indent=2))
    for folder in {(unfinished / name).parent for name in entries} | {unfinished}:
        _sync_folder(folder)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():  # a run that went back to an earlier step saves this one again
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    unfinished.rename(final)
    point_to(final, "latest")
    shutil.rmtree(replaced, ignore_errors=True)


def point_to(checkpoint: Path, pointer: str) -> None:
    """Make `pointer` ("latest", "best") name `checkpoint`, atomically."""
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
            # renamed first: a crash must not leave half a checkpoint under its name
            doomed = path.rename(path.with_name(f".{path.name}.deleted"))
            shutil.rmtree(doomed)


def clear_remains(folder: Path) -> None:
    """Remove what crashed runs left: unfinished and half-deleted checkpoints.

    One that was being replaced gets its name back if the replacement is missing.
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
    """Warn where `latest` does not name a checkpoint of the folder."""
    named = _pointer(folder)
    if steps and named not in [checkpoint_name(step) for step in steps]:
        what = f'names "{named}", which is not in that folder' if named else "is missing or empty"
        log.warning("%s %s: taking the newest whole checkpoint", folder / "latest", what)


def _refuse_path_into_checkpoint(folder: Path) -> None:
    """Raise UserError for a path that is a checkpoint of Deepy, or a file, in the place of a folder of checkpoints."""
    if (inside := _enclosing_checkpoint(folder)) is not None:
        step = inside.name.removeprefix("global_step")
        chosen = f", with iteration={step}" if step.isdecimal() else ""
        raise UserError(f"{folder} is inside a checkpoint; give the folder that holds it: {inside.parent}{chosen}")
    if is_file(folder):
        foreign = recognize(folder)
        raise _foreign(foreign) if foreign else UserError(f"{folder} is a file, not a folder of checkpoints")


def _enclosing_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of Deepy that `folder` is, or lies in."""
    path = Path(os.path.abspath(folder))  # noqa: PTH100 (Path.resolve raises for loops of links)
    for candidate in (path, *path.parents):
        is_step = re.fullmatch(_STEP, candidate.name) is not None
        if is_step and is_folder(candidate) and is_own(names_in(candidate)):
            return candidate
    return None


def _refuse_foreign(folder: Path, steps: list[int], chosen: str | None) -> None:
    """Raise UserError where the checkpoint to load is another program's; warn of others that are passed over.

    steps: those with a checkpoint of Deepy. chosen: name of the checkpoint that `latest` or `iteration` names.
    """
    foreign = _foreign_steps(folder)
    problem = next((each for each in foreign if each.path.name == chosen), None)
    if problem is None and not steps:
        problem = foreign_checkpoint(folder, chosen)
    if problem is not None:
        raise _foreign(problem)
    for each in foreign:
        log.warning("%s; it is passed over", each)


def _foreign(checkpoint: ForeignCheckpoint) -> UserError:
    return UserError(f"{checkpoint}; choose another folder for load and save")


def _foreign_steps(folder: Path) -> list[ForeignCheckpoint]:
    """Checkpoints of other programs whose names could be ours."""
    paths = (folder / name for name in names_in(folder) if re.fullmatch(_STEP, name))
    return [foreign for path in paths if (foreign := recognize(path))]


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> checkpoint of Deepy. One that was to be replaced counts if its replacement is missing."""
    found: dict[int, Path] = {}
    names = names_in(folder)
    for pattern in (rf"\.{_STEP}\.replaced", _STEP):
        matches = ((folder / name, re.fullmatch(pattern, name)) for name in names)
        found |= {int(match[1]): path for path, match in matches if match and not recognize(path)}
    return found


def _pointer(folder: Path, pointer: str = "latest") -> str | None:
    """The name in a pointer file; None where it is missing, "" where it is empty. Raises UserError if not readable.

    A path is taken for a name if it leads into `folder`.
    """
    path = folder / pointer
    if not is_file(path):
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        named = decode_text(content, str(path)).strip()
    except UserError:  # damaged: it names nothing, and the caller says so
        named = content.decode(errors="replace").strip()
    full = os.path.normpath(Path(os.path.abspath(folder), named))  # noqa: PTH100
    return named and (Path(full).name if Path(full).parent == Path(os.path.abspath(folder)) else named)  # noqa: PTH100


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
