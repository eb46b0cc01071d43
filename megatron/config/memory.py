"""What a training step takes in the memory of each rank.

Floor 1: arithmetic on a Plan, after what the engine really keeps (`engine/settings.py`, DeepSpeed 0.19's ZeRO
optimizers) and what the model's operations save for the backward pass. `docs/estimates.md` holds it against measured
runs. Letters: T tokens of a micro-batch, h hidden, q query and k key/value width and f feed-forward width on this rank,
v vocabulary on this rank, n parameters on this rank; w bytes of the number format.
"""

from dataclasses import dataclass, replace

from megatron.config.estimate import MOMENTS, held_parameters, layer_parameters
from megatron.config.plan import Plan
from megatron.config.stages import layer_classes, stage_layers
from megatron.config.widths import is_gated

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
LOSS_CHUNK = 2**24  # logits that the loss handles at a time, in fp32 (parallel/cross_entropy.py)
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
    peak: int


def stage_memories(plan: Plan) -> list[StageMemory]:
    """The memory of a rank of each stage, first to last."""
    return [_stage(plan, number, layers) for number, layers in enumerate(stage_layers(plan))]


def fits(peak: int, gpu_memory: float) -> bool:
    """Whether `peak` bytes fit into a device of `gpu_memory` GiB, with what CUDA and its allocator take."""
    return peak <= gpu_memory * 2**30 * (1 - FRAGMENTATION) - RESERVE


def zero_stage(plan: Plan) -> int:
    """The stage that runs: 16-bit weights are sharded at least as stage 1 (see engine/settings.py)."""
    return plan.engine.zero_stage if plan.engine.precision == "fp32" else max(1, plan.engine.zero_stage)


def _stage(plan: Plan, number: int, layers: range) -> StageMemory:
    stage, replicas = zero_stage(plan), plan.layout.replicas
    parameters = held_parameters(plan.model, plan.layout.model, layers)
    # every ZeRO optimizer steps an fp32 copy of its own, of fp32 weights too
    kept_by_optimizer = MOMENTS.get(plan.optimizer.kind, 2) + (1 if stage else 0)
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
        activations=in_flight * _activations(plan, layers, plan.engine.recompute_layers),
        activations_kept=in_flight * _activations(plan, layers, 0),
        activations_recomputed=in_flight * _activations(plan, layers, 1),
        logits=_logits(plan) if has_head else 0,
        kept_logits=kept_logits,
        buffers=passing + buckets + pipeline,
        permanent_buffers=buckets + pipeline + (gradients if _keeps_gradients(plan, stage) else 0),
        peak=0,
    )
    return replace(memory, peak=_peak(plan, memory, passing))


def _peak(plan: Plan, memory: StageMemory, passing: int) -> int:
    """The worst of four moments of a step. passing: bytes of the buffers that are not always there."""
    stage, several = zero_stage(plan), plan.batch.accumulation_steps > 1
    gradients = 0 if _keeps_gradients(plan, stage) else memory.gradients
    # beside the micro-batch that is under way: what earlier ones left, and weights that are whole for a while
    held = gradients + passing if several else passing if stage == 3 else 0
    there = _products(plan) if plan.engine.recompute_selective else 0
    again = (_block(plan) - there) * plan.engine.recompute_layers + _gradients_in_flight(plan)
    stale = memory.kept_logits if plan.layout.pipe > 1 else 0  # the pipeline's buffers hold these logits already
    moments = {
        "the loss is there": held + memory.activations + memory.logits,
        "the last block is in its backward pass": max(held, passing) + memory.activations + again,
        "the first block is": (gradients if several else min(gradients, _later_gradients(plan, memory)))
        + memory.activations // max(1, _blocks(plan, memory.layers))
        + again
        + passing,
        "the optimizer steps": gradients + _step(plan, memory.parameters, stage),
    }
    return memory.weights + memory.optimizer + memory.permanent_buffers - stale + max(moments.values())


def _later_gradients(plan: Plan, memory: StageMemory) -> int:
    """Gradients that are there before the first block of a stage, and the untied embedding before it, have theirs."""
    counts = layer_parameters(plan.model, plan.layout.model)
    first = [layer for layer in memory.layers if 0 < layer <= plan.model.num_layers][:1]
    first += [0] if 0 in memory.layers and not plan.model.tied_embeddings else []
    missing = sum(counts[layer] for layer in first)
    return _gradients(plan, memory.parameters - missing, zero_stage(plan))


def _blocks(plan: Plan, layers: range) -> int:
    return sum(0 < layer <= plan.model.num_layers for layer in layers)


