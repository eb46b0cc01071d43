"""Memory of a training step on each rank.

Arithmetic on a Plan, based on what the engine allocates (`engine/settings.py`, DeepSpeed 0.19's ZeRO optimizers) and
what the model's operations save for the backward pass. `docs/estimates.md` compares it with measured runs.
"""

from dataclasses import dataclass, replace

from megatron.config.gradient_reduction import reduces_whole_sums
from megatron.config.parameter_counts import MOMENTS, held_parameters, held_trained
from megatron.config.parameter_shapes import trains
from megatron.config.pipeline_stages import layer_classes, stage_layers
from megatron.config.plan import Plan
from megatron.config.widths import loss_chunk
from megatron.estimate.activations import (
    WIDTH,
    block_bytes,
    gradients_in_flight,
    product_bytes,
    saved_bytes,
    saving_blocks,
    tokens_on_rank,
)
from megatron.estimate.buffers import (
    accumulator,
    fetch_buffer,
    gathered_weights,
    keeps_gradients,
    option,
    permanent_buffers,
    pipeline_buffers,
    reduction_copies,
    symmetric_memory,
    temporary_buffers,
)

RESERVE = 2**30  # for CUDA, NCCL and kernels' workspaces
FRAGMENTATION = 0.05  # fraction of memory lost in the allocator


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one rank of a pipeline stage. `peak` is the largest of several moments of a step, not a sum."""

    layers: range  # indices into pipeline_stages.layer_classes
    parameters: int
    trained: int  # of the parameters
    weights: int
    optimizer: int  # moments, and the optimizer's own fp32 weights
    host: int  # offloaded to host memory
    gradients: int  # at the end of the backward pass
    activations: int  # of all micro-batches in flight
    activations_kept: int  # without recomputation
    activations_recomputed: int  # with recomputation of single blocks
    loss: int  # what the loss allocates: `head_gradient`, that of its input, and a chunk of logits
    head_gradient: int  # of the head's weight, computed in the forward pass and kept for the backward pass
    buffers: int  # of communication and pipeline
    permanent_buffers: int  # those, and accumulated gradients, that persist between steps
    least: int  # the analytic minimum of the peak, see `_least`
    peak: int


def stage_memories(plan: Plan, on_cpu: bool = False) -> list[StageMemory]:
    """Memory of one rank of each stage. on_cpu: torch composes some operations that are one kernel on a GPU."""
    return [_stage(plan, number, layers, on_cpu) for number, layers in enumerate(stage_layers(plan))]


def fits(peak: int, gpu_memory: float) -> bool:
    """Whether `peak` bytes, CUDA's memory and the allocator's losses fit into a device of `gpu_memory` GiB."""
    return peak <= gpu_memory * 2**30 * (1 - FRAGMENTATION) - RESERVE


def _stage(plan: Plan, number: int, layers: range, on_cpu: bool) -> StageMemory:
    stage, replicas = plan.engine.zero_stage, plan.layout.replicas
    parameters, trained = held_parameters(plan.model, plan.layout.tensor, layers), held_trained(plan, layers)
    # every ZeRO optimizer updates its own fp32 copy, even of fp32 weights
    kept_by_optimizer = MOMENTS.get(plan.optimizer.kind, 2) + (1 if stage or plan.engine.precision != "fp32" else 0)
    in_flight = min(plan.layout.pipe - number, plan.batch.accumulation_steps) if plan.layout.pipe > 1 else 1
    has_head = len(layer_classes(plan.model)) - 1 in layers
    head_gradient = _head_gradient(plan, on_cpu) if has_head and _head_trains(plan) else 0
    passing = temporary_buffers(plan, parameters, trained, stage)
    permanent = permanent_buffers(plan, trained, stage) + pipeline_buffers(plan, number) + symmetric_memory(plan)
    gradients = _gradients(plan, trained, stage)
    weights = parameters * WIDTH[plan.engine.precision] // (replicas if stage == 3 else 1)
    optimizer = 4 * trained // (replicas if stage else 1) * kept_by_optimizer
    away = (_is_offloaded(plan, "offload_param"), _is_offloaded(plan, "offload_optimizer"))
    memory = StageMemory(
        layers=layers,
        parameters=parameters,
        trained=trained,
        weights=0 if away[0] else weights,
        optimizer=0 if away[1] else optimizer,
        host=weights * away[0] + optimizer * away[1],
        gradients=gradients,
        activations=in_flight * saved_bytes(plan, layers, plan.engine.recompute_layers, on_cpu),
        activations_kept=in_flight * saved_bytes(plan, layers, 0, on_cpu),
        activations_recomputed=in_flight * saved_bytes(plan, layers, 1, on_cpu),
        loss=_loss(plan, on_cpu) if has_head else 0,
        head_gradient=0 if plan.engine.precision == "fp16" else head_gradient,
        buffers=passing + permanent,
        permanent_buffers=permanent + (gradients if keeps_gradients(plan, stage) else 0),
        least=0,
        peak=0,
    )
    kept = in_flight * saved_bytes(plan, layers, plan.engine.recompute_layers)
    return replace(memory, least=_least(plan, memory, kept), peak=_peak(plan, memory, passing, on_cpu))


def _least(plan: Plan, memory: StageMemory, kept: int) -> int:
    """A lower bound of the peak with these settings: weights, optimizer states, and the largest of three moments.

    Before the backward pass of the last block: the activations that the recompute setting stores (with recomputation
    also all that a block saves), and the gradient of the head. Before that of the first block: its activations and the
    gradients of all later layers. After the backward pass: all gradients. Where micro-batches are accumulated there
    are all gradients at each moment.
    kept: activation bytes if every norm is a kernel.
    """
    several, blocks = plan.batch.accumulation_steps > 1, max(1, len(saving_blocks(plan, memory.layers)))
    again = _recomputed(plan, memory.layers, on_cpu=False)
    last = kept + again + (memory.gradients if several else _head_weight_gradient(plan, memory))
    first = kept // blocks + again + (memory.gradients if several else _later_gradients(plan, memory))
    return memory.weights + memory.optimizer + max(last, first, memory.gradients)


def _peak(plan: Plan, memory: StageMemory, passing: int, on_cpu: bool) -> int:
    """The largest of six moments of a step. passing: bytes of temporary buffers."""
    stage, several = plan.engine.zero_stage, plan.batch.accumulation_steps > 1
    averaging, passing = (passing, 0) if stage == 0 else (0, passing)  # without ZeRO after all gradients are computed
    if reduces_whole_sums(plan.engine):
        averaging, passing = passing, 2 * memory.trained
    # bf16 gradients beside their sums; buckets are released after each backward pass
    lasting = passing if several and reduces_whole_sums(plan.engine) else 0
    fetched = 0
    if stage == 3:
        lasting, fetched = gathered_weights(plan, memory.parameters), fetch_buffer(plan, memory.parameters)
        passing, averaging = lasting, reduction_copies(plan, memory.trained)
        if memory.trained > option(plan, "reduce_bucket_size"):  # it is full before the backward pass ends
            passing, averaging = passing + averaging, 0
    gradients = 0 if keeps_gradients(plan, stage) else memory.gradients
    # in addition to the current micro-batch: gradients of earlier ones
    held = gradients if several else 0
    in_flight = gradients_in_flight(plan, on_cpu)
    again = _recomputed(plan, memory.layers, on_cpu) + in_flight
    head = 0 if several or keeps_gradients(plan, stage) else _head_weight_gradient(plan, memory)
    # what a block computes in the forward pass is as much as the gradients of it, and is saved without recomputation
    computed = in_flight if plan.engine.recompute_layers else 0
    moments = {
        "forward pass of the last block": held + lasting + fetched + memory.activations + computed,
        "loss": held + lasting + memory.activations + memory.loss,
        "backward pass of the last block": held + passing + memory.activations + head + again,
        "backward pass of the first block": (gradients if several else min(gradients, _later_gradients(plan, memory)))
        + memory.activations // max(1, len(saving_blocks(plan, memory.layers)))
        + again
        + passing,
        "gradient reduction": gradients + averaging,
        "optimizer step": gradients + _step(plan, memory.trained, stage),
    }
    return memory.weights + memory.optimizer + memory.permanent_buffers + max(moments.values())


def _recomputed(plan: Plan, layers: range, on_cpu: bool) -> int:
    """Bytes of a group of blocks that is recomputed, of the blocks that save most, besides what is stored of them."""
    group, selective = plan.engine.recompute_layers, plan.engine.recompute_selective
    if not group:
        return 0
    sizes = (
        block_bytes(plan, block, on_cpu) - (product_bytes(plan, block) if selective else 0)
        for block in saving_blocks(plan, layers)
    )
    return group * max(sizes, default=0)


def _later_gradients(plan: Plan, memory: StageMemory) -> int:
    """Gradient bytes before those of the first block of a stage and of an untied embedding are computed."""
    first = [layer for layer in memory.layers if 0 < layer <= plan.model.num_layers][:1]
    first += [0] if 0 in memory.layers and not plan.model.tied_embeddings else []
    missing = sum(held_trained(plan, [layer]) for layer in first)
    return _gradients(plan, memory.trained - missing, plan.engine.zero_stage)


def _gradients(plan: Plan, parameters: int, stage: int) -> int:
    """Bytes of all gradients; from stage 2 on, only of the rank's own shard."""
    return parameters * accumulator(plan) // (plan.layout.replicas if stage >= 2 else 1)


