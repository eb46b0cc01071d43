"""What the forward pass of a micro-batch keeps for the backward pass, on one rank.

Sizes follow what torch's operations save, uncompiled. on_cpu: RMSNorm is not a kernel there but composed, and
saves its input and its result before the weight, both in fp32.
"""

from megatron.config.pipeline_stages import layer_classes
from megatron.config.plan import Plan
from megatron.config.widths import is_gated

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}


def blocks_among(plan: Plan, layers: range) -> int:
    """How many of the layers are blocks."""
    return sum(0 < layer <= plan.model.num_layers for layer in layers)


def tokens_on_rank(plan: Plan) -> int:
    """Tokens of a micro-batch that a rank computes with."""
    return plan.batch.micro_size * plan.batch.sequence_length // plan.layout.context


def stream_tokens(plan: Plan) -> int:
    """Tokens whose hidden states a rank has between the split matrices."""
    return tokens_on_rank(plan) // (plan.layout.model if plan.layout.sequence_parallel else 1)


def saved_bytes(plan: Plan, layers: range, group: int, on_cpu: bool = False) -> int:
    """Bytes saved for the backward pass of one micro-batch, without logits.

    group: blocks that are recomputed together, of which only the input is kept; 0: everything is kept.
    """
    hidden = stream_tokens(plan) * plan.model.hidden_size * WIDTH[plan.engine.precision]
    blocks = blocks_among(plan, layers)
    saved = -(-blocks // group) * _kept_inputs(plan, hidden) if group else blocks * block_bytes(plan, on_cpu)
    if group and plan.engine.recompute_selective:
        saved += blocks * product_bytes(plan)
    last = len(layer_classes(plan.model)) - 1
    if 0 in layers:
        saved += 8 * tokens_on_rank(plan)  # token ids
    if last - 1 in layers:
        saved += hidden + _norm_inputs(plan, 1, 1, on_cpu) + _statistics(plan)  # the final norm, and the head's input
    return saved


def _kept_inputs(plan: Plan, hidden: int) -> int:
    """What is left on the device of the input of a group of blocks that is computed again."""
    if plan.engine.checkpoint_in_cpu:
        return 0
    cut = plan.engine.partition_activations and not plan.layout.sequence_parallel
    return hidden // (plan.layout.model if cut else 1)


def product_bytes(plan: Plan) -> int:
    """Results of a block's matrix products and of attention, which selective recomputation keeps."""
    model, tokens, width = plan.model, tokens_on_rank(plan), WIDTH[plan.engine.precision]
    queries = model.num_attention_heads * model.head_size // plan.layout.model
    keys = model.num_kv_heads * model.head_size // plan.layout.model
    wide = (2 if is_gated(model.activation) else 1) * model.ffn_hidden_size // plan.layout.model
    softmax = 4 * tokens * model.num_attention_heads // plan.layout.model
    outputs = (1 if model.parallel_residual else 2) * model.hidden_size
    return tokens * (queries + 2 * keys + queries + wide + outputs) * width + softmax


def block_bytes(plan: Plan, on_cpu: bool = False) -> int:
    """Bytes that one block saves: its input, and what every operation in it needs for its backward pass."""
    return _norms_and_stream(plan, on_cpu) + _attention(plan, on_cpu) + _feed_forward(plan)


def _norms_and_stream(plan: Plan, on_cpu: bool) -> int:
    model, tokens = plan.model, stream_tokens(plan)
    hidden = tokens * model.hidden_size * WIDTH[plan.engine.precision]
    norms = 1 if model.tied_norm else 2
    streams = 1 if model.parallel_residual else 2  # inputs of the norms that differ
    dropped = streams * tokens * model.hidden_size if model.hidden_dropout else 0  # masks, a byte each
    return norms * hidden + _norm_inputs(plan, norms, streams, on_cpu) + norms * _statistics(plan) + dropped


def _norm_inputs(plan: Plan, norms: int, streams: int, on_cpu: bool) -> int:
    """What norms keep of what goes into them. streams: the tensors that do."""
    elements, width = stream_tokens(plan) * plan.model.hidden_size, WIDTH[plan.engine.precision]
    if not on_cpu or plan.model.norm != "rmsnorm":
        return streams * elements * width
    return elements * 4 * (norms + (streams if width == 4 else norms))  # each makes its own fp32 of a 16-bit input


def _statistics(plan: Plan) -> int:
    """Mean and deviation of every token, in fp32."""
    return stream_tokens(plan) * (4 if plan.model.norm == "rmsnorm" else 8)


def _attention(plan: Plan, on_cpu: bool) -> int:
    model, tokens, width = plan.model, tokens_on_rank(plan), WIDTH[plan.engine.precision]
    queries = model.num_attention_heads * model.head_size // plan.layout.model
    keys = model.num_kv_heads * model.head_size // plan.layout.model
    elements = queries + 2 * keys + queries  # the fused projection, of which the values are a view; the result
    if model.position_embedding == "rotary":
        elements += queries + keys  # turned copies
    if plan.layout.context > 1:  # queries and keys (turned or not), values and result, which then goes back
        elements = queries + 2 * keys + 2 * queries
    several = model.num_kv_heads // (plan.layout.model * plan.layout.context) > 1
    if several and model.num_kv_heads != model.num_attention_heads:
        elements += queries  # the query heads of a group, next to each other
    softmax = 4 * tokens * model.num_attention_heads // plan.layout.model
    masked = sum(kind == "local" for kind in model.attention_kinds) / model.num_layers
    mask = round(masked * plan.batch.sequence_length**2 * width) if _needs_mask(plan, on_cpu) else 0
    return tokens * elements * width + softmax + mask + _query_key_norm(plan)


def _query_key_norm(plan: Plan) -> int:
    """Queries and keys before the weights of their norm, and what their norms need beside them."""
    model, tokens, width = plan.model, tokens_on_rank(plan), WIDTH[plan.engine.precision]
    heads = (model.num_attention_heads + model.num_kv_heads) // plan.layout.model
    if model.qk_norm == "head":
        return tokens * heads * (model.head_size * width + 4)  # a mean square of each head
    if model.qk_norm == "full":
        return tokens * heads * model.head_size * (width if width == 4 else width + 4)  # the sum is taken in fp32
    return 0


def _needs_mask(plan: Plan, on_cpu: bool) -> bool:
    """Whether windows are masks: what goes by blocks on a GPU needs none (model/attention_backends.py)."""
    by_blocks = not on_cpu and plan.model.head_size >= 16 and not plan.model.attention_dropout
    return not by_blocks and (plan.model.sliding_window or plan.batch.sequence_length) < plan.batch.sequence_length


def _feed_forward(plan: Plan) -> int:
    """Plain: before and after the activation. Gated: gate, its activation, up, and their product."""
    saved = 4 if is_gated(plan.model.activation) else 2
    width = plan.model.ffn_hidden_size // plan.layout.model
    return saved * tokens_on_rank(plan) * width * WIDTH[plan.engine.precision]


def gradients_in_flight(plan: Plan) -> int:
    """Gradients of activations while a feed-forward layer is in its backward pass: the widest moment of a block."""
    wide = (3 if is_gated(plan.model.activation) else 2) * plan.model.ffn_hidden_size // plan.layout.model
    hidden = plan.model.hidden_size * (2 if plan.layout.sequence_parallel else 1)  # gathered inputs, their gradient
    return tokens_on_rank(plan) * (wide + hidden) * WIDTH[plan.engine.precision]
