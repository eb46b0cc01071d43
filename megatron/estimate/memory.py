"""What a training step takes in the memory of each rank.

Arithmetic on a Plan, after what the engine really keeps (`engine/settings.py`, DeepSpeed 0.19's ZeRO
optimizers) and what the model's operations save for the backward pass. `docs/estimates.md` holds it against measured
runs.
"""

from dataclasses import dataclass, replace

from megatron.config.parameter_counts import MOMENTS, held_parameters, layer_parameters
from megatron.config.pipeline_stages import layer_classes, stage_layers
from megatron.config.plan import Plan
from megatron.estimate.activations import (
    WIDTH,
    block_bytes,
    blocks_among,
    gradients_in_flight,
    product_bytes,
    saved_bytes,
    stream_tokens,
    tokens_on_rank,
)

LOSS_CHUNK = 2**24  # logits that the loss handles at a time, in fp32 (parallel/cross_entropy.py)
WHOLE_BUCKET = 500_000_000  # elements that DeepSpeed averages at a time without ZeRO, whatever reduce_bucket_size says
RESERVE = 2**30  # for CUDA, NCCL and kernels' workspaces
FRAGMENTATION = 0.05  # of the memory, which the allocator cannot hand out


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one rank of a pipeline stage. `peak` is the worst moment of a step, not the sum of the others."""

    layers: range  # numbers into stages.layer_classes
    parameters: int
    weights: int
    optimizer: int  # moments, and fp32 weights where the optimizer keeps its own
    host: int  # what is offloaded: in the memory of the host instead
    gradients: int  # at the end of the backward pass
    activations: int  # of all micro-batches in flight, logits not counted
    activations_kept: int  # what they would be without recomputation
    activations_recomputed: int  # and with it, block by block
    logits: int  # logits and their gradient, and the chunk of the loss
    kept_logits: int  # the logits alone, which the loss keeps for its backward pass
    buffers: int  # of communication, and of the pipeline
    permanent_buffers: int  # those of them, and summed gradients, that stay between steps
    least: int  # the analytic minimum of the peak, see `_least`
    peak: int


def stage_memories(plan: Plan, on_cpu: bool = False) -> list[StageMemory]:
    """The memory of a rank of each stage, first to last. on_cpu: where torch composes what is a kernel on a GPU."""
    return [_stage(plan, number, layers, on_cpu) for number, layers in enumerate(stage_layers(plan))]


def fits(peak: int, gpu_memory: float) -> bool:
    """Whether `peak` bytes fit into a device of `gpu_memory` GiB, with what CUDA and its allocator take."""
    return peak <= gpu_memory * 2**30 * (1 - FRAGMENTATION) - RESERVE


def _stage(plan: Plan, number: int, layers: range, on_cpu: bool) -> StageMemory:
    stage, replicas = plan.engine.zero_stage, plan.layout.replicas
    parameters = held_parameters(plan.model, plan.layout.model, layers)
    # every ZeRO optimizer steps an fp32 copy of its own, of fp32 weights too
    kept_by_optimizer = MOMENTS.get(plan.optimizer.kind, 2) + (1 if stage or plan.engine.precision != "fp32" else 0)
    in_flight = min(plan.layout.pipe - number, plan.batch.accumulation_steps) if plan.layout.pipe > 1 else 1
    has_head = len(layer_classes(plan.model)) - 1 in layers
    kept_logits = _kept_logits(plan) if has_head else 0
    passing, buckets = _buffers(plan, parameters, stage), _permanent_buckets(plan, parameters, stage)
    pipeline = _stage_buffers(plan, number, kept_logits)
    gradients = _gradients(plan, parameters, stage)
    weights = parameters * WIDTH[plan.engine.precision] // (replicas if stage == 3 else 1)
    optimizer = 4 * parameters // (replicas if stage else 1) * kept_by_optimizer
    away = (_is_offloaded(plan, "offload_param"), _is_offloaded(plan, "offload_optimizer"))
    memory = StageMemory(
        layers=layers,
        parameters=parameters,
        weights=0 if away[0] else weights,
        optimizer=0 if away[1] else optimizer,
        host=weights * away[0] + optimizer * away[1],
        gradients=gradients,
        activations=in_flight * saved_bytes(plan, layers, plan.engine.recompute_layers, on_cpu),
        activations_kept=in_flight * saved_bytes(plan, layers, 0, on_cpu),
        activations_recomputed=in_flight * saved_bytes(plan, layers, 1, on_cpu),
        logits=_logits(plan) if has_head else 0,
        kept_logits=kept_logits,
        buffers=passing + buckets + pipeline,
        permanent_buffers=buckets + pipeline + (gradients if _keeps_gradients(plan, stage) else 0),
        least=0,
        peak=0,
    )
    kept = in_flight * saved_bytes(plan, layers, plan.engine.recompute_layers)
    return replace(memory, least=_least(plan, memory, kept), peak=_peak(plan, memory, passing, on_cpu))


def _least(plan: Plan, memory: StageMemory, kept: int) -> int:
    """What the peak of a step cannot be below with these settings, by the worse of two moments.

    Before the backward pass there are weights, optimizer states, sums of gradients of earlier micro-batches, what the
    recompute setting keeps for the backward pass, and the logits with one fp32 chunk of the loss (or, where blocks are
    computed again, all that one of them saves). After it there are weights, optimizer states and all gradients.
    kept: bytes that are saved where every norm is a kernel.
    """
    width, several = WIDTH[plan.engine.precision], plan.batch.accumulation_steps > 1
    chunk = min(memory.kept_logits // width, LOSS_CHUNK) * 4
    there = product_bytes(plan) if plan.engine.recompute_selective else 0
    again = (block_bytes(plan) - there) * plan.engine.recompute_layers
    forward = kept + max(memory.kept_logits + chunk, again) + (memory.gradients if several else 0)
    return memory.weights + memory.optimizer + max(forward, memory.gradients)


def _peak(plan: Plan, memory: StageMemory, passing: int, on_cpu: bool) -> int:
    """The worst of five moments of a step. passing: bytes of the buffers that are not always there."""
    stage, several = plan.engine.zero_stage, plan.batch.accumulation_steps > 1
    averaging, passing = (passing, 0) if stage == 0 else (0, passing)  # without ZeRO when all gradients are there
    gradients = 0 if _keeps_gradients(plan, stage) else memory.gradients
    # beside the micro-batch that is under way: what earlier ones left, and weights that are whole for a while
    held = gradients + passing if several else passing if stage == 3 else 0
    there = product_bytes(plan) if plan.engine.recompute_selective else 0
    again = (block_bytes(plan, on_cpu) - there) * plan.engine.recompute_layers + gradients_in_flight(plan)
    stale = memory.kept_logits if plan.layout.pipe > 1 else 0  # the pipeline's buffers hold these logits already
    moments = {
        "the loss is there": held + memory.activations + memory.logits,
        "the last block is in its backward pass": max(held, passing) + memory.activations + again,
        "the first block is": (gradients if several else min(gradients, _later_gradients(plan, memory)))
        + memory.activations // max(1, blocks_among(plan, memory.layers))
        + again
        + passing,
        "gradients are averaged": gradients + averaging,
        "the optimizer steps": gradients + _step(plan, memory.parameters, stage),
    }
    return memory.weights + memory.optimizer + memory.permanent_buffers - stale + max(moments.values())


def _later_gradients(plan: Plan, memory: StageMemory) -> int:
    """Gradients that are there before the first block of a stage, and the untied embedding before it, have theirs."""
    counts = layer_parameters(plan.model, plan.layout.model)
    first = [layer for layer in memory.layers if 0 < layer <= plan.model.num_layers][:1]
    first += [0] if 0 in memory.layers and not plan.model.tied_embeddings else []
    missing = sum(counts[layer] for layer in first)
    return _gradients(plan, memory.parameters - missing, plan.engine.zero_stage)


def _accumulator(plan: Plan) -> int:
    """Bytes of an element of a summed gradient; without ZeRO our own fp32 masters take them in fp32."""
    usual = "fp32" if plan.engine.zero_stage == 0 else plan.engine.precision
    return WIDTH[plan.engine.gradient_accumulation_dtype or usual]


def _gradients(plan: Plan, parameters: int, stage: int) -> int:
    """Gradients when all of them are there; from stage 2 on a rank keeps those of its own shard."""
    return parameters * _accumulator(plan) // (plan.layout.replicas if stage >= 2 else 1)


def _step(plan: Plan, parameters: int, stage: int) -> int:
    """What the optimizer's step adds to the gradients: this shard's, flattened, and then in fp32."""
    if _is_offloaded(plan, "offload_optimizer"):
        return 0
    narrow = _accumulator(plan)
    if stage == 0:
        return 0 if narrow == 4 else parameters * 4
    shard = parameters // plan.layout.replicas
    if stage == 3:
        return min(shard, _option(plan, "sub_group_size")) * 4
    return shard * (narrow + (4 if narrow != 4 else 0))  # a flat fp32 gradient is used as it is


def _is_offloaded(plan: Plan, name: str) -> bool:
    option = plan.engine.zero_options.get(name)
    return isinstance(option, dict) and option.get("device") == "cpu"


_OPTIONS = {
    "sub_group_size": 1_000_000_000,
    "reduce_bucket_size": 500_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
}


def _option(plan: Plan, name: str) -> int:
    return int(str(plan.engine.zero_options.get(name, _OPTIONS[name])))


def _buffers(plan: Plan, parameters: int, stage: int) -> int:
    """Buckets in which gradients travel, and in stage 3 the parameters that are whole for a while."""
    if stage == 0:
        forwarded_environment = 4 if plan.engine.fp32_allreduce else WIDTH[plan.engine.precision]
        own = _accumulator(plan)
        whole = min(parameters, WHOLE_BUCKET) * (own + (forwarded_environment if forwarded_environment != own else 0))
        return whole if plan.layout.replicas > 1 else 0
    if stage == 3:
        live = _option(plan, "stage3_max_live_parameters") + _option(plan, "stage3_prefetch_bucket_size")
        return min(parameters, live) * WIDTH[plan.engine.precision] if plan.layout.replicas > 1 else 0
    return _buckets(plan, parameters)


def _buckets(plan: Plan, parameters: int) -> int:
    """Whole buffers of reduce_bucket_size elements, two where communication overlaps the backward pass."""
    size = _option(plan, "reduce_bucket_size") * _accumulator(plan)
    if plan.engine.zero_options.get("contiguous_gradients", True) is False:
        return min(parameters * _accumulator(plan), size)
    overlap = plan.engine.zero_options.get("overlap_comm") is True
    return size * (2 if overlap and plan.layout.pipe == 1 and plan.engine.zero_stage < 3 else 1)


def _keeps_gradients(plan: Plan, stage: int) -> bool:
    """Whether summed gradients have a buffer of their own, which is there between steps too."""
    return stage == 3 or (stage == 1 and _accumulator(plan) != WIDTH[plan.engine.precision])


def _permanent_buckets(plan: Plan, parameters: int, stage: int) -> int:
    """Stage 3 keeps its buckets once they are there."""
    return _buckets(plan, parameters) if stage == 3 else 0


def _stage_buffers(plan: Plan, number: int, kept_logits: int) -> int:
    """What DeepSpeed's pipeline keeps of micro-batches: inputs, their gradients, and outputs, logits in the last stage.

    Beside them there is one input that is on its way.
    """
    if plan.layout.pipe == 1:
        return 0
    hidden = stream_tokens(plan) * plan.model.hidden_size * WIDTH[plan.engine.precision]
    count = max(2, min(plan.layout.pipe - number, plan.batch.accumulation_steps))
    received = hidden if number else 0
    return count * (2 * received + (kept_logits or hidden)) + received


def _kept_logits(plan: Plan) -> int:
    return tokens_on_rank(plan) * plan.model.padded_vocab_size // plan.layout.model * WIDTH[plan.engine.precision]


def _logits(plan: Plan) -> int:
    """Logits, their gradient, and the fp32 chunk in which the loss is taken."""
    width, kept = WIDTH[plan.engine.precision], _kept_logits(plan)
    chunk = min(kept // width, LOSS_CHUNK) * 4 * (1 if width == 4 else 2)
    return 2 * kept + chunk