def _step(plan: Plan, parameters: int, stage: int) -> int:
    """Bytes that the optimizer step adds to the gradients: its shard, flattened, and then in fp32."""
    if _is_offloaded(plan, "offload_optimizer"):
        return 0
    narrow = accumulator(plan)
    if stage == 0:
        return 0 if narrow == 4 else parameters * 4
    shard = parameters // plan.layout.replicas
    if stage == 3:
        shard = min(shard, option(plan, "sub_group_size"))
    return shard * (narrow + (4 if narrow != 4 else 0))  # a flat fp32 gradient needs no copy


def _is_offloaded(plan: Plan, name: str) -> bool:
    option = plan.engine.zero_options.get(name)
    return isinstance(option, dict) and option.get("device") == "cpu"


def _head_weight_gradient(plan: Plan, memory: StageMemory) -> int:
    """Bytes of the gradient of the head's weight as it is accumulated, on the last stage."""
    if not memory.loss or not _head_trains(plan):
        return 0
    elements = plan.model.padded_vocab_size // plan.layout.tensor * plan.model.hidden_size
    return _gradients(plan, elements, plan.engine.zero_stage)


def _head_trains(plan: Plan) -> bool:
    """Whether the loss computes the gradient of the head's weight."""
    return trains("embedding.weight" if plan.model.tied_embeddings else "head.weight", plan.engine.freeze)


