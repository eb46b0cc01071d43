"""How much memory a rank needs while it loads a checkpoint that another layout wrote, beyond its share of the state.

    python bench/checkpoint_load.py [--vocabulary 32768 131072]

CPU ranks, and a model of which nearly all is the embedding and the head, so that the largest tensor stands out. The
share of a rank (weights, fp32 masters, moments) is there before; what is measured is the peak of resident memory over
that, as Linux counts it, in units of the largest tensor.
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
    """A model with `vocabulary` rows of embedding, and little else."""
    shape = {"hidden_size": HIDDEN, "head_size": HIDDEN // 4, "ffn_hidden_size": HIDDEN}
    return {"model": {"vocab_size": vocabulary, "padded_vocab_size": vocabulary, **shape}}


def save(folder: str, settings: Settings) -> None:
    """On a rank: write a checkpoint of a fresh engine."""
    engine, _ = engine_of(settings)
    CheckpointWriter(engine, Path(folder), {}).save(TrainState())


def load(folder: str, settings: Settings) -> None:
    """On a rank: read it, and write down by how much the peak of memory was above what was there before."""
    engine, _ = engine_of(settings)
    engine.state.fragments()  # which makes the moments
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    load_checkpoint(engine, Path(folder, "global_step0"))
    Path(folder, f"rank_{dist.get_rank()}").write_text(json.dumps(memory("VmHWM") - before))


def memory(what: str) -> int:
    """Bytes of this process, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def measure(vocabulary: int, source: Settings, targets: list[Settings]) -> list[int]:
    """For each target the largest excess of any rank, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(world(source), save, folder, source | sizes(vocabulary), timeout=300)
        found = []
        for target in targets:
            run_ranks(world(target), load, folder, target | sizes(vocabulary), timeout=300)
            ranks = [Path(folder, f"rank_{rank}") for rank in range(world(target))]
            found.append(max(json.loads(path.read_text()) for path in ranks))
    return found


def world(settings: Settings) -> int:
    """Ranks of a layout."""
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
                told = f"{largest / 2**20:.0f} MiB | {excess / 2**20:.0f} MiB | {excess / largest:.2f}"
                print(f"| {layout_name(source)} | {layout_name(target)} | {told} |", flush=True)


if __name__ == "__main__":
    main()
