"""The head of a pipeline, which computes the loss, trains under every optimizer of DeepSpeed."""

import json
from pathlib import Path
from typing import Any

import torch

from megatron.engine.distributed import start_layout
from megatron.engine.training import TrainingEngine
from megatron.model.gpt import gpt_layers
from tests import tiny
from tests.ranks.moves import allow_fp16_on_cpu
from tests.ranks.run import run_ranks

TIED = {"model": {"tied_embeddings": True}}
PLANS: list[dict[str, Any]] = [
    {"precision": precision, "zero": zero, "accumulation": accumulation, **ends}
    for precision, zero, accumulation in [
        ("fp32", 1, 2),
        ("bf16", 0, 2),
        ("bf16", 1, 1),  # DeepSpeedZeroOptimizer
        ("bf16", 1, 2),  # BF16_Optimizer
        ("fp16", 1, 2),
    ]
    for ends in ({}, TIED)
]


def gradient_norms(file: str, pipe: int) -> None:
    """On a rank: the gradient norm of the first step of each of PLANS."""
    norms = []
    for settings in PLANS:
        plan = tiny.plan(pipe=pipe, **settings)
        grid = start_layout(plan.layout)
        if plan.engine.precision == "fp16" and grid.device.type == "cpu":
            allow_fp16_on_cpu()
        engine = TrainingEngine(gpt_layers(plan.model, grid, 1234), grid, plan)
        output = engine.train_batch(tiny.micro_batches(0, plan, grid.rank("data")), step=0, learning_rate=1e-3)
        norms.append(float(output.norm))
    if torch.distributed.get_rank() == 0:
        Path(file).write_text(json.dumps(norms))


def test_gradients_of_a_pipeline_are_those_of_one_rank_tied_or_not(tmp_path: Path) -> None:
    """Rounding moves the norm of 16-bit gradients by less than 2 ** -8; without the head it is 3% smaller."""
    files = {pipe: str(tmp_path / f"{pipe}.json") for pipe in (1, 2)}
    for pipe, file in files.items():
        run_ranks(pipe, gradient_norms, file, pipe)
    alone, piped = (torch.tensor(json.loads(Path(file).read_text())) for file in files.values())
    bound = torch.tensor([1e-5 if settings["precision"] == "fp32" else 2**-8 for settings in PLANS])
    assert ((piped - alone).abs() < bound * alone).all(), [*zip(PLANS, alone.tolist(), piped.tolist(), strict=True)]
