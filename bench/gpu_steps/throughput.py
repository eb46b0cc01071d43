"""A training step of one shape: tokens/s, utilization, and peak memory against the estimate.

    python -m bench.gpu_steps.throughput SHAPE [--all] [--seconds 60] [--quick]

--all compares Deepy with the plain loop, the products and compiled Transformers (bench/contenders.py). A contender for
which no time is left is named.
"""

import argparse
import time

from contenders import ON_GPU, plan_of
from train_step import alternately, figures_of, one_by_one, table

from bench.gpu_steps.common import ON_CARD, keys_of, record

ROUNDS = 7


def main() -> int:
    """Measure and print; exit code 1 if a contender failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=list(ON_GPU))
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--seconds", type=float, default=900.0, help="limit of all contenders")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    limit = arguments.seconds
    keys, shape = keys_of(arguments.shape, arguments.quick), "tiny" if arguments.quick else arguments.shape
    names = ("deepy", "bare", "products", "transformers") if arguments.all else ("deepy",)
    if ON_CARD:
        seconds, peak = one_by_one(keys, ROUNDS, limit, time.monotonic() + limit, names)
    else:
        seconds, peak = alternately(keys, ROUNDS, limit, names)
    if "deepy" in seconds:
        plan = plan_of(keys)
        figures = figures_of(plan, seconds, peak)
        print(table(shape, plan, seconds, figures))
        record(shape=shape, **figures)
    return int(any(name not in seconds for name in names))


if __name__ == "__main__":
    raise SystemExit(main())