def _tokens(plan: Plan) -> int:
    return plan.batch.micro_size * plan.batch.sequence_length // plan.layout.context


def _stream_tokens(plan: Plan) -> int:
    """Tokens whose hidden states a rank has between the split matrices."""
    return _tokens(plan) // (plan.layout.model if plan.layout.sequence_parallel else 1)


def _accumulator(plan: Plan) -> int:
    """Bytes of an element of a summed gradient."""
    return WIDTH[plan.engine.gradient_accumulation_dtype or plan.engine.precision]


def _gradients(plan: Plan, parameters: int, stage: int) -> int:
    """Gradients when all of them are there; from stage 2 on a rank keeps those of its own shard."""
    return parameters * _accumulator(plan) // (plan.layout.replicas if stage >= 2 else 1)


def _step(plan: Plan, parameters: int, stage: int) -> int:
    """What the optimizer's step adds to the gradients: this shard's, flattened, and then in fp32."""
    if stage == 0 or _is_offloaded(plan, "offload_optimizer"):
        return 0
    shard = parameters // plan.layout.replicas
    narrow = _accumulator(plan)
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
        whole = min(parameters, _option(plan, "reduce_bucket_size")) * _accumulator(plan)
        return whole if plan.layout.replicas > 1 else 0
    if stage == 3:
        live = _option(plan, "stage3_max_live_parameters") + _option(plan, "stage3_prefetch_bucket_size")
        return min(parameters, live) * WIDTH[plan.engine.precision] if plan.layout.replicas > 1 else 0
    return 0 if stage == 1 and plan.layout.replicas > 1 else _buckets(plan, parameters)


def _buckets(plan: Plan, parameters: int) -> int:
    """Whole buffers of reduce_bucket_size elements, two where communication overlaps the backward pass."""
    size = _option(plan, "reduce_bucket_size") * _accumulator(plan)
    if plan.engine.zero_options.get("contiguous_gradients", True) is False:
        return min(parameters * _accumulator(plan), size)
    overlap = plan.engine.zero_options.get("overlap_comm") is True
    return size * (2 if overlap and plan.layout.pipe == 1 and zero_stage(plan) < 3 else 1)


def _keeps_gradients(plan: Plan, stage: int) -> bool:
    """Whether summed gradients have a buffer of their own, which is there between steps too."""
    return stage == 3 or (stage == 1 and _accumulator(plan) != WIDTH[plan.engine.precision])


def _permanent_buckets(plan: Plan, parameters: int, stage: int) -> int:
    """Stages 1 and 3 keep their buckets once they are there."""
    return _buckets(plan, parameters) if stage == 3 or (stage == 1 and plan.layout.replicas > 1) else 0


def _stage_buffers(plan: Plan, number: int, kept_logits: int) -> int:
    """What DeepSpeed's pipeline keeps of micro-batches: inputs and outputs, logits in the last stage."""
    if plan.layout.pipe == 1:
        return 0
    hidden = _stream_tokens(plan) * plan.model.hidden_size * WIDTH[plan.engine.precision]
    count = max(2, min(plan.layout.pipe - number, plan.batch.accumulation_steps))
    return count * ((hidden if number else 0) + (kept_logits or hidden))


