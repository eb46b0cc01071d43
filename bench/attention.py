"""Forward and backward of attention with each kernel that can run here: causal, within documents, and in a window.

    python bench/attention.py [--lengths 2048 8192 32768] [--rounds 10] [--seconds 60] [--quick]

bf16, 16 heads of 128 (8 of 64 on a CPU), 32,768 tokens in total (2,048 on a CPU) for every length; eight documents a
sequence on average, and a window of an eighth of it. TFLOP/s count the pairs of query and key that see each other: 4 d
per pair and head forward, 2.5 times that backward. Prints a Markdown table.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from bench.allowance import Allowance
from bench.contenders import NEOX, plan_of, shape
from megatron import registry
from megatron.config.plan import ModelPlan
from megatron.errors import UserError
from megatron.model.attention_kernels import Attend, FlexAttention, Visible
from megatron.model.block_mask import block_lists, block_mask
from megatron.model.cache import Positions

PARTS = 8  # documents in a sequence, on average, and windows
CAUSAL: dict[str, Any] = {}
APART = {"reset_attention_mask": True}


def attention(attend: Attend, model: ModelPlan, first: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of query, key and value, with what the model sees, as in a block.

    first: int32 [b, s], the column in which each token's document begins.
    """
    length, apart = first.shape[1], model.reset_attention_mask
    columns = torch.arange(length, device=first.device).unsqueeze(0)
    lists = [part[0] for part in block_lists(first, (attend.window,))] if isinstance(attend, FlexAttention) else []

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        visible: Visible = Positions(columns, columns, first) if apart else None
        if isinstance(attend, FlexAttention):
            visible = block_mask(*lists, first if apart else None, attend.window, length)
        return attend(query, key, value, visible, 0.0)

    return run


def seconds_of(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], rounds: int) -> list[float]:
    """Times of forward and backward, for `rounds` rounds after a warm-up."""
    gradient = torch.randn_like(inputs[0])

    def run() -> None:
        attend(*inputs).backward(gradient)
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
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing that would take longer in all")
    parser.add_argument("--quick", action="store_true", help="128 tokens, 1 round")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.lengths, arguments.rounds = [128], 1
    device, allowance = torch.device("cuda" if on_gpu else "cpu"), Allowance(arguments.seconds)
    heads, size, tokens = (16, 128, 32768) if on_gpu else (8, 64, 128 if arguments.quick else 2048)
    print("### Attention alone, forward and backward\n")
    print("| length | sees | kernel | ms [least, most] | TFLOP/s |\n|---|---|---|---|---|")
    for length in arguments.lengths:
        windowed = {"attention_config": [[["local"], "all"]], "sliding_window_width": length // PARTS}
        sizes = max(1, tokens // length), length, heads, size
        usual = shape(NEOX, 1, heads * size, heads, length, sizes[0])
        inputs = [torch.randn(sizes, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        for sees, keys in (("all before", CAUSAL), ("its document", APART), ("a window", windowed)):
            model = plan_of(usual | keys).model
            first, pairs = documents(sizes[0], length, model.reset_attention_mask, model.sliding_window, device)
            for name in ("global", "flash") if keys is CAUSAL else model.attention_kinds:
                if not allowance.has_room():
                    print(f"| {length} | {sees} | {name} | no time left | |", flush=True)
                    continue
                try:
                    attend: Attend = registry.resolve("attention_backend", name)(model, device)
                    compiled = torch.compile(attention(attend, model, first), dynamic=False)
                    seconds = seconds_of(compiled, inputs, arguments.rounds)
                except (UserError, RuntimeError) as error:
                    print(f"| {length} | {sees} | {name} | {str(error).splitlines()[0]} | |", flush=True)
                    continue
                median = statistics.median(seconds)
                rate = 3.5 * 4 * pairs * size * heads / median / 1e12
                spread = f"{median * 1e3:.1f} [{min(seconds) * 1e3:.1f}, {max(seconds) * 1e3:.1f}]"
                kernel = f"{name}: {attend.describe(torch.bfloat16)}"
                print(f"| {length} | {sees} | {kernel} | {spread} | {rate:.2f} |", flush=True)


def documents(micro: int, length: int, apart: bool, window: int | None, device: torch.device) -> tuple[Tensor, int]:
    """The column in which each document begins, int32 [b, s] (0 unless apart), and how many pairs see each other."""
    columns = torch.arange(length).expand(micro, length)
    begins = torch.rand(micro, length, generator=torch.Generator().manual_seed(1)) < PARTS / length
    first = torch.where(begins & apart, columns, 0).cummax(1).values
    lowest = first if window is None else torch.maximum(first, columns - window + 1)
    return first.int().to(device), int((columns - lowest + 1).sum())


if __name__ == "__main__":
    main()
