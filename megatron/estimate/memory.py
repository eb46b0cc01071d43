"""Memory of a training step on each rank.

Arithmetic on a Plan, based on what the engine allocates (`engine/settings.py`, DeepSpeed 0.19's ZeRO optimizers) and
what the model's operations save for the backward pass. `docs/estimates.md` compares it with measured runs.
"""

from dataclasses import dataclass, replace

from megatron.config.gradient_reduction import overlaps, reduces_whole_sums
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
    stream_tokens,
    tokens_on_rank,
)

WHOLE_BUCKET = 500_000_000  # elements that DeepSpeed reduces at a time without ZeRO, regardless of reduce_bucket_size
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
    passing, buckets = _buffers(plan, parameters, trained, stage), _permanent_buckets(plan, trained, stage)
    pipeline = _stage_buffers(plan, number)
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
        buffers=passing + buckets + pipeline,
        permanent_buffers=buckets + pipeline + (gradients if _keeps_gradients(plan, stage) else 0),
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
    """The largest of five moments of a step. passing: bytes of temporary buffers."""
    stage, several = plan.engine.zero_stage, plan.batch.accumulation_steps > 1
    averaging, passing = (passing, 0) if stage == 0 else (0, passing)  # without ZeRO after all gradients are computed
    if reduces_whole_sums(plan.engine):
        averaging, passing = passing, 2 * memory.trained
    gradients = 0 if _keeps_gradients(plan, stage) else memory.gradients
    # in addition to the current micro-batch: gradients of earlier ones
    held = gradients if several else 0
    # gathered weights, and bf16 gradients beside their sums; buckets are released after each backward pass
    lasting = passing if stage == 3 or (several and reduces_whole_sums(plan.engine)) else 0
    again = _recomputed(plan, memory.layers, on_cpu) + gradients_in_flight(plan, on_cpu)
    head = 0 if several else _head_weight_gradient(plan, memory)
    moments = {
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


def _accumulator(plan: Plan) -> int:
    """Bytes per element of an accumulated gradient; fp32 without ZeRO, for our own fp32 master weights."""
    usual = "fp32" if plan.engine.zero_stage == 0 else plan.engine.precision
    return WIDTH[plan.engine.gradient_accumulation_dtype or usual]


def _gradients(plan: Plan, parameters: int, stage: int) -> int:
    """Bytes of all gradients; from stage 2 on, only of the rank's own shard."""
    return parameters * _accumulator(plan) // (plan.layout.replicas if stage >= 2 else 1)


def _step(plan: Plan, parameters: int, stage: int) -> int:
    """Bytes that the optimizer step adds to the gradients: its shard, flattened, and then in fp32."""
    if _is_offloaded(plan, "offload_optimizer"):
        return 0
    narrow = _accumulator(plan)
    if stage == 0:
        return 0 if narrow == 4 else parameters * 4
    shard = parameters // plan.layout.replicas
    if stage == 3:
        return min(shard, _option(plan, "sub_group_size")) * 4
    return shard * (narrow + (4 if narrow != 4 else 0))  # a flat fp32 gradient needs no copy


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


def _buffers(plan: Plan, held: int, parameters: int, stage: int) -> int:
    """Bytes of gradient buckets, and in stage 3 of gathered weights; of `held` parameters `parameters` train."""
    if stage == 0:
        reduced = 4 if plan.engine.fp32_allreduce else WIDTH[plan.engine.precision]
        own = _accumulator(plan)
        whole = min(parameters, WHOLE_BUCKET) * (own + (reduced if reduced != own else 0))
        return whole if plan.layout.replicas > 1 else 0
    if stage == 3:
        live = _option(plan, "stage3_max_live_parameters") + _option(plan, "stage3_prefetch_bucket_size")
        gathered = min(held, live) * WIDTH[plan.engine.precision] if plan.layout.replicas > 1 else 0
        return gathered + 2 * _sent_in_fp32(plan, parameters)  # in the order of parameters, and then of ranks
    if reduces_whole_sums(plan.engine):  # the gradients beside their sums, and a copy of the sums if they are small
        return parameters * (2 + (4 if parameters < WHOLE_BUCKET and plan.layout.replicas > 1 else 0))
    return _buckets(plan, parameters) + _sent_in_fp32(plan, parameters)


def _buckets(plan: Plan, parameters: int) -> int:
    """Bytes of buckets of reduce_bucket_size elements, two if communication overlaps the backward pass.

    ZeRO 1 collects sums in them, ZeRO 2 and 3 the gradients of a micro-batch, in ZeRO 3 as they are sent.
    """
    width = _accumulator(plan) if plan.engine.zero_stage == 1 else WIDTH[plan.engine.precision]
    if plan.engine.zero_stage == 3 and plan.engine.fp32_allreduce:
        width = 4
    size = _option(plan, "reduce_bucket_size") * width
    if plan.engine.zero_options.get("contiguous_gradients", True) is False:
        return min(parameters * width, size)
    return size * (2 if overlaps(plan) and plan.engine.zero_stage < 3 else 1)


def _sent_in_fp32(plan: Plan, parameters: int) -> int:
    """Bytes of a copy in fp32 of a bucket's gradients, if ZeRO sends that instead of them."""
    narrow = plan.engine.fp32_allreduce and plan.engine.precision != "fp32"
    return 4 * min(parameters, _option(plan, "reduce_bucket_size")) if narrow and plan.layout.replicas > 1 else 0


def _keeps_gradients(plan: Plan, stage: int) -> bool:
    """Whether accumulated gradients have a permanent buffer."""
    return stage == 3 or (stage == 1 and _accumulator(plan) != WIDTH[plan.engine.precision])


def _permanent_buckets(plan: Plan, parameters: int, stage: int) -> int:
    """Bytes of buckets that persist between steps, in stage 3."""
    return _buckets(plan, parameters) if stage == 3 else 0


def _stage_buffers(plan: Plan, number: int) -> int:
    """Bytes of DeepSpeed's pipeline buffers: inputs, their gradients, and outputs.

    One more input is being received.
    """
    if plan.layout.pipe == 1:
        return 0
    hidden = stream_tokens(plan) * plan.model.hidden_size * WIDTH[plan.engine.precision]
    count = max(2, min(plan.layout.pipe - number, plan.batch.accumulation_steps))
    received = hidden if number else 0
    return count * (2 * received + hidden) + received


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

    Eager code makes copies of the chunk in fp32; on a CPU the product of a chunk in 16 bits is added to the fp32 sum.
    """
    width, rows = WIDTH[plan.engine.precision], plan.model.padded_vocab_size // plan.layout.tensor
    chunk, tokens, hidden_size = _chunk(plan, on_cpu), tokens_on_rank(plan), plan.model.hidden_size
    copies = 1 if plan.model.logit_softcap is None else 2  # the slope of the cap
    copy = 0 if plan.engine.compile else copies * chunk * rows * 4
    gradient = _head_gradient(plan, on_cpu) if _head_trains(plan) else 0
    product = rows * hidden_size * width if gradient and on_cpu and width < 4 and chunk < tokens else 0
    return gradient + tokens * hidden_size * width + chunk * rows * width + max(copy, product)
