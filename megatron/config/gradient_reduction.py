"""How replicas average their gradients: which ZeRO stage reduces them, how often, and how many bytes that sends.

Letters: P parameters of a rank, N replicas, A micro-batches of a step, w bytes of an element that is sent.

            sent by each rank in a step               bf16 gradients with sums in fp32, in bytes
ZeRO 0, 1   2 w P (N - 1) / N, a ring all-reduce      4 P, and in ZeRO 1 another 2 P
ZeRO 2      A times as much                           4 P / N
ZeRO 3      A times half as much, a reduce-scatter    4 P / N
"""

from megatron.config.parameter_counts import WIDTH, held_trained
from megatron.config.pipeline_stages import stage_layers
from megatron.config.plan import BatchPlan, EnginePlan, Layout, Plan


def stage_for_whole_sums(parameters: int, moments: int, layout: Layout, batch: BatchPlan, memory: float | None) -> int:
    """The stage that reduces bf16 gradients summed in fp32, where the optimizer states are sharded: 1 or 2.

    ZeRO 1 is DeepSpeed's BF16_Optimizer there: whole sums on each rank, reduced once, after the backward pass. ZeRO 2
    reduces each micro-batch. So ZeRO 1, which sends less, unless there is one micro-batch, or its gradients, weights
    and states alone exceed the device's `memory` in GiB (None: unknown). moments: tensors that the optimizer keeps.
    """
    if layout.pipe > 1:
        return 1  # DeepSpeed's pipeline excludes ZeRO 2
    least = parameters * (2 + 6 + 4 * (1 + moments) / layout.replicas)
    return 2 if batch.accumulation_steps == 1 or (memory is not None and least > memory * 2**30) else 1


def reduces_whole_sums(engine: EnginePlan) -> bool:
    """Whether DeepSpeed's BF16_Optimizer runs (engine.py, `_do_optimizer_sanity_check`)."""
    sums = engine.precision == "bf16" and engine.gradient_accumulation_dtype == "fp32"
    return engine.zero_stage == 1 and sums and not _offloads(engine)


def overlaps(plan: Plan) -> bool:
    """Whether gradients are reduced during the backward pass: `overlap_comm`, where DeepSpeed heeds it."""
    engine = plan.engine
    if plan.layout.pipe > 1 or engine.zero_stage == 0 or reduces_whole_sums(engine):
        return False
    return bool(engine.zero_options.get("overlap_comm", engine.zero_stage == 3))


def reduction_line(plan: Plan) -> str | None:
    """How gradients are summed and reduced, and what that costs, for the description of a run; None for one replica."""
    engine, replicas, steps = plan.engine, plan.layout.replicas, plan.batch.accumulation_steps
    if replicas == 1:
        return None
    parameters = max(held_trained(plan, layers) for layers in stage_layers(plan))
    sent_in = "fp32" if engine.fp32_allreduce else engine.precision
    once = 2 * WIDTH[sent_in] * parameters * (replicas - 1) / replicas / (2 if engine.zero_stage == 3 else 1)
    times = steps if engine.zero_stage >= 2 else 1
    when = "during the backward pass" if overlaps(plan) else "after the backward pass"
    often = "once a step" if times == 1 else f"for each of {times} micro-batches"
    parts = [
        f"gradients: averaged over {replicas} replicas in {sent_in}, {often}, {when}: "
        f"each rank sends {_gb(once * times)}"
    ]
    if engine.asked_stage is not None and engine.asked_stage < engine.zero_stage:
        less = "no more" if times == 1 else f"{times} times as much, but stage 1 would not fit,"
        parts.append(f"ZeRO 2 instead of 1 sends {less} and keeps {_gb(4 * parameters / replicas)} of fp32 sums")
    elif reduces_whole_sums(engine) and plan.layout.pipe == 1:
        kept = f"{_gb(6 * parameters)} of gradients instead of {_gb(4 * parameters / replicas)}"
        parts.append(f"ZeRO 2 would send {steps} times as much; ZeRO 1 keeps {kept}")
    if engine.zero_options.get("overlap_comm") and not overlaps(plan):
        parts.append("overlap_comm has no effect here")
    return "; ".join(parts)


def _offloads(engine: EnginePlan) -> bool:
    option = engine.zero_options.get("offload_optimizer")
    return isinstance(option, dict) and option.get("device", "none") != "none"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"
