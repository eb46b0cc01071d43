"""Hold the estimates of --dry-run against what small runs allocate, and write the table of docs/estimates.md.

    python bench/memory.py            measures every case below, on the GPU where there is one, else on the CPU
    python bench/memory.py --write    and puts the table into docs/estimates.md

"At rest" is what a rank holds between two steps, "saved" what one micro-batch's forward pass leaves for the backward
pass, "peak" the most a step allocates. On a CPU the allocator's events are counted (torch.profiler), on a GPU its own
statistics; both count requested bytes, whole buffers included.
"""

import argparse
import gc
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from torch.profiler import ProfilerActivity, profile

from megatron.config.load import config_from_flat
from megatron.config.memory import stage_memories
from megatron.config.plan import Plan
from megatron.config.resolve import resolve
from megatron.engine.distributed import start_layout, stop
from megatron.engine.modules import Sequential
from megatron.engine.recompute import checkpoint_function
from megatron.engine.training import TrainingEngine, own_part
from megatron.model.gpt import gpt_layers, make_loss

PAGE = Path(__file__).resolve().parent.parent / "docs" / "estimates.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCABULARY = 4096
NEOX = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "seq_length": 256,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "no_weight_tying": True,
    "train_micro_batch_size_per_gpu": 4,
    # whole buffers are allocated: keep them in proportion to the model
    "zero_optimization": {"stage": 0, "reduce_bucket_size": 1_000_000},
}
LLAMA = NEOX | {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "ffn_hidden_size": 704,
    "num_kv_heads": 2,
    "rotary_pct": 1.0,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
}
GPT2 = NEOX | {"pos_emb": "learned", "activation": "gelu_tanh", "no_weight_tying": False}
BF16 = {"precision": "bfloat16"}
RECOMPUTE = {"checkpoint_activations": True}


def zero(stage: int) -> dict[str, object]:
    """Keys of a ZeRO stage, with a small buffer."""
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000}}


CASES: dict[str, tuple[int, dict[str, object]]] = {
    "GPT-2, fp32": (1, GPT2),
    "NeoX, fp32": (1, NEOX),
    "NeoX, fp32, ZeRO 1": (1, NEOX | zero(1)),
    "NeoX, bf16": (1, NEOX | BF16),
    "NeoX, bf16, parallel residual": (1, NEOX | BF16 | {"gpt_j_residual": True}),
    "NeoX, bf16, recompute": (1, NEOX | BF16 | RECOMPUTE),
    "NeoX, bf16, recompute, accumulation 4": (1, NEOX | BF16 | RECOMPUTE | {"gradient_accumulation_steps": 4}),
    "NeoX, bf16, recompute selective": (1, NEOX | BF16 | RECOMPUTE | {"recompute_granularity": "selective"}),
    "NeoX, bf16, gradients in fp32": (1, NEOX | BF16 | RECOMPUTE | {"data_types": {"grad_accum_dtype": "fp32"}}),
    "Llama, bf16": (1, LLAMA | BF16),
    "Llama, bf16, recompute": (1, LLAMA | BF16 | RECOMPUTE),
    "NeoX, fp32, 2 replicas": (2, NEOX),
    "NeoX, bf16, 2 replicas, ZeRO 1": (2, NEOX | BF16 | RECOMPUTE | zero(1)),
    "NeoX, bf16, 2 replicas, ZeRO 2": (2, NEOX | BF16 | RECOMPUTE | zero(2)),
    "NeoX, bf16, 2 replicas, ZeRO 3": (2, NEOX | BF16 | RECOMPUTE | zero(3)),
    "Llama, bf16, tensor 2": (2, LLAMA | BF16 | {"model_parallel_size": 2}),
    "NeoX, bf16, tensor 2": (2, NEOX | BF16 | {"model_parallel_size": 2}),
    "NeoX, bf16, tensor 2, sequence": (2, NEOX | BF16 | {"model_parallel_size": 2, "sequence_parallel": True}),
    "NeoX, bf16, context 2": (2, NEOX | BF16 | zero(1) | {"context_parallel_size": 2}),
    "NeoX, bf16, pipeline 2, accumulation 4": (
        2,
        NEOX | BF16 | {"pipe_parallel_size": 2, "gradient_accumulation_steps": 4},
    ),
}


@dataclass
class Meter:
    """Bytes allocated within a `measured` block: what was left at its end, and the most at any time."""

    net: int = 0
    peak: int = 0


@dataclass
class Figures:
    """Bytes on one rank. `saved` is None with a pipeline, whose stages run many micro-batches at once."""

    rest: int
    peak: int
    saved: int | None = None
    stage: int = 0


