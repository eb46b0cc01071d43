"""DeepSpeed's configuration, derived from a Plan."""

import math
from typing import Any

import torch

from megatron.config.plan import LossScalePlan, Plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def deepspeed_settings(plan: Plan) -> dict[str, Any]:
    """The `config` of `deepspeed.initialize`. Optimizer and learning rate are ours and not part of it."""
    stage = plan.engine.zero_stage
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.batch.micro_size,
        "gradient_accumulation_steps": plan.batch.accumulation_steps,
        "gradient_clipping": 0.0,  # the clip is ours (clipping.py)
        "zero_optimization": (dict(plan.engine.zero_options) if stage else {}) | {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it synchronizes with the device before and after a micro-batch
        # DeepSpeed's partitioned exchange between stages fails with tensor parallelism
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if plan.engine.precision == "bf16" and stage:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": False}  # clipping.py checks the norm
    if plan.engine.precision == "fp16" and plan.engine.loss_scale is not None:
        settings["fp16"] = {"enabled": True} | _loss_scale(plan.engine.loss_scale)
    if plan.engine.fp32_allreduce:
        settings["communication_data_type"] = "fp32"
    elif plan.engine.precision == "bf16":
        settings["communication_data_type"] = "bf16"
    if plan.engine.gradient_accumulation_dtype is not None and stage:
        settings["data_types"] = {"grad_accum_dtype": plan.engine.gradient_accumulation_dtype}
    return settings


def _loss_scale(scale: LossScalePlan) -> dict[str, Any]:
    if not scale.dynamic:
        return {"loss_scale": scale.initial}
    return {
        "loss_scale": 0,
        "initial_scale_power": int(math.log2(scale.initial)),
        "loss_scale_window": scale.window,
        "hysteresis": scale.hysteresis,
        "min_loss_scale": scale.minimum,
    }
