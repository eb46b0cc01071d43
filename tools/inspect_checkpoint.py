"""List, verify, compare and show checkpoints. Needs neither a GPU nor the layout of the run.

    python tools/inspect_checkpoint.py checkpoints/my                       list them, newest last
    python tools/inspect_checkpoint.py checkpoints/my/global_step100        its tensors: shape, mean, spread, extremes
    python tools/inspect_checkpoint.py checkpoints/my --verify              hash every file of every checkpoint
    python tools/inspect_checkpoint.py A/global_step100 --compare B/global_step100

Exit code: 0, or 1 when something is damaged or two checkpoints differ, or 2 when the command is wrong.
"""

import argparse
import sys
from pathlib import Path

import torch

from megatron.checkpoint.folder import checkpoint_path, damage, read_document, steps_in
from megatron.checkpoint.foreign import foreign_checkpoint
from megatron.checkpoint.reading import SafeReader, read_tensors, tensor_shapes
from megatron.errors import UserError, exit_code
from megatron.files import is_folder


def main() -> int:
    """Parse the command, do what it asks for, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder of checkpoints, or one checkpoint")
    parser.add_argument("--verify", action="store_true", help="compare every file with the hash in its manifest")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="another checkpoint, compared bit by bit")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only tensors whose name contains TEXT")
    arguments = parser.parse_args()
    if arguments.compare is not None:
        return compare(arguments.path, arguments.compare, arguments.filter)
    checkpoints = checkpoints_of(arguments.path)
    if arguments.verify:
        return verify(checkpoints)
    if checkpoints == [arguments.path]:
        return show(arguments.path, arguments.filter)
    for checkpoint in checkpoints:
        print(summary(checkpoint))
    return int(any(map(damage, checkpoints)))


def checkpoints_of(path: Path) -> list[Path]:
    """The checkpoint `path`, or those in that folder. Raises UserError if there is none."""
    if is_folder(path / "state"):
        return [path]
    if not (steps := steps_in(path)):
        raise _not_a_checkpoint(path)
    return [checkpoint_path(path, step) for step in steps]


def _not_a_checkpoint(path: Path) -> UserError:
    foreign = foreign_checkpoint(path)
    return UserError(str(foreign) if foreign else f"{path} is not a checkpoint of Deepy and holds none")


def summary(checkpoint: Path) -> str:
    """One line: size, progress, and whether all files are there."""
    if problems := damage(checkpoint):
        return f"{checkpoint.name}: DAMAGED: {'; '.join(problems)}"
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    progress = read_document(checkpoint / "progress.json")
    counts = ", ".join(f"{progress.get(f'consumed_{name}', 0):,} {name}" for name in ("samples", "tokens"))
    skipped = "".join(f", left out {first:,} to {end - 1:,}" for first, end in progress.get("skipped_samples", []))
    return f"{checkpoint.name}: {size / 2**20:,.1f} MiB, {counts}{skipped}"


def verify(checkpoints: list[Path]) -> int:
    """Hash every file; 1 if one differs from its manifest."""
    bad = 0
    for checkpoint in checkpoints:
        problems = damage(checkpoint, "full")
        print(f"{checkpoint.name}: {'; '.join(problems) if problems else 'every file is as it was written'}")
        bad += bool(problems)
    return min(bad, 1)


def show(checkpoint: Path, text: str) -> int:
    """Print each tensor with statistics, one at a time in memory; 1 if something is damaged."""
    print(summary(checkpoint))
    reader = SafeReader(checkpoint / "state")
    for name, shape in sorted(tensor_shapes(reader).items()):
        if text in name:
            tensor = read_tensors(reader, [name])[name]
            spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
            print(
                f"{name:60} {list(shape)!s:20} mean {float(tensor.mean()):+.3e}  std {spread:.3e}"
                f"  min {float(tensor.min()):+.3e}  max {float(tensor.max()):+.3e}"
                + ("" if bool(tensor.isfinite().all()) else "  NOT FINITE")
            )
    return int(bool(damage(checkpoint)))


def compare(one: Path, other: Path, text: str) -> int:
    """Print every difference between two checkpoints; 1 if there is one."""
    if missing := [path for path in (one, other) if not is_folder(path / "state")]:
        raise _not_a_checkpoint(missing[0])
    readers = [SafeReader(path / "state") for path in (one, other)]
    first, second = map(tensor_shapes, readers)
    alone = sorted(name for name in first.keys() ^ second.keys() if text in name)
    differences = [f"{name}: only in {one if name in first else other}" for name in alone]
    common = sorted(name for name in first.keys() & second.keys() if text in name)
    for name in common:
        if first[name] != second[name]:
            differences.append(f"{name}: {list(first[name])} and {list(second[name])}")
            continue
        a, b = (read_tensors(reader, [name])[name] for reader in readers)
        if not torch.equal(a, b):
            count = int((a != b).sum())
            differences.append(
                f"{name}: {count:,} of {a.numel():,} elements, by at most {float((a - b).abs().max()):.3e}"
            )
    print("\n".join(differences) or f"the {len(common)} tensors are equal, bit for bit")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
