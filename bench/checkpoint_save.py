"""How long training stands still for a checkpoint: written at once, and written in the background.

    python bench/checkpoint_save.py [--hidden 512] [--rounds 5]

Two CPU ranks, ZeRO 1, a model of the given width; the two ways alternate in one run. The last line is one JSON object.
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
from megatron.model.gpt import gpt_layers, make_loss  # noqa: E402
from tests import tiny  # noqa: E402
from tests.ranks.run import run_ranks  # noqa: E402


def measure(folder: str, hidden: int, rounds: int) -> None:
    """On a rank: save by turns, and time what the training has to wait for."""
    plan = tiny.plan(
        data=2, zero=1, model={"hidden_size": hidden, "head_size": hidden // 4, "ffn_hidden_size": 4 * hidden}
    )
    plan = replace(plan, model=replace(plan.model, vocab_size=8192, padded_vocab_size=8192))
    grid = start()
    engine = TrainingEngine(gpt_layers(plan.model, grid, 1), make_loss(plan.model, grid), grid, plan)
    waits: dict[str, list[float]] = {"synchronous": [], "stall": [], "whole": []}
    writers = {
        kind: CheckpointWriter(engine, Path(folder, kind), {}, asynchronous=kind == "stall")
        for kind in ("synchronous", "stall")
    }
    for step in range(rounds):
        engine.train_batch(tiny.micro_batches(step, plan, grid.rank("data")), step=step, learning_rate=1e-3)
        for kind, writer in writers.items():
            torch.distributed.barrier()
            began = time.perf_counter()
            writer.save(TrainState(step + 1))
            waits[kind].append(time.perf_counter() - began)
            writer.finish()
            if kind == "stall":
                waits["whole"].append(time.perf_counter() - began)
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
    ratios = [stall / whole for stall, whole in zip(seconds["stall"], seconds["synchronous"], strict=True)]
    for kind, values in seconds.items():
        print(f"{kind:12} {statistics.median(values):.3f} s  [{min(values):.3f}, {max(values):.3f}]")
    result = {
        "parameters": found["parameters"],
        "stall_over_synchronous": round(statistics.median(ratios), 4),
        "spread": [round(min(ratios), 4), round(max(ratios), 4)],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
