"""How long weights take to start, and how much memory: one rank of a run, in a process of its own for each figure.

    python bench/start.py                      the table of bench/README.md
    python bench/start.py --only 1.3B --repeat 5

"whole tensors" is what many programs do: each rank builds the model in fp32, draws every tensor whole on one thread,
keeps its slice and converts it. "cells" is Deepy: `parallel/initial_values.py`, in as many threads as there are cores.
"loaded" builds the weights and reads them from a checkpoint, "drawn and loaded" draws them whole before that.
A rank of several has the others' share of nothing: its process group is torch's fake one, in which nobody answers.
Of 7B there are 8 of the 32 layers, so that a small machine can measure a rank of it.
Memory is the process's peak above what it holds after its imports; on a GPU it is the allocator's peak.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from megatron.checkpoint.state import TrainState  # noqa: E402
from megatron.checkpoint.store import CheckpointWriter, load_weights  # noqa: E402
from megatron.config.load import config_from_flat  # noqa: E402
from megatron.config.plan import Plan  # noqa: E402
from megatron.config.resolve import resolve  # noqa: E402
from megatron.engine.distributed import start  # noqa: E402
from megatron.engine.inference import InferenceEngine  # noqa: E402
from megatron.engine.optimizer_state import ModuleState  # noqa: E402
from megatron.engine.training import TrainingEngine  # noqa: E402
from megatron.model.gpt import gpt_layers  # noqa: E402
from megatron.parallel.grid import ParallelGrid  # noqa: E402
from megatron.parallel.initial_values import draw  # noqa: E402
from megatron.parallel.parameter import PlacedParameter, load_whole  # noqa: E402

VOCABULARY = 50_304
SIZES = {"0.1B": (12, 768, 12), "0.4B": (24, 1024, 16), "1.3B": (24, 2048, 16), "7B": (8, 4096, 32)}  # a quarter of 7B
DRAWN, LOADED = ("whole tensors", "cells"), ("drawn and loaded", "loaded")
# size, tensor-parallel size, ranks under ZeRO 3 (0: without), both ways
CASES = [
    ("0.1B", 1, 0, DRAWN),
    ("0.4B", 1, 0, DRAWN),
    ("1.3B", 1, 0, DRAWN),
    ("7B", 8, 0, DRAWN),
    ("7B", 1, 64, DRAWN),
    ("0.1B", 1, 0, LOADED),
    ("0.4B", 1, 0, LOADED),
]


def plan_of(size: str, tensor: int) -> Plan:
    """The plan of a GPT-NeoX of this size, for inference in bf16."""
    layers, hidden, heads = SIZES[size]
    keys = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "seq_length": 2048}
    keys |= {"pos_emb": "rotary", "no_weight_tying": True, "model_parallel_size": tensor}
    return resolve(config_from_flat(keys), tensor, VOCABULARY, inference=True)


def grid_of(tensor: int) -> ParallelGrid:
    """This process as a rank in the middle of a tensor-parallel group."""
    if tensor > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=tensor // 2, world_size=tensor)
    return start(tensor=tensor)


def built_and_drawn(build: Callable[[], nn.Module]) -> nn.Module:
    """A layer whose parameters are filled from whole tensors."""
    module = build()
    for parameter in cast(list[PlacedParameter], list(module.parameters())):
        whole = torch.empty(parameter.global_shape)
        parameter.initialise(whole, torch.Generator().manual_seed(1))
        load_whole(parameter, whole)
    return module


def of_zero_3(plan: Plan, grid: ParallelGrid, ranks: int, way: str) -> None:
    """This rank's share of each parameter, in fp32; layers are built and dropped one after another."""
    held = []
    for layer in gpt_layers(plan.model, grid, 1):
        module = layer.build() if way == "cells" else built_and_drawn(layer.build)
        for parameter in module.parameters():
            share = -(-parameter.numel() // ranks)
            first = min(share * (ranks // 2), parameter.numel())
            part = parameter.detach().view(-1)[first : first + share].clone()
            if way == "cells":
                draw([(parameter, first, part)])
            held.append(part)


def start_weights(plan: Plan, grid: ParallelGrid, way: str, checkpoint: Path) -> None:
    """The whole model of this rank, in bf16."""
    drawn_whole = way in ("whole tensors", "drawn and loaded")
    layers = gpt_layers(plan.model, grid, seed=1 if way == "cells" else None)
    if drawn_whole:
        layers = [replace(layer, build=partial(built_and_drawn, layer.build)) for layer in layers]
    engine = InferenceEngine(layers, grid, torch.float32 if drawn_whole else torch.bfloat16)
    if drawn_whole:
        engine.module.to(torch.bfloat16)
        engine.state = ModuleState(engine.module)
    if way in ("drawn and loaded", "loaded"):
        load_weights(engine, checkpoint)


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of `work`, those of all cores together, and GiB."""
    on_gpu = torch.cuda.is_available()
    before = 0 if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begin, begin_cpu = time.perf_counter(), time.process_time()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds, of_cores = time.perf_counter() - begin, time.process_time() - begin_cpu
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "of cores": of_cores, "gib": (peak - before) / 2**30}


def save(plan: Plan, folder: Path) -> None:
    """Write a checkpoint of the model, with fp32 weights and nothing else."""
    grid = start()
    engine = TrainingEngine(gpt_layers(plan.model, grid, 1), grid, plan)
    CheckpointWriter(engine, folder, {}).save(TrainState())


def one_figure(case: dict[str, Any]) -> None:
    """In a process of its own: prints the figure."""
    plan, folder, zero = plan_of(case["size"], case["tensor"]), Path(case["folder"]), case["zero"]
    if case["way"] == "save":
        save(plan, folder)
        return
    grid = grid_of(case["tensor"])
    if zero:
        figure = measured(lambda: of_zero_3(plan, grid, zero, case["way"]))
    else:
        figure = measured(lambda: start_weights(plan, grid, case["way"], folder / "global_step0"))
    print(json.dumps(figure))


def in_a_process(size: str, tensor: int, zero: int, way: str, folder: str) -> dict[str, float]:
    """The figure of one way."""
    case = json.dumps({"size": size, "tensor": tensor, "zero": zero, "way": way, "folder": folder})
    done = subprocess.run([sys.executable, __file__, "--case", case], stdout=subprocess.PIPE, text=True, check=True)
    figure: dict[str, float] = json.loads(done.stdout or "{}")
    return figure


def row(size: str, tensor: int, zero: int, ways: tuple[str, str], repeat: int, folder: str) -> str:
    """A line of the table: the fastest of `repeat` of both ways, which take turns."""
    figures = [[in_a_process(size, tensor, zero, way, folder) for way in ways] for _ in range(repeat)]
    old, new = (min(column, key=lambda figure: figure["seconds"]) for column in zip(*figures, strict=True))
    share = f"one of {tensor} tensor-parallel ranks" if tensor > 1 else f"one of {zero} under ZeRO 3" if zero else "all"
    cells = [f"{figure['seconds']:.2f} s, {figure['of cores']:.2f} s, {figure['gib']:.2f} GiB" for figure in (old, new)]
    ratio = old["seconds"] / new["seconds"]
    name = "8 layers of 7B" if size == "7B" else size
    return f"| {name} | {share} | {ways[0]} | {cells[0]} | {ways[1]} | {cells[1]} | {ratio:.1f} |"


COLUMNS = ("model", "rank", *("way", "time, of all cores, memory") * 2, "ratio of times")
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="time and memory until a rank has its weights")
    parser.add_argument("--only", choices=SIZES, nargs="*", default=list(SIZES), help="these sizes")
    parser.add_argument("--repeat", type=int, default=3, help="the fastest of so many counts")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        one_figure(arguments.case)
        return
    print(HEAD)
    for size, tensor, zero, ways in CASES:
        if size in arguments.only:
            with tempfile.TemporaryDirectory() as folder:
                if "loaded" in ways:
                    in_a_process(size, 1, 0, "save", folder)
                print(row(size, tensor, zero, ways, arguments.repeat, folder), flush=True)


if __name__ == "__main__":
    main()
