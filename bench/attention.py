"""Forward and backward of causal attention with each registered backend that can run here.

    python bench/attention.py [--lengths 2048 8192 32768] [--rounds 10] [--quick]

bf16, 16 heads of 128 (8 of 64 on a CPU), 32,768 tokens in total (2,048 on a CPU) for every length. TFLOP/s count
the FLOPs of causal attention: half of 4 s^2 d per head forward, 2.5 times that backward. Prints a Markdown table.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from contenders import NEOX, plan_of, shape
from torch import Tensor

from megatron import registry
from megatron.errors import UserError
from megatron.model.attention_backends import Attend


def seconds_of(attend: Attend, inputs: tuple[Tensor, Tensor, Tensor], rounds: int) -> list[float]:
    """Times of forward and backward, for `rounds` rounds after a warm-up."""
    gradient = torch.randn_like(inputs[0])

    def run() -> None:
        attend(*inputs, None, 0.0).backward(gradient)
        for tensor in inputs:
            tensor.grad = None

    return [_timed(run) for _ in range(3 + rounds)][3:]


def _timed(function: Callable[[], None]) -> float:
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Time and print."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="*", type=int, default=[2048, 8192, 32768] if on_gpu else [512, 2048])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="256 tokens, 1 round")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.lengths, arguments.rounds = [256], 1
    device = torch.device("cuda" if on_gpu else "cpu")
    heads, size, tokens = (16, 128, 32768) if on_gpu else (8, 64, 2048)
    print("### Attention alone, forward and backward\n")
    print("| length | backend | ms [least, most] | TFLOP/s |\n|---|---|---|---|")
    for length in arguments.lengths:
        model = plan_of(shape(NEOX, 1, heads * size, heads, length, max(1, tokens // length))).model
        sizes = max(1, tokens // length), length, heads, size
        query, key, value = (
            torch.randn(sizes, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        for name in (name for name in registry.names("attention_backend") if name != "local"):  # it has a window
            try:
                attend = registry.resolve("attention_backend", name)(model, device)
                computes = f"{name}: {attend.describe(torch.bfloat16)}"
                seconds = seconds_of(torch.compile(attend, dynamic=False), (query, key, value), arguments.rounds)
            except (UserError, RuntimeError) as error:
                print(f"| {length} | {name} | {str(error).splitlines()[0]} | |", flush=True)
                continue
            median = statistics.median(seconds)
            flops = 3.5 * 4 * length**2 * size * heads * sizes[0] / 2
            spread = f"[{min(seconds) * 1e3:.1f}, {max(seconds) * 1e3:.1f}]"
            print(f"| {length} | {computes} | {median * 1e3:.1f} {spread} | {flops / median / 1e12:.2f} |", flush=True)


if __name__ == "__main__":
    main()
