"""Count the graphs and graph breaks of a compiled block under each layout, on a CPU.

    python bench/graph_breaks.py

torch.compile records the block's forward and backward pass, and runs them without generating code: what breaks a graph
is found while recording.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch._dynamo.utils
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.engine.distributed import start_layout
from megatron.engine.recompute import checkpoint_function
from megatron.model.gpt import gpt_layers
from megatron.model.layer import Masking, pack, unpack
from megatron.model.positions import document_starts
from tests import tiny
from tests.ranks.run import run_ranks

SEQUENCE_PARALLEL = {"tensor": 2, "sequence_parallel": True}
HIDDEN, ATTENTION = {"hidden_dropout": 0.1}, {"attention_dropout": 0.1}
WINDOWS = {"attention_kinds": ("local",) * 4, "sliding_window": 4}
CASES: dict[str, dict[str, Any]] = {
    "one rank": {},
    "windows, on a CPU by a mask": {"model": WINDOWS},
    "documents apart, on a CPU by a mask": {"model": {"reset_attention_mask": True, "reset_position_ids": True}},
    "hidden dropout": {"model": HIDDEN},
    "attention dropout": {"model": ATTENTION},
    "selective recomputation": {"recompute": 1, "engine": {"recompute_selective": True, "compile": True}},
    "tensor 2": {"tensor": 2},
    "tensor 2, one key/value head": {"tensor": 2, "model": {"num_kv_heads": 1}},
    "tensor 2, sequence parallel": SEQUENCE_PARALLEL,
    "tensor 2, sequence parallel, float8": SEQUENCE_PARALLEL | {"model": {"float8": True}},
    "tensor 2, sequence parallel, hidden dropout": SEQUENCE_PARALLEL | {"model": HIDDEN},
    "context 2": {"context": 2},
}


def count(file: str, chosen: dict[str, dict[str, Any]]) -> None:
    """On a rank; the first writes what was counted."""
    rows = {}
    for name, settings in chosen.items():
        plan = tiny.plan(**settings)
        grid = start_layout(plan.layout)
        block, length = gpt_layers(plan.model, grid, 1)[1].build().train(), plan.batch.sequence_length
        part = length // grid.size("context") // (grid.size("tensor") if grid.sequence_parallel else 1)
        hidden = torch.randn(2, part, plan.model.hidden_size, device=grid.device, requires_grad=True)
        starts = None
        if plan.model.keeps_documents_apart:
            starts = document_starts(torch.arange(2 * length, device=grid.device).view(2, length) % 5, 0)
        function = block.forward
        if plan.engine.recompute_selective:
            checkpoint = checkpoint_function(plan.engine, grid)

            def function(inputs: Any, forward: Any = block.forward, run: Any = checkpoint) -> Any:
                return run(forward, inputs)

        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        output = torch.compile(function, dynamic=False, backend="aot_eager")(pack(hidden, Masking(starts)))
        unpack(output)[0].sum().backward()
        counters = torch._dynamo.utils.counters
        rows[name] = (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(rows))


def main() -> None:
    """Print a table."""
    print("| block | graphs | graph breaks |\n|---|---|---|")
    with TemporaryDirectory() as folder:
        for ranks in (1, 2):
            chosen = {name: settings for name, settings in CASES.items() if tiny.ranks_of(settings) == ranks}
            run_ranks(ranks, count, f"{folder}/rows.json", chosen, timeout=300)
            for name, (graphs, breaks) in json.loads(Path(folder, "rows.json").read_text()).items():
                print(f"| {name} | {graphs} | {breaks} |", flush=True)


if __name__ == "__main__":
    main()