def _chunk(plan: Plan, on_cpu: bool) -> int:
    """Tokens of a chunk of the loss."""
    return loss_chunk(tokens_on_rank(plan), plan.model.hidden_size, plan.engine.compile, on_cpu)


def _head_gradient(plan: Plan, on_cpu: bool) -> int:
    """Bytes of the gradient of the head's weight as the loss computes it: a sum over several chunks is fp32."""
    width = 4 if _chunk(plan, on_cpu) < tokens_on_rank(plan) else WIDTH[plan.engine.precision]
    return plan.model.padded_vocab_size // plan.layout.tensor * plan.model.hidden_size * width


def _loss(plan: Plan, on_cpu: bool) -> int:
    """Bytes that the loss allocates, with a chunk of logits and the larger of two things that are made of it.

    Eager code makes copies of the chunk in fp32; on a CPU the product of a chunk in 16 bits is added to the fp32 sum,
    for which torch copies it in fp32.
    """
    width, rows = WIDTH[plan.engine.precision], plan.model.padded_vocab_size // plan.layout.tensor
    chunk, tokens, hidden_size = _chunk(plan, on_cpu), tokens_on_rank(plan), plan.model.hidden_size
    copies = 1 if plan.model.logit_softcap is None else 2  # the slope of the cap
    copy = 0 if plan.engine.compile else copies * chunk * rows * 4
    gradient = _head_gradient(plan, on_cpu) if _head_trains(plan) else 0
    product = rows * hidden_size * (width + 4) if gradient and on_cpu and width < 4 and chunk < tokens else 0
    return gradient + tokens * hidden_size * width + chunk * rows * width + max(copy, product)