@contextmanager
def measured() -> Iterator[Meter]:
    """Count what is allocated in this block."""
    meter = Meter()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield meter
        meter.net = torch.cuda.memory_allocated() - before
        meter.peak = torch.cuda.max_memory_allocated() - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield meter
        gc.collect()
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            meter.net += event.nbytes()
            meter.peak = max(meter.peak, meter.net)


def plan_of(case: str) -> Plan:
    """The plan of one of CASES."""
    ranks, keys = CASES[case]
    return resolve(config_from_flat(keys), ranks, VOCABULARY)


def measure(plan: Plan) -> Figures:
    """Train a few steps under `plan` and count. Collective."""
    grid = start_layout(plan.layout)
    try:
        loss, saved = make_loss(plan.model, grid), None
        batches = _batches(plan, grid.device)
        if plan.layout.pipe == 1:
            checkpoint = checkpoint_function(plan.engine, grid)
            module = Sequential(gpt_layers(plan.model, grid, 1), plan.engine.recompute_layers, checkpoint)
            inputs, targets = own_part(batches[0], grid)
            saved = _saved(lambda: loss(module(inputs), targets), module.to(grid.device), plan)
            del module
        with measured() as rest:
            engine = TrainingEngine(gpt_layers(plan.model, grid, 1), loss, grid, plan)
            for step in range(2):
                engine.train_batch(batches, step=step, learning_rate=1e-3)
        with measured() as step_of:
            engine.train_batch(batches, step=2, learning_rate=1e-3)
        return Figures(rest.net, rest.net + step_of.peak, saved, grid.rank("pipe"))
    finally:
        stop()


def _saved(forward: Callable[[], torch.Tensor], module: torch.nn.Module, plan: Plan) -> int:
    module.to(DTYPES[plan.engine.precision]).train()
    forward().backward()  # torch sets up its workspaces in the first pass
    module.zero_grad(set_to_none=True)
    with measured() as meter:
        result = forward()
    del result
    return meter.net


def _batches(plan: Plan, device: torch.device) -> list[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
    size, length = plan.batch.micro_size, plan.batch.sequence_length
    batches = []
    for _ in range(plan.batch.accumulation_steps):
        ids = torch.randint(0, plan.model.vocab_size, (size, length + 1), device=device)
        weights = torch.full((size, length), 1 / (size * length), device=device)
        batches.append((ids[:, :-1].contiguous(), (ids[:, 1:].contiguous(), weights)))
    return batches


def _rank(rank: int, case: str, world: int, port: int, results: "multiprocessing.SimpleQueue[Figures]") -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"OMP_NUM_THREADS": "1"}
    results.put(measure(plan_of(case)))


def run(case: str) -> Figures:
    """Measure one case on its ranks, in processes of their own; the rank with the largest peak counts."""
    world, results = CASES[case][0], multiprocessing.get_context("spawn").SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_rank, (case, world, port, results), nprocs=world)
    return max((results.get() for _ in range(world)), key=lambda figures: figures.peak)


def row(case: str, figures: Figures) -> str:
    """A line of the table: estimate, measurement and error of the three figures, in MB."""
    stage = stage_memories(plan_of(case))[figures.stage]
    pairs = [
        (at_rest(plan_of(case), figures.stage), figures.rest),
        (stage.activations + stage.kept_logits, figures.saved),
        (stage.peak, figures.peak),
    ]
    cells = [
        "– | – | –" if real is None else f"{said / 1e6:.2f} | {real / 1e6:.2f} | {(said - real) / real:+.1%}"
        for said, real in pairs
    ]
    return f"| {case} | {' | '.join(cells)} |\n"


def at_rest(plan: Plan, number: int) -> int:
    """The estimate of what a rank of stage `number` holds between steps."""
    stage = stage_memories(plan)[number]
    return stage.weights + stage.optimizer + stage.permanent_buffers


def main() -> None:
    """Measure every case; with --write, renew the page."""
    parser = argparse.ArgumentParser(description="estimated and measured memory of small runs")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parser.add_argument("cases", nargs="*", help="only these cases")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, gloo"
    head = (
        f"On {device}, torch {torch.__version__.split('+')[0]}; in MB (10^6 bytes).\n\n"
        "| case | at rest: estimated | measured | error | saved: estimated | measured | error "
        "| peak: estimated | measured | error |\n|---|---|---|---|---|---|---|---|---|---|\n"
    )
    table = head + "".join(row(case, run(case)) for case in arguments.cases or CASES)
    print(table)
    if arguments.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + table + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