def _activations(plan: Plan, layers: range, group: int) -> int:
    """Bytes saved for the backward pass of one micro-batch, without logits.

    group: blocks that are recomputed together, of which only the input is kept; 0: everything is kept.
    """
    hidden = _stream_tokens(plan) * plan.model.hidden_size * WIDTH[plan.engine.precision]
    blocks = _blocks(plan, layers)
    saved = -(-blocks // group) * _kept_inputs(plan, hidden) if group else blocks * _block(plan)
    if group and plan.engine.recompute_selective:
        saved += blocks * _products(plan)
    last = len(layer_classes(plan.model)) - 1
    if 0 in layers:
        saved += 8 * _tokens(plan)  # token ids
    if last - 1 in layers:
        saved += 2 * hidden + _statistics(plan)  # input and output of the final norm
    return saved


def _kept_inputs(plan: Plan, hidden: int) -> int:
    """What is left on the device of the input of a group of blocks that is computed again."""
    if plan.engine.checkpoint_in_cpu:
        return 0
    cut = plan.engine.partition_activations and not plan.layout.sequence_parallel
    return hidden // (plan.layout.model if cut else 1)


def _products(plan: Plan) -> int:
    """Results of a block's matrix products and of attention, which selective recomputation keeps."""
    model, tokens, width = plan.model, _tokens(plan), WIDTH[plan.engine.precision]
    queries = model.num_attention_heads * model.head_size // plan.layout.model
    keys = model.num_kv_heads * model.head_size // plan.layout.model
    wide = (2 if is_gated(model.activation) else 1) * model.ffn_hidden_size // plan.layout.model
    softmax = 4 * tokens * model.num_attention_heads // plan.layout.model
    outputs = (1 if model.parallel_residual else 2) * model.hidden_size
    return tokens * (queries + 2 * keys + queries + wide + outputs) * width + softmax


def _block(plan: Plan) -> int:
    """Bytes that one block saves: its input, and what every operation in it needs for its backward pass."""
    return _norms_and_stream(plan) + _attention(plan) + _feed_forward(plan)


def _norms_and_stream(plan: Plan) -> int:
    model, tokens = plan.model, _stream_tokens(plan)
    hidden = tokens * model.hidden_size * WIDTH[plan.engine.precision]
    norms = 1 if model.tied_norm else 2
    streams = 1 if model.parallel_residual else 2  # inputs of the norms that differ
    dropped = streams * tokens * model.hidden_size if model.hidden_dropout else 0  # masks, a byte each
    return (norms + streams) * hidden + norms * _statistics(plan) + dropped


def _statistics(plan: Plan) -> int:
    """Mean and deviation of every token, in fp32."""
    return _stream_tokens(plan) * (4 if plan.model.norm == "rmsnorm" else 8)


def _attention(plan: Plan) -> int:
    model, tokens, width = plan.model, _tokens(plan), WIDTH[plan.engine.precision]
    queries = model.num_attention_heads * model.head_size // plan.layout.model
    keys = model.num_kv_heads * model.head_size // plan.layout.model
    elements = queries + 2 * keys + queries  # the fused projection, of which the values are a view; the result
    if model.position_embedding == "rotary":
        elements += queries + keys  # turned copies
    if plan.layout.context > 1:  # queries and keys (turned or not), values and result, which then goes back
        elements = queries + 2 * keys + 2 * queries
    if model.num_kv_heads != model.num_attention_heads:
        elements += queries  # the query heads of a group, next to each other
    softmax = 4 * tokens * model.num_attention_heads // plan.layout.model
    masked = sum(kind == "local" for kind in model.attention_kinds) / model.num_layers
    mask = round(masked * plan.batch.sequence_length**2 * width) if _needs_mask(plan) else 0
    return tokens * elements * width + softmax + mask + _query_key_norm(plan)


def _query_key_norm(plan: Plan) -> int:
    """Queries and keys before the weights of their norm, and what their norms need beside them."""
    model, tokens, width = plan.model, _tokens(plan), WIDTH[plan.engine.precision]
    heads = (model.num_attention_heads + model.num_kv_heads) // plan.layout.model
    if model.qk_norm == "head":
        return tokens * heads * (model.head_size * width + 4)  # a mean square of each head
    if model.qk_norm == "full":
        return tokens * heads * model.head_size * (width if width == 4 else width + 4)  # the sum is taken in fp32
    return 0


def _needs_mask(plan: Plan) -> bool:
    return (plan.model.sliding_window or plan.batch.sequence_length) < plan.batch.sequence_length


def _feed_forward(plan: Plan) -> int:
    """Plain: before and after the activation. Gated: gate, its activation, up, and their product."""
    saved = 4 if is_gated(plan.model.activation) else 2
    width = plan.model.ffn_hidden_size // plan.layout.model
    return saved * _tokens(plan) * width * WIDTH[plan.engine.precision]


def _gradients_in_flight(plan: Plan) -> int:
    """Gradients of activations while a feed-forward layer is in its backward pass: the widest moment of a block."""
    wide = (3 if is_gated(plan.model.activation) else 2) * plan.model.ffn_hidden_size // plan.layout.model
    hidden = plan.model.hidden_size * (2 if plan.layout.sequence_parallel else 1)  # gathered inputs, their gradient
    return _tokens(plan) * (wide + hidden) * WIDTH[plan.engine.precision]


def _kept_logits(plan: Plan) -> int:
    return _tokens(plan) * plan.model.padded_vocab_size // plan.layout.model * WIDTH[plan.engine.precision]


def _logits(plan: Plan) -> int:
    """Logits, their gradient, and the fp32 chunk in which the loss is taken."""
    width, kept = WIDTH[plan.engine.precision], _kept_logits(plan)
    chunk = min(kept // width, LOSS_CHUNK) * 4 * (1 if width == 4 else 2)
    return 2 * kept + chunk
