"""The dictionary DeepSpeed is configured with, derived from a Plan. Floor 4."""

import math
from typing import Any

from megatron.config.plan import EnginePlan, LossScalePlan, Plan


def deepspeed_settings(plan: Plan) -> dict[str, Any]:
    """What `deepspeed.initialize` is told. Optimizer and learning rate are ours and are not in it."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.batch.micro_size,
        "gradient_accumulation_steps": plan.batch.accumulation_steps,
        # without ZeRO the norm and the clip are ours too (see clipping.py)
        "gradient_clipping": plan.optimizer.gradient_clipping if is_sharded(plan.engine) else 0.0,
        "zero_optimization": dict(plan.engine.zero_options) | {"stage": deepspeed_stage(plan.engine)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        # stages exchange whole activations: their partitioned form breaks with tensor parallelism
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if plan.engine.precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if plan.engine.precision == "fp16" and plan.engine.loss_scale is not None:
        settings["fp16"] = {"enabled": True} | _loss_scale(plan.engine.loss_scale)
    if plan.engine.fp32_allreduce:
        settings["communication_data_type"] = "fp32"
    if plan.engine.gradient_accumulation_dtype is not None:
        settings["data_types"] = {"grad_accum_dtype": plan.engine.gradient_accumulation_dtype}
    return settings


def deepspeed_stage(plan: EnginePlan) -> int:
    """The ZeRO stage DeepSpeed runs.

    16-bit weights with stage 0 run as stage 1: the numbers are the same and memory is less. DeepSpeed's own
    wrappers for that case take one optimizer step on zero gradients when they start, which shifts Adam's bias
    correction for the rest of the run.
    """
    return max(plan.zero_stage, 1) if plan.precision != "fp32" else plan.zero_stage


def is_sharded(plan: EnginePlan) -> bool:
    """Whether one of DeepSpeed's ZeRO optimizers owns the fp32 weights."""
    return deepspeed_stage(plan) > 0


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
