"""Compare the estimates of --dry-run and an analytic minimum with the memory of small runs: docs/estimates.md.

    python bench/memory.py                    measures every case below, on the GPU if there is one, otherwise the CPU
    python bench/memory.py --write            and writes the tables into docs/estimates.md
    python bench/memory.py --table shapes     the table of shapes only (or of layouts)

"At rest" is the memory between two steps, "saved" what one micro-batch's forward pass stores for the backward pass,
"peak" the maximum during a step. Counted are the allocator's events on a CPU (torch.profiler) and its statistics on a
GPU; both count requested bytes, whole buffers included. The profiler misses what gloo's threads free. So on a CPU a
rank is alone in torch's fake process group, whose collectives send nothing and allocate nothing; the stages of a
pipeline do send, and wait after each collective until gloo's threads have released their tensors.
"""

import argparse
import gc
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron.config.load import config_from_flat
from megatron.config.plan import Plan
from megatron.config.resolve import resolve
from megatron.engine.distributed import start_layout, stop
from megatron.engine.modules import Sequential, freeze_parameters
from megatron.engine.recompute import checkpoint_function
from megatron.engine.settings import DTYPES
from megatron.engine.training import TrainingEngine, context_slice
from megatron.estimate.describe import assumed_vocabulary
from megatron.estimate.memory import StageMemory, stage_memories
from megatron.model.gpt import gpt_layers
from megatron.parallel.initial_values import initialise

PAGE = Path(__file__).resolve().parent.parent / "docs" / "estimates.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
SHAPES_BEGIN, SHAPES_END = "<!-- shapes: begin -->\n", "<!-- shapes: end -->\n"
COLLECTIVES = (
    "all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "send", "recv",
)  # fmt: skip
RELEASE_SECONDS = 0.002
NEOX = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "seq_length": 256,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "no_weight_tying": True,
    "train_micro_batch_size_per_gpu": 4,
    "padded_vocab_size": 4096,
    "compile": False,  # the estimate is for uncompiled code
    # whole buffers are allocated: keep them proportional to the model
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
LORA = {"lora": {"rank": 8, "dropout": 0.1, "targets": ["query", "value", "up"]}}


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
    "NeoX, bf16, 2 replicas": (2, NEOX | BF16 | RECOMPUTE),
    "NeoX, bf16, 2 replicas, ZeRO 1": (2, NEOX | BF16 | RECOMPUTE | zero(1)),
    "NeoX, bf16, 2 replicas, ZeRO 2": (2, NEOX | BF16 | RECOMPUTE | zero(2)),
    "NeoX, bf16, 2 replicas, ZeRO 3": (2, NEOX | BF16 | RECOMPUTE | zero(3)),
    "NeoX, bf16, 2 replicas, ZeRO 3, accumulation 2": (
        2,
        NEOX | BF16 | RECOMPUTE | zero(3) | {"gradient_accumulation_steps": 2},
    ),
    "NeoX, bf16, float8": (1, NEOX | BF16 | {"precision_linear": "float8"}),
    "Llama, bf16, tensor 2": (2, LLAMA | BF16 | {"model_parallel_size": 2}),
    "NeoX, bf16, tensor 2": (2, NEOX | BF16 | {"model_parallel_size": 2}),
    "NeoX, bf16, tensor 2, sequence": (2, NEOX | BF16 | {"model_parallel_size": 2, "sequence_parallel": True}),
    "NeoX, bf16, context 2": (2, NEOX | BF16 | zero(1) | {"context_parallel_size": 2}),
    "Llama, bf16, LoRA": (1, LLAMA | BF16 | LORA),
    "Llama, bf16, LoRA in half of the layers": (
        1,
        LLAMA | BF16 | {"lora": {"rank": 8, "targets": ["blocks.[23].attention.query"]}},
    ),
    "NeoX, bf16, LoRA, recompute selective": (
        1,
        NEOX | BF16 | LORA | RECOMPUTE | {"recompute_granularity": "selective"},
    ),
    "NeoX, bf16, pipeline 2, accumulation 4": (
        2,
        NEOX | BF16 | {"pipe_parallel_size": 2, "gradient_accumulation_steps": 4},
    ),
}


