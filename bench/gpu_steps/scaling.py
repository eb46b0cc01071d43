"""Tokens/s of train.py on 1, 2, 4 and 8 GPUs, and of other layouts on all of them; mock data.

    python -m bench.gpu_steps.scaling [--quick]

With --quick: two ranks, on a CPU over gloo.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.gpu_steps.common import ON_CARD, keys_of, record

ROOT = Path(__file__).resolve().parents[2]
EVERY, STEPS = 5, 15  # the rate is that of the last EVERY steps
LAYOUTS: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"zero_optimization": {"stage": 1}},
    "ZeRO 2": {"zero_optimization": {"stage": 2}},
    "ZeRO 3": {"zero_optimization": {"stage": 3}},
    "tensor 2, sequence parallel": {"model_parallel_size": 2, "sequence_parallel": True},
    "pipeline 2, accumulation 4": {"pipe_parallel_size": 2, "gradient_accumulation_steps": 4},
}


def main() -> int:
    """Measure and print; exit code 1 if a run failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    most = torch.cuda.device_count() if ON_CARD else 2
    cases = [(number, "data parallel", {}) for number in ((2,) if quick else (1, 2, 4, 8)) if number <= most]
    if most > 1 and not quick:
        cases += [(cases[-1][0], name, keys) for name, keys in LAYOUTS.items()]
    print("| ranks | layout | tokens/s | over one rank, per rank |\n|---|---|---|---|", flush=True)
    alone, failed = None, 0
    for ranks, name, changed in cases:
        rate = rate_of(keys_of("neox-350M", quick) | changed | {"num_gpus": ranks})
        if rate is None:
            failed = 1
            print(f"| {ranks} | {name} | failed | |", flush=True)
            continue
        alone = alone or rate / ranks
        print(f"| {ranks} | {name} | {rate:,.0f} | {rate / ranks / alone:.3f} |", flush=True)
        record(ranks=ranks, layout=name, tokens_per_second=rate)
    return failed


def rate_of(keys: dict[str, Any]) -> float | None:
    """Tokens/s of the last steps of a run; None if it failed."""
    with TemporaryDirectory() as name:
        run = keys | {
            "data_impl": "mock",
            "tokenizer_type": "CharLevelTokenizer",
            "train_iters": STEPS,
            "eval_iters": 0,
            "log_interval": EVERY,
            "log_dir": name,
        }
        Path(name, "run.json").write_text(json.dumps(run))
        command = [sys.executable, str(ROOT / "deepy.py"), "train.py", f"{name}/run.json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
            return None
        rows = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
    return float(rows[-1]["runtime/tokens_per_sec"])


if __name__ == "__main__":
    sys.exit(main())
