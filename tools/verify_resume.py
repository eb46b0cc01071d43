"""Prove for your own configuration that a resumed run is the run that was never interrupted.

    python tools/verify_resume.py configs/my.yml [key=value ...] [--steps 4]

Trains 2N steps without interruption, and N steps, a restart and N more, with the real commands in a temporary folder;
then compares the loss of every step, the consumed samples, and every weight and optimizer moment, bit for bit. The runs
are deterministic unless you set deterministic=false: on a GPU two runs differ otherwise, with or without a restart.
Exit code: 0 if all are equal, 1 if not, 2 if the runs cannot be started.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from megatron.checkpoint.folder import checkpoint_name
from megatron.checkpoint.reading import read_tensors

DEEPY = Path(__file__).resolve().parent.parent / "deepy.py"


def main() -> int:
    """Run, compare, print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", help="files and key=value, as for deepy.py")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="steps before the restart (default: 4)")
    arguments = parser.parse_args()
    steps = arguments.steps
    with tempfile.TemporaryDirectory() as name:
        whole, resumed = Path(name, "whole"), Path(name, "resumed")
        for folder, runs in ((whole, 1), (resumed, 2)):
            for run in range(runs):
                print(f"training {2 * steps // runs} steps{', resumed' if run else ''}", flush=True)
                if code := train(arguments.config, folder, 2 * steps, 2 * steps // runs):
                    return 2 if code == 2 else 1
        differences = [*compare_metrics(whole, resumed), *compare_checkpoints(whole, resumed, 2 * steps)]
    print("\n".join(differences) or f"{2 * steps} steps equal {steps} + restart + {steps}, bit for bit")
    return 1 if differences else 0


def train(config: list[str], folder: Path, train_iters: int, pause_every: int) -> int:
    """Run train.py into `folder` until its end or the next multiple of `pause_every`; returns its exit code."""
    overrides: dict[str, object] = {
        "save": folder,
        "load": folder,
        "log_dir": folder / "logs",
        "train_iters": train_iters,
        "exit_interval": pause_every,
        "log_interval": 1,
    }
    if not any(word.startswith("deterministic=") for word in config):
        overrides["deterministic"] = "true"
    command = [sys.executable, str(DEEPY), "train.py", *config, *(f"{key}={value}" for key, value in overrides.items())]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        print(run.stdout[-2000:], run.stderr[-4000:], sep="\n", file=sys.stderr)
    return run.returncode


def compare_metrics(whole: Path, resumed: Path) -> list[str]:
    """One line per step whose loss or gradient norm differs."""
    one, other = (losses(folder) for folder in (whole, resumed))
    return [
        f"step {step}: {one.get(step)} uninterrupted, {other.get(step)} resumed"
        for step in sorted(one.keys() | other.keys())
        if one.get(step) != other.get(step)
    ]


def losses(folder: Path) -> dict[int, tuple[float, float | None]]:
    """Loss and gradient norm of each step; a skipped step has no norm."""
    lines = map(json.loads, (folder / "logs" / "metrics.jsonl").read_text().splitlines())
    trained = (line for line in lines if "train/lm_loss" in line)
    return {line["step"]: (line["train/lm_loss"], line.get("train/grad_norm")) for line in trained}


def compare_checkpoints(whole: Path, resumed: Path, step: int) -> list[str]:
    """Differences in the state after the last step."""
    one, other = (folder / checkpoint_name(step) for folder in (whole, resumed))
    differences = []
    if (a := (one / "progress.json").read_text()) != (b := (other / "progress.json").read_text()):
        differences.append(f"progress: {a} uninterrupted, {b} resumed")
    first, second = read_tensors(one), read_tensors(other)
    differences += [f"{name} differs" for name in sorted(first) if not torch.equal(first[name], second[name])]
    return differences


if __name__ == "__main__":
    sys.exit(main())