SELECTIVE = RECOMPUTE | {"recompute_granularity": "selective"}
WIDE = {"hidden_size": 512, "num_attention_heads": 8}
LONG = {"seq_length": 1024, "train_micro_batch_size_per_gpu": 1}
WORDY = {"padded_vocab_size": 32768}
SHAPES: dict[str, dict[str, object]] = {
    "fp32": NEOX,
    "fp32, recompute": NEOX | RECOMPUTE,
    "bf16": NEOX | BF16,
    "bf16, selective": NEOX | BF16 | SELECTIVE,
    "bf16, recompute": NEOX | BF16 | RECOMPUTE,
    "bf16, recompute, accumulation 2": NEOX | BF16 | RECOMPUTE | {"gradient_accumulation_steps": 2},
    "12 layers, bf16": NEOX | BF16 | {"num_layers": 12},
    "12 layers, bf16, recompute": NEOX | BF16 | RECOMPUTE | {"num_layers": 12},
    "hidden 512, bf16": NEOX | BF16 | WIDE,
    "hidden 512, fp32, recompute": NEOX | RECOMPUTE | WIDE,
    "sequence 1024, micro-batch 1, bf16": NEOX | BF16 | LONG,
    "sequence 1024, micro-batch 1, bf16, selective": NEOX | BF16 | LONG | SELECTIVE,
    "sequence 1024, micro-batch 1, bf16, recompute": NEOX | BF16 | LONG | RECOMPUTE,
    "vocabulary 32768, fp32": NEOX | WORDY,
    "vocabulary 32768, bf16, recompute": NEOX | BF16 | RECOMPUTE | WORDY,
    "micro-batch 1, bf16": NEOX | BF16 | {"train_micro_batch_size_per_gpu": 1},
    "micro-batch 16, bf16": NEOX | BF16 | {"train_micro_batch_size_per_gpu": 16},
    "Llama, fp32": LLAMA,
    "Llama, bf16": LLAMA | BF16,
    "Llama, bf16, recompute": LLAMA | BF16 | RECOMPUTE,
}


@dataclass
class Meter:
    """Bytes allocated in a `measured` block: net at its end, and at the peak."""

    net: int = 0
    peak: int = 0


@dataclass
class Figures:
    """Bytes on one rank. `saved` is None with a pipeline, whose stages hold several micro-batches."""

    rest: int
    peak: int
    saved: int | None = None
    stage: int = 0


@contextmanager
def measured() -> Iterator[Meter]:
    """Count the memory allocated in this block."""
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


def plan_of(ranks: int, keys: dict[str, object]) -> Plan:
    """The plan of a case."""
    config = config_from_flat(keys)
    return resolve(config, ranks, assumed_vocabulary(config))


def measure(plan: Plan) -> Figures:
    """Measure a few training steps under `plan`. Collective."""
    grid = start_layout(plan.layout)
    try:
        saved = None
        batches = _batches(plan, grid.device)
        if plan.layout.pipe == 1:
            checkpoint = checkpoint_function(plan.engine, grid)
            module = Sequential(gpt_layers(plan.model, grid, 1), plan.engine.recompute_layers, checkpoint)
            freeze_parameters(module, plan.engine.freeze)
            initialise(module)
            inputs, targets = context_slice(batches[0], grid)
            saved = _saved(lambda: module(inputs, targets=targets), module.to(grid.device), plan)
            del module
        with measured() as rest:
            engine = TrainingEngine(gpt_layers(plan.model, grid, 1), grid, plan)
            for step in range(2):
                engine.train_batch(batches, step=step, learning_rate=1e-3)
        with measured() as step_of:
            engine.train_batch(batches, step=2, learning_rate=1e-3)
        return Figures(rest.net, rest.net + step_of.peak, saved, grid.rank("pipe"))
    finally:
        stop()


def _saved(forward: Callable[[], torch.Tensor], module: torch.nn.Module, plan: Plan) -> int:
    module.to(DTYPES[plan.engine.precision]).train()
    forward().backward()  # torch allocates its workspaces in the first pass
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


