"""Memory of communication on each rank: gradient buckets, gathered weights, the pipeline's buffers, shared memory.

What DeepSpeed 0.19 allocates (`runtime/zero/stage3.py`, `partition_parameters.py` and `stage_1_and_2.py`).
"""

from megatron.config.gradient_reduction import overlaps, reduces_whole_sums
from megatron.config.parameter_shapes import Shape, layer_shapes, trains
from megatron.config.plan import Plan
from megatron.estimate.activations import WIDTH, stream_tokens

WHOLE_BUCKET = 500_000_000  # elements that DeepSpeed reduces at a time without ZeRO, regardless of reduce_bucket_size
_DEFAULTS = {
    "sub_group_size": 1_000_000_000,
    "reduce_bucket_size": 500_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
}


def option(plan: Plan, name: str) -> int:
    """A number of `zero_optimization`, as written or DeepSpeed's default."""
    return int(str(plan.engine.zero_options.get(name, _DEFAULTS[name])))


def accumulator(plan: Plan) -> int:
    """Bytes per element of an accumulated gradient; fp32 without ZeRO, for our own fp32 master weights."""
    usual = "fp32" if plan.engine.zero_stage == 0 else plan.engine.precision
    return WIDTH[plan.engine.gradient_accumulation_dtype or usual]


def temporary_buffers(plan: Plan, held: int, parameters: int, stage: int) -> int:
    """Bytes of gradient buckets, and in stage 3 of gathered weights; of `held` parameters `parameters` train."""
    if stage == 0:
        sent = 4 if plan.engine.fp32_allreduce else WIDTH[plan.engine.precision]
        own = accumulator(plan)
        whole = min(parameters, WHOLE_BUCKET) * (own + (sent if sent != own else 0))
        return whole if plan.layout.replicas > 1 else 0
    if stage == 3:
        return gathered_weights(plan, held) + max(fetch_buffer(plan, held), reduction_copies(plan, parameters))
    if reduces_whole_sums(plan.engine):  # the gradients beside their sums, and a copy of the sums if they are small
        return parameters * (2 + (4 if parameters < WHOLE_BUCKET and plan.layout.replicas > 1 else 0))
    return _buckets(plan, parameters) + _sent_in_fp32(plan, parameters)


def gathered_weights(plan: Plan, held: int) -> int:
    """Bytes of the weights that ZeRO 3 gathers, of `held` parameters, besides those that stay gathered."""
    if plan.layout.replicas == 1:
        return 0
    live = option(plan, "stage3_max_live_parameters") + option(plan, "stage3_prefetch_bucket_size")
    return min(held - _persistent(plan), live) * WIDTH[plan.engine.precision]


def fetch_buffer(plan: Plan, held: int) -> int:
    """Bytes of the buffer from which weights that ZeRO 3 gathers ahead are copied, until the last of them is used."""
    return min(gathered_weights(plan, held), option(plan, "stage3_prefetch_bucket_size") * WIDTH[plan.engine.precision])


def _persistent(plan: Plan) -> int:
    """Elements of the parameters that are small enough for ZeRO 3 to keep them gathered."""
    most = option(plan, "stage3_param_persistence_threshold")
    sizes = (shape.elements(plan.layout.tensor) for shape in _shapes(plan).values())
    return sum(size for size in sizes if size <= most)


def _shapes(plan: Plan) -> dict[str, Shape]:
    """The parameters of all layers."""
    return {name: shape for layer in layer_shapes(plan.model) for name, shape in layer.items()}


def reduction_copies(plan: Plan, parameters: int) -> int:
    """Bytes that ZeRO 3 adds to a bucket when it reduces it: a copy in the order of ranks, and the shard to be summed.

    A gradient larger than the bucket is not copied into it: it is sent as it is, or from a copy in fp32.
    """
    if plan.layout.replicas == 1:
        return 0
    narrow, bucket = WIDTH[plan.engine.precision], option(plan, "reduce_bucket_size")
    sent = 4 if plan.engine.fp32_allreduce else narrow
    shard = accumulator(plan) / plan.layout.replicas if accumulator(plan) != sent else 0
    trained = (shape for name, shape in _shapes(plan).items() if trains(name, plan.engine.freeze))
    largest = max(shape.elements(plan.layout.tensor) for shape in trained)
    alone = largest * (narrow + (sent if sent != narrow else 0) + shard) if largest > bucket else 0
    return int(max(min(parameters, bucket) * (sent + shard), alone))


def _buckets(plan: Plan, parameters: int) -> int:
    """Bytes of buckets of reduce_bucket_size elements, two if communication overlaps the backward pass.

    ZeRO 1 collects sums in them, ZeRO 2 and 3 the gradients of a micro-batch, in ZeRO 3 as they are sent.
    """
    width = accumulator(plan) if plan.engine.zero_stage == 1 else WIDTH[plan.engine.precision]
    if plan.engine.zero_stage == 3 and plan.engine.fp32_allreduce:
        width = 4
    size = option(plan, "reduce_bucket_size") * width
    if plan.engine.zero_options.get("contiguous_gradients", True) is False:
        return min(parameters * width, size)
    return size * (2 if overlaps(plan) and plan.engine.zero_stage < 3 else 1)


def _sent_in_fp32(plan: Plan, parameters: int) -> int:
    """Bytes of a copy in fp32 of a bucket's gradients, if ZeRO sends that instead of them."""
    narrow = plan.engine.fp32_allreduce and plan.engine.precision != "fp32"
    return 4 * min(parameters, option(plan, "reduce_bucket_size")) if narrow and plan.layout.replicas > 1 else 0


def keeps_gradients(plan: Plan, stage: int) -> bool:
    """Whether accumulated gradients have a permanent buffer."""
    return stage == 3 or (stage == 1 and accumulator(plan) != WIDTH[plan.engine.precision])


def permanent_buffers(plan: Plan, parameters: int, stage: int) -> int:
    """Bytes of ZeRO 3's bucket, and of the weights that it keeps gathered."""
    if stage < 3:
        return 0
    persistent = _persistent(plan) * WIDTH[plan.engine.precision] if plan.layout.replicas > 1 else 0
    return _buckets(plan, parameters) + persistent


def symmetric_memory(plan: Plan) -> int:
    """Bytes that a GPU of a tensor-parallel group lets the others access, for `async_tensor_parallel`.

    Two ranks' parts of the product before a reduce-scatter (torch 2.13, torch/distributed/_symmetric_memory,
    `_pipelined_produce_and_all2all`), in the same place as one part of what is all-gathered.
    """
    shared = 2 * stream_tokens(plan) * plan.model.hidden_size * WIDTH[plan.engine.precision]
    return shared if plan.engine.async_tensor_parallel else 0


def pipeline_buffers(plan: Plan, number: int) -> int:
    """Bytes of DeepSpeed's pipeline buffers: inputs, their gradients, and outputs.

    One more input is being received.
    """
    if plan.layout.pipe == 1:
        return 0
    hidden = stream_tokens(plan) * plan.model.hidden_size * WIDTH[plan.engine.precision]
    count = max(2, min(plan.layout.pipe - number, plan.batch.accumulation_steps))
    received = hidden if number else 0
    return count * (2 * received + hidden) + received
