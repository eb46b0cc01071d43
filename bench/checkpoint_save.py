"""How long a checkpoint blocks training: written synchronously, and in the background.

    python bench/checkpoint_save.py [--hidden 512] [--rounds 5]

Two CPU ranks, ZeRO 1, a model of the given width; both ways alternate in one run. The total cost of a checkpoint is the
time between two checkpoints compared with the time of the steps between them. The last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from megatron.checkpoint.state import TrainState  # noqa: E402
from megatron.checkpoint.store import CheckpointWriter  # noqa: E402
from megatron.engine.distributed import start  # noqa: E402
from megatron.engine.training import TrainingEngine  # noqa: E402
from megatron.model.gpt import gpt_layers  # noqa: E402
from tests import tiny  # noqa: E402
from tests.ranks.run import run_ranks  # noqa: E402

STEPS = 4  # between checkpoints


def measure(folder: str, hidden: int, rounds: int) -> None:
    """On a rank: save in both ways alternately, and time how long training is blocked."""
    plan = tiny.plan(
        data=2, zero=1, model={"hidden_size": hidden, "head_size": hidden // 4, "ffn_hidden_size": 4 * hidden}
    )
    plan = replace(plan, model=replace(plan.model, vocab_size=8192, padded_vocab_size=8192))
    grid = start()
    engine = TrainingEngine(gpt_layers(plan.model, grid, 1), grid, plan)
    writers = {
        kind: CheckpointWriter(engine, Path(folder, kind), {}, asynchronous=kind == "asynchronous")
        for kind in ("synchronous", "asynchronous")
    }
    waits: dict[str, list[float]] = {f"{kind} {what}": [] for kind in writers for what in ("stall", "period")}
    waits["steps alone"] = []
    batch = tiny.micro_batches(0, plan, grid.rank("data"))
    for step in range(rounds):
        for kind, writer in [*writers.items(), (None, None)]:
            torch.distributed.barrier()
            began = time.perf_counter()
            if writer is not None:
                writer.save(TrainState(step + 1))
                waits[f"{kind} stall"].append(time.perf_counter() - began)
            for _ in range(STEPS):
                engine.train_batch(batch, step=step, learning_rate=1e-3)
            if writer is not None:
                writer.finish()
            waits[f"{kind} period" if kind else "steps alone"].append(time.perf_counter() - began)
    if grid.rank("data") == 0:
        parameters = engine.parameters_on_rank()
        Path(folder, "waits.json").write_text(json.dumps({"parameters": parameters, "seconds": waits}))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(2, measure, folder, arguments.hidden, arguments.rounds, timeout=600)
        found = json.loads(Path(folder, "waits.json").read_text())
    seconds = {kind: values[1:] for kind, values in found["seconds"].items()}  # the first round warms up
    stalls = zip(seconds["asynchronous stall"], seconds["synchronous stall"], strict=True)
    ratios = [stall / whole for stall, whole in stalls]
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    for kind, values in seconds.items():
        print(f"{kind:20} {medians[kind]:.3f} s  [{min(values):.3f}, {max(values):.3f}]")
    result = {
        "parameters": found["parameters"],
        "stall_over_synchronous": round(statistics.median(ratios), 4),
        "spread": [round(min(ratios), 4), round(max(ratios), 4)],
        "mebibytes_per_second": round(12 * found["parameters"] / 2**20 / medians["synchronous stall"]),
        "throughput": {
            kind: round(medians["steps alone"] / medians[f"{kind} period"], 3)
            for kind in ("synchronous", "asynchronous")
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
