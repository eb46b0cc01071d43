"""Time and memory of a training step when one setting is changed, in one process.

    python -m bench.gpu_steps.ablations [--seconds 60] [--quick]

Each variant is built anew, and its ratio is to the first one of its shape. A variant for which no time is left, and
what a rule or a missing package refuses, is said in its row; exit code 1 if a variant fails in any other way.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from allowance import Allowance
from contenders import batch_of, engine_of, plan_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu_steps.common import DEVICE, ON_CARD, free, keys_of, record, seconds_of
from megatron.config.plan import Plan
from megatron.engine import training
from megatron.engine.distributed import stop
from megatron.engine.settings import deepspeed_settings
from megatron.errors import UserError
from megatron.model.attention import describe_attention
from megatron.model.layer import NO_MASKING, Masking, pack
from megatron.model.positions import document_starts
from megatron.parallel.products import check_float8

WARM_UP, ROUNDS = 3, 5
Change = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Variant:
    """What differs from the shape's usual configuration: keys, or something in the process."""

    name: str
    keys: dict[str, Any] = field(default_factory=dict)
    change: Change = nullcontext
    shape: str = "neox-350M"


def only(kernel: SDPBackend) -> Change:
    """Of scaled_dot_product_attention."""
    return lambda: sdpa_kernel(kernel)


def with_throughput_timer() -> AbstractContextManager[Any]:
    """DeepSpeed's timer, which waits for the device twice in each micro-batch."""

    def settings(plan: Plan) -> dict[str, Any]:
        return deepspeed_settings(plan) | {"timers": {"throughput": {"enabled": True}}}

    return mock.patch.object(training, "deepspeed_settings", settings)


FLOAT8 = {"precision_linear": "float8"}
# The most valuable first.
VARIANTS = (
    Variant("as it is"),
    Variant("DeepSpeed's throughput timer", change=with_throughput_timer),
    Variant("torch's flash kernel", change=only(SDPBackend.FLASH_ATTENTION)),
    Variant("torch's cuDNN kernel", change=only(SDPBackend.CUDNN_ATTENTION)),
    Variant("float8", FLOAT8),
    Variant("not compiled", {"compile": False}),
    Variant("attention kind flash", {"attention_config": [[["flash"], "all"]]}),
    Variant("documents kept apart", {"reset_attention_mask": True}),
    Variant("selective recomputation", {"checkpoint_activations": True, "recompute_granularity": "selective"}),
    Variant("all activations recomputed", {"checkpoint_activations": True}),
    Variant("1.3B as it is", shape="neox-1.3B"),
    Variant("1.3B, float8", FLOAT8, shape="neox-1.3B"),
)
QUICK = ("as it is", "DeepSpeed's throughput timer", "float8")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing that would take longer in all")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    quick, allowance = arguments.quick, Allowance(arguments.seconds)
    failed, usual = 0, dict[str, float]()  # seconds of the first variant of each shape
    print("| variant | ms a step [least, most] | tokens/s | time over the first | peak, GiB | attention |")
    print("|---|---|---|---|---|---|", flush=True)
    for variant in VARIANTS:
        if quick and variant.name not in QUICK:
            continue
        if not allowance.has_room():
            print(f"| {variant.name} | no time left | | | | |", flush=True)
            continue
        try:
            if variant.keys.get("precision_linear") == "float8":
                check_float8(DEVICE)
            plan = plan_of(keys_of(variant.shape, quick) | variant.keys)
            with variant.change():
                seconds = measure(plan)
        except UserError as error:
            print(f"| {variant.name} | refused: {str(error).splitlines()[-1].strip()} | | | | |", flush=True)
        except Exception as error:
            failed = 1
            print(
                f"| {variant.name} | failed: {type(error).__name__}: {str(error).splitlines()[0]} | | | | |", flush=True
            )
        else:
            median = statistics.median(seconds)
            ratio = median / usual.setdefault(variant.shape, median)
            peak = torch.cuda.max_memory_allocated() / 2**30 if ON_CARD else 0.0
            spread = f"{median * 1e3:,.1f} [{min(seconds) * 1e3:,.1f}, {max(seconds) * 1e3:,.1f}]"
            rate = plan.batch.tokens_per_step / median
            kernel = describe_attention(plan.model, DEVICE, torch.bfloat16)[0].partition(": ")[2]
            print(
                f"| {variant.name} | {spread} | {rate:,.0f} | {ratio:.3f} | {peak:.2f} | {kernel} |",
                flush=True,
            )
            record(variant=variant.name, seconds=seconds, peak_gib=round(peak, 3), attention=kernel)
        finally:
            stop()
            free()
    return failed


def measure(plan: Plan) -> list[float]:
    """Seconds of each round."""
    engine, (tokens, targets) = engine_of(plan), batch_of(plan, DEVICE)
    # each token id is as likely as another: about one document in 500 tokens
    starts = document_starts(torch.where(tokens % 500 == 0, 0, tokens), 0)
    batch = pack(tokens, Masking(starts) if plan.model.keeps_documents_apart else NO_MASKING), targets

    def step(number: int) -> None:
        engine.train_batch([batch], step=number, learning_rate=1e-4)

    for number in range(WARM_UP):
        step(number)
    return [seconds_of(lambda: step(WARM_UP)) for _ in range(ROUNDS)]


if __name__ == "__main__":
    sys.exit(main())
