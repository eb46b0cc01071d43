"""A training step of one shape: tokens/s, utilization, and peak memory against the estimate.

    python -m bench.gpu_steps.throughput SHAPE [--all] [--quick]

--all compares Deepy with the plain loop, compiled Transformers and the products (bench/contenders.py).
"""

import argparse

from contenders import ON_GPU, plan_of
from train_step import figures_of, one_by_one, table

from bench.gpu_steps.common import keys_of, record

ROUNDS = 7
LIMIT = 900.0  # seconds of a step; the limits of gpu_proof.py are tighter


def main() -> int:
    """Measure and print; exit code 1 if a contender failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=list(ON_GPU))
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    keys, shape = keys_of(arguments.shape, arguments.quick), "tiny" if arguments.quick else arguments.shape
    names = ("deepy", "bare", "transformers", "products") if arguments.all else ("deepy",)
    seconds, peak = one_by_one(keys, ROUNDS, LIMIT, names=names)
    if "deepy" in seconds:
        plan = plan_of(keys)
        figures = figures_of(plan, seconds, peak)
        print(table(shape, plan, seconds, figures))
        record(shape=shape, **figures)
    return int(any(name not in seconds for name in names))


if __name__ == "__main__":
    raise SystemExit(main())
