"""A model small enough for a test to train, and plans for it under any layout."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.config.plan import (
    BatchPlan,
    EnginePlan,
    Layout,
    LossScalePlan,
    ModelPlan,
    OptimizerPlan,
    Plan,
    SchedulePlan,
)
from megatron.training.clock import Clock
from megatron.training.hooks.base import Run

SEQUENCE = 16
GLOBAL_BATCH = 8

# odd sizes on purpose: the vocabulary needs padding
MODEL = ModelPlan(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_kv_heads=4,
    head_size=8,
    ffn_hidden_size=96,
    vocab_size=61,
    padded_vocab_size=64,
    max_position_embeddings=SEQUENCE,
    position_embedding="rotary",
    rotary_fraction=0.5,
    rotary_base=10000.0,
    norm="layernorm",
    norm_epsilon=1e-5,
    activation="gelu",
    parallel_residual=False,
    tied_norm=False,
    tied_embeddings=False,
    bias_in_query_key_value=True,
    bias_in_dense=True,
    bias_in_mlp=True,
    init_method="normal",
    output_init_method="scaled_normal",
    init_std=0.05,
    attention_kinds=("global",) * 4,
    sliding_window=None,
    attention_dropout=0.0,
    hidden_dropout=0.0,
)


def plan(
    pipe: int = 1,
    tensor: int = 1,
    data: int = 1,
    context: int = 1,
    sequence_parallel: bool = False,
    zero: int = 0,
    precision: str = "fp32",
    accumulation: int = 1,
    recompute: int = 0,
    zero_options: dict[str, object] | None = None,
    engine: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    loss_scale: LossScalePlan | None = None,
) -> Plan:
    """A plan for `pipe * tensor * data * context` ranks that trains GLOBAL_BATCH samples a step."""
    zero_options = ({"stage3_param_persistence_threshold": 100} if zero == 3 else {}) | (zero_options or {})
    scale = loss_scale or LossScalePlan(dynamic=True, initial=256.0, window=4, hysteresis=1, minimum=1.0)
    return Plan(
        layout=Layout(pipe * tensor * data * context, pipe, data, tensor, context, sequence_parallel),
        batch=BatchPlan(GLOBAL_BATCH // data // accumulation, accumulation, GLOBAL_BATCH, SEQUENCE),
        model=replace(MODEL, **(model or {})),
        optimizer=replace(
            OptimizerPlan("adam", 1e-2, (0.9, 0.95), 1e-8, weight_decay=0.1, gradient_clipping=1.0),
            **(optimizer or {}),
        ),
        schedule=SchedulePlan("cosine", 1e-2, 1e-3, warmup_steps=2, decay_steps=20),
        engine=replace(
            EnginePlan(
                precision=precision,
                zero_stage=max(zero, precision == "fp16"),
                zero_options=zero_options,
                loss_scale=scale if precision == "fp16" else None,
                partition_method="type:transformer",
                recompute_layers=recompute,
                gradient_accumulation_dtype="fp32" if precision == "bf16" and accumulation > 1 else None,
                fp32_allreduce=precision == "bf16" and accumulation > 1,
                seed=1234,
            ),
            **(engine or {}),
        ),
    )


def run(engine: Any, plan: Plan, first_step: int, last_step: int) -> Run:
    """A run of which the loop is under test: `engine` and `plan`, without configuration and data."""
    clock = Clock(torch.device("cpu"))
    absent: Any = None
    return Run(absent, plan, absent, absent, engine, first_step, last_step, clock)


def ranks_of(settings: dict[str, Any]) -> int:
    """How many ranks the layout in the settings of a plan takes."""
    return math.prod(settings.get(axis, 1) for axis in ("pipe", "tensor", "data", "context"))


def micro_batches(step: int, plan: Plan, data_rank: int) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """This replica's share of the global batch of `step`: the same samples under every layout."""
    generator = torch.Generator().manual_seed(step)
    samples = torch.randint(0, MODEL.vocab_size, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)
    samples[:, 1::2] = (samples[:, 0::2][:, : SEQUENCE // 2] * 3 + 1) % MODEL.vocab_size  # something to learn
    shares = samples.view(plan.batch.accumulation_steps, plan.layout.data, plan.batch.micro_size, SEQUENCE + 1)
    weight = plan.batch.accumulation_steps * plan.layout.data / (GLOBAL_BATCH * SEQUENCE)
    weights = torch.full((plan.batch.micro_size, SEQUENCE), weight)
    return [(share[data_rank, :, :-1], (share[data_rank, :, 1:], weights)) for share in shares]