def wait_after_collectives() -> None:
    """Wait after each collective until gloo's threads have released its tensors, so that the caller frees them."""

    def waiting(collective: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(collective)
        def call(*arguments: Any, **options: Any) -> Any:
            work = collective(*arguments, **options)
            time.sleep(RELEASE_SECONDS)
            return work

        return call

    for name in COLLECTIVES:
        setattr(dist, name, waiting(getattr(dist, name)))


def join_fake_group(world: int) -> None:
    """Join a process group of `world` ranks as its first, with torch's backend that sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)


def _rank(rank: int, keys: dict[str, object], world: int, port: int, results: "multiprocessing.SimpleQueue") -> None:  # type: ignore[type-arg]
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"OMP_NUM_THREADS": "1"}
    plan = plan_of(world, keys)
    if _is_alone(plan):
        join_fake_group(world)
    elif not torch.cuda.is_available():
        wait_after_collectives()
    results.put(measure(plan))


def _is_alone(plan: Plan) -> bool:
    """Whether one rank shows what each holds; stages differ, and wait for each other."""
    return plan.layout.pipe == 1 and not torch.cuda.is_available()


def run(world: int, keys: dict[str, object]) -> Figures:
    """Measure one case in separate processes; returns the figures of the stage with the largest peak.

    Ranks of a stage hold the same; the lowest count is used, because what the profiler misses only adds to it.
    """
    results = multiprocessing.get_context("spawn").SimpleQueue()
    processes = 1 if _is_alone(plan_of(world, keys)) else world
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_rank, (keys, world, port, results), nprocs=processes)
    stages: dict[int, Figures] = {}
    for figures in sorted((results.get() for _ in range(processes)), key=lambda figures: -figures.peak):
        stages[figures.stage] = figures
    return max(stages.values(), key=lambda figures: figures.peak)


def estimate(plan: Plan, number: int) -> StageMemory:
    """The estimate of --dry-run for a rank of stage `number` on this machine."""
    return stage_memories(plan, on_cpu=not torch.cuda.is_available())[number]


def at_rest(stage: StageMemory) -> int:
    """The estimated memory of a rank between steps."""
    return stage.weights + stage.optimizer + stage.permanent_buffers


def layout_row(case: str) -> str:
    """A row of the table of layouts: estimate, measurement and error of the three figures, in MB."""
    world, keys = CASES[case]
    figures = run(world, keys)
    stage = estimate(plan_of(world, keys), figures.stage)
    pairs = [
        (at_rest(stage), figures.rest),
        (stage.activations + stage.head_gradient, figures.saved),
        (stage.peak, figures.peak),
    ]
    cells = [
        "– | – | –" if real is None else f"{said / 1e6:.2f} | {real / 1e6:.2f} | {(said - real) / real:+.1%}"
        for said, real in pairs
    ]
    return f"| {case} | {' | '.join(cells)} |\n"


def shape_row(case: str) -> str:
    """A row of the table of shapes: minimum, its parts and measured peak in MB, and their ratio."""
    keys = SHAPES[case]
    figures, stage = run(1, keys), stage_memories(plan_of(1, keys))[0]
    states = stage.weights + stage.optimizer
    sizes = (states, stage.gradients, stage.activations, stage.least, figures.peak)
    return f"| {case} | {' | '.join(f'{size / 1e6:.1f}' for size in sizes)} | {figures.peak / stage.least:.2f} |\n"


def ranks_of(case: str) -> int:
    """How many ranks a case of either table takes."""
    return CASES[case][0] if case in CASES else 1


LAYOUT_HEAD = (
    "| case | at rest: estimated | measured | error | saved: estimated | measured | error "
    "| peak: estimated | measured | error |\n|---|---|---|---|---|---|---|---|---|---|\n"
)
SHAPE_HEAD = (
    "| 4 layers x 256, sequence 256, micro-batch 4, vocabulary 4,096, but for | weights, optimizer | gradients | kept "
    "| minimum | measured peak | peak / minimum |\n|---|---|---|---|---|---|---|\n"
)
TABLES = {
    "layouts": (LAYOUT_HEAD, CASES, layout_row, BEGIN, END),
    "shapes": (SHAPE_HEAD, SHAPES, shape_row, SHAPES_BEGIN, SHAPES_END),
}


def main() -> None:
    """Measure every case; with --write, update the page."""
    parser = argparse.ArgumentParser(description="estimated and measured memory of small runs")
    parser.add_argument("--write", action="store_true", help=f"write the tables into {PAGE.name}")
    parser.add_argument("--table", choices=TABLES, help="only this one")
    # a GPU holds one rank
    most = torch.cuda.device_count() if torch.cuda.is_available() else None
    parser.add_argument("--ranks", type=int, default=most, help="skip cases of more ranks; default: the number of GPUs")
    parser.add_argument("cases", nargs="*", help="only these cases")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, gloo"
    for name, (head, cases, row, begin, end) in TABLES.items():
        chosen = [case for case in cases if case in (arguments.cases or cases)]
        if name != (arguments.table or name) or not chosen:
            continue
        table = f"On {device}, torch {torch.__version__.split('+')[0]}; in MB (10^6 bytes).\n\n{head}"
        print(table, end="", flush=True)
        for case in chosen:
            if arguments.ranks is not None and ranks_of(case) > arguments.ranks:
                print(f"skipped: {case} needs {ranks_of(case)} ranks of {arguments.ranks}", file=sys.stderr, flush=True)
                continue
            line = row(case)
            print(line, end="", flush=True)
            table += line
        if arguments.write:
            before, _, rest = PAGE.read_text().partition(begin)
            PAGE.write_text(before + begin + table + end + rest.partition(end)[2])


if __name__ == "__main__":
    main()
