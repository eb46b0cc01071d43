"""Memory that a rank needs to load a checkpoint of another layout, in addition to its state.

    python bench/checkpoint_load.py [--vocabulary 32768 131072]

CPU ranks, and a model that consists mostly of embedding and head, so that one tensor dominates. A rank's state
(weights, fp32 masters, moments) exists before the load; measured is the peak of resident memory (Linux) above it, also
in units of the largest tensor.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch.distributed as dist  # noqa: E402

from megatron.checkpoint.state import TrainState  # noqa: E402
from megatron.checkpoint.store import CheckpointWriter, load_checkpoint  # noqa: E402
from tests.ranks.moves import Settings, engine_of, layout_name  # noqa: E402
from tests.ranks.run import run_ranks  # noqa: E402

SOURCE: Settings = {"pipe": 2, "tensor": 2}
TARGETS: list[Settings] = [{"data": 4, "zero": 3}, {"data": 2, "zero": 1}, {"tensor": 2}, {}]
MOVES = [(SOURCE, TARGETS), ({}, TARGETS[:1])]  # one rank writes each tensor whole
HIDDEN = 256


def sizes(vocabulary: int) -> Settings:
    """Settings of a model with a large embedding."""
    shape = {"hidden_size": HIDDEN, "head_size": HIDDEN // 4, "ffn_hidden_size": HIDDEN}
    return {"model": {"vocab_size": vocabulary, "padded_vocab_size": vocabulary, **shape}}


def save(folder: str, settings: Settings) -> None:
    """On a rank: write a checkpoint of a fresh engine."""
    engine, _ = engine_of(settings)
    CheckpointWriter(engine, Path(folder), {}).save(TrainState())


def load(folder: str, settings: Settings) -> None:
    """On a rank: read it, and record the peak of memory above the memory before."""
    engine, _ = engine_of(settings)
    engine.state.fragments()  # creates the moments
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    load_checkpoint(engine, Path(folder, "global_step0"))
    Path(folder, f"rank_{dist.get_rank()}").write_text(json.dumps(memory("VmHWM") - before))


def memory(what: str) -> int:
    """Bytes of this process, as the kernel reports them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def measure(vocabulary: int, source: Settings, targets: list[Settings]) -> list[int]:
    """The largest excess over all ranks for each target, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(world(source), save, folder, source | sizes(vocabulary), timeout=300)
        found = []
        for target in targets:
            run_ranks(world(target), load, folder, target | sizes(vocabulary), timeout=300)
            ranks = [Path(folder, f"rank_{rank}") for rank in range(world(target))]
            found.append(max(json.loads(path.read_text()) for path in ranks))
    return found


def world(settings: Settings) -> int:
    """Number of ranks of a layout."""
    return settings.get("pipe", 1) * settings.get("tensor", 1) * settings.get("data", 1)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32768, 131072])
    arguments = parser.parse_args()
    print("| from | to | largest tensor | peak above the state | in largest tensors |\n|---|---|---|---|---|")
    for vocabulary in arguments.vocabulary:
        largest = 4 * vocabulary * HIDDEN
        for source, targets in MOVES:
            for target, excess in zip(targets, measure(vocabulary, source, targets), strict=True):
                cells = f"{largest / 2**20:.0f} MiB | {excess / 2**20:.0f} MiB | {excess / largest:.2f}"
                print(f"| {layout_name(source)} | {layout_name(target)} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
