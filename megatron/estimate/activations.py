"""Memory of activations that a micro-batch saves for the backward pass, on one rank.

Sizes are those that torch's operations save, uncompiled. on_cpu: RMSNorm is composed instead of a single kernel, and
saves its input and its result before the weight, both in fp32. ScaleNorm is composed everywhere.
"""

from megatron.config.parameter_counts import held_trained
from megatron.config.parameter_shapes import adapters_of, trains
from megatron.config.pipeline_stages import layer_classes
from megatron.config.plan import ModelPlan, Plan
from megatron.config.widths import is_gated

SCORE_BLOCK = 128  # queries whose scores exist at a time
SCORE_TENSORS = 4  # of the size of these scores, and two more with a cap
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}


def saving_blocks(plan: Plan, layers: range) -> list[int]:
    """The numbers of the blocks among the layers that save activations: those before anything that trains do not."""
    first = 0
    if 0 in layers and plan.engine.freeze:
        first = next((layer for layer in layers if held_trained(plan, [layer])), 0) - 1
    return [layer - 1 for layer in layers if max(0, first) < layer <= plan.model.num_layers]


def tokens_on_rank(plan: Plan) -> int:
    """Tokens of a micro-batch on one rank."""
    return plan.batch.micro_size * plan.batch.sequence_length // plan.layout.context


def stream_tokens(plan: Plan) -> int:
    """Tokens of the residual stream on one rank, outside the sharded matrices."""
    return tokens_on_rank(plan) // (plan.layout.tensor if plan.layout.sequence_parallel else 1)


def saved_bytes(plan: Plan, layers: range, group: int, on_cpu: bool = False) -> int:
    """Bytes saved for the backward pass of one micro-batch, without the gradient of the head's weight.

    group: blocks that are recomputed together, of which only the input is stored; 0: no recomputation.
    """
    hidden = stream_tokens(plan) * plan.model.hidden_size * WIDTH[plan.engine.precision]
    blocks = saving_blocks(plan, layers)
    if group:
        saved = -(-len(blocks) // group) * _kept_inputs(plan, hidden)
    else:
        saved = sum(block_bytes(plan, block, on_cpu) for block in blocks)
    if group and plan.engine.recompute_selective:
        saved += sum(product_bytes(plan, block) for block in blocks)
    last = len(layer_classes(plan.model)) - 1
    if 0 in layers:
        saved += 8 * tokens_on_rank(plan)  # token ids
        if plan.model.embedding_norm:
            saved += _norm_inputs(plan, 1, 1, on_cpu) + _statistics(plan)
    if last - 1 in layers:
        saved += _norm_inputs(plan, 1, 1, on_cpu) + _statistics(plan)
    if last in layers:  # the gradient of the head's input, with the whole sequence
        saved += tokens_on_rank(plan) * plan.model.hidden_size * WIDTH[plan.engine.precision]
    return saved


def _kept_inputs(plan: Plan, hidden: int) -> int:
    """Bytes on the device of the input of a group of blocks that is recomputed."""
    if plan.engine.checkpoint_in_cpu:
        return 0
    cut = plan.engine.partition_activations and not plan.layout.sequence_parallel
    return hidden // (plan.layout.tensor if cut else 1)


def product_bytes(plan: Plan, block: int) -> int:
    """Bytes of a block's matrix products and attention results, which selective recomputation stores."""
    model, tokens, width = plan.model, tokens_on_rank(plan), WIDTH[plan.engine.precision]
    queries = model.num_attention_heads * model.head_size // plan.layout.tensor
    keys = model.num_kv_heads * model.head_size // plan.layout.tensor
    wide = (2 if is_gated(model.activation) else 1) * model.ffn_hidden_size // plan.layout.tensor
    softmax = 4 * tokens * model.num_attention_heads // plan.layout.tensor
    outputs = (1 if model.parallel_residual else 2) * model.hidden_size
    rank = model.lora.rank if model.lora else 0
    for adapter in adapters_of(model, block):
        outputs += rank + adapter.outputs // (plan.layout.tensor if adapter.outputs_are_sharded else 1)
    return tokens * (queries + 2 * keys + queries + wide + outputs) * width + softmax


def block_bytes(plan: Plan, block: int, on_cpu: bool = False) -> int:
    """Bytes that one block saves: its input, and what its operations need for the backward pass."""
    norms = _norms_and_stream(plan, on_cpu, trains(f"blocks.{block}.input_norm.weight", plan.engine.freeze))
    return norms + _attention(plan, on_cpu) + _feed_forward(plan) + _inputs_of_products(plan, block, on_cpu)


def _inputs_of_products(plan: Plan, block: int, on_cpu: bool) -> int:
    """Bytes of the inputs of linear layers that the gradients of these and of their adapters need.

    An adapter also saves its product with A and, with dropout, an input of its own and the mask: a byte an element, on
    a CPU an element of the same type.
    """
    model, tokens, width = plan.model, tokens_on_rank(plan), WIDTH[plan.engine.precision]
    hidden, mixed = stream_tokens(plan) * model.hidden_size, tokens * model.num_attention_heads * model.head_size
    wide = tokens * model.ffn_hidden_size
    always = plan.layout.sequence_parallel or model.float8  # even where the weight is frozen
    first, second = (
        ("attention.query_key_value",),
        ("mlp.gate", "mlp.up") if is_gated(model.activation) else ("mlp.up",),
    )
    # layers of the same input, its elements, and whether it is saved in any case, here or by another operation
    inputs = [(first, hidden, always), (second, hidden, always)]
    if model.tied_norm:
        inputs = [((*first, *second), hidden, always)]
    by_activation = not is_gated(model.activation) and SAVED_BY_ACTIVATION.get(model.activation, 1) == 0
    inputs.append((("mlp.down",), wide // plan.layout.tensor, by_activation or model.float8))
    rank, dropout = (model.lora.rank, model.lora.dropout) if model.lora else (0, 0.0)
    dropped = width + (width if on_cpu else 1)
    adapted, saved = [adapter.layer for adapter in adapters_of(model, block)], 0
    for layers, elements, in_any_case in inputs:
        weights = any(trains(f"blocks.{block}.{layer}.weight", plan.engine.freeze) for layer in layers)
        adapters = sum(layer in layers for layer in adapted)
        if weights or in_any_case or (adapters and not dropout):
            saved += elements * width
        if dropout:
            saved += adapters * elements * dropped
    if dropout:
        saved += adapted.count("attention.dense") * mixed // plan.layout.tensor * dropped
    return saved + len(adapted) * rank * tokens * width


def _norms_and_stream(plan: Plan, on_cpu: bool, trained: bool) -> int:
    """trained: whether the weights of norms are."""
    model, tokens = plan.model, stream_tokens(plan)
    inputs = 1 if model.tied_norm else 2  # of attention and feed-forward layer
    streams = 1 if model.parallel_residual else 2  # inputs of the norms that differ
    norms, normed = (4, 4) if model.norm_placement == "both" else (inputs, streams)
    dropped = streams * tokens * model.hidden_size if model.hidden_dropout else 0  # masks, a byte each
    return _norm_inputs(plan, norms, normed, on_cpu, trained) + norms * _statistics(plan) + dropped


def _norm_inputs(plan: Plan, norms: int, inputs: int, on_cpu: bool, trained: bool = True) -> int:
    """Bytes that norms save of elements. inputs: distinct input tensors."""
    elements, width = stream_tokens(plan) * plan.model.hidden_size, WIDTH[plan.engine.precision]
    norm = plan.model.norm
    composed = norm == "scalenorm" or (on_cpu and norm in ("rmsnorm", "rmsnorm_1p"))
    copied = width < 4 and (composed or norm == "rmsnorm_1p")  # each norm makes its own fp32 copy
    results = norms * elements * 4 if composed and trained else 0  # before the weight
    return results + (norms * elements * 4 if copied else inputs * elements * width)


def _statistics(plan: Plan) -> int:
    """Bytes of the statistics of every token, in fp32."""
    return stream_tokens(plan) * (4 if plan.model.norm in ("rmsnorm", "rmsnorm_1p") else 8)


def _attention(plan: Plan, on_cpu: bool) -> int:
    model, tokens, width = plan.model, tokens_on_rank(plan), WIDTH[plan.engine.precision]
    queries = model.num_attention_heads * model.head_size // plan.layout.tensor
    kv_heads = model.kv_heads_on_rank(plan.layout.tensor, plan.layout.context)
    keys = kv_heads * model.head_size
    elements = queries + 2 * keys + queries  # the fused projection, of which the values are a view; the result
    if model.position_embedding == "rotary" or model.qk_norm is not None:
        elements += queries + keys  # rotated, or scaled by the norm's weight
    if plan.layout.context > 1:  # queries, keys, values and result, exchanged
        elements = queries + 2 * keys + 2 * queries
    if kv_heads > plan.layout.context and model.queries_per_key(plan.layout.tensor * plan.layout.context) > 1:
        elements += queries  # queries, regrouped
    if model.clip_qkv is not None:
        elements += queries + 2 * keys  # before they are clamped
    rows = tokens if not _composes_scores(plan, on_cpu) else 0  # sums of the softmax, of which blocks store none
    rows += plan.batch.sequence_length // plan.layout.context if has_score_bias(model) else 0  # the table of the bias
    softmax = 4 * rows * model.num_attention_heads // plan.layout.tensor
    masked = sum(kind == "local" for kind in model.attention_kinds) / model.num_layers
    mask = round(masked * plan.batch.sequence_length**2 * width) if _needs_mask(plan, on_cpu) else 0
    return tokens * elements * width + softmax + mask + _query_key_norm(plan)


def has_score_bias(model: ModelPlan) -> bool:
    """Whether the position embedding is a bias of the attention scores; a plugin's is taken not to be one."""
    return model.position_embedding in ("alibi", "alibi_bf16", "rpe")


def _composes_scores(plan: Plan, on_cpu: bool) -> bool:
    """Whether attention is computed in blocks of queries as products (model/composed_attention.py)."""
    changed = plan.model.attention_softcap is not None or has_score_bias(plan.model)
    return changed and not _has_flex_attention(plan, on_cpu)


def _has_flex_attention(plan: Plan, on_cpu: bool) -> bool:
    """Whether attention by blocks is FlexAttention's, which needs neither a mask nor scores in memory."""
    return not on_cpu and plan.model.head_size >= 16 and not plan.model.attention_dropout


def _query_key_norm(plan: Plan) -> int:
    """Bytes saved by the norms of queries and keys: normalized heads, statistics, and copies in fp32."""
    model, tokens, width = plan.model, tokens_on_rank(plan), WIDTH[plan.engine.precision]
    if model.qk_norm is None:
        return 0
    together, centred = model.qk_norm == "full", model.norm == "layernorm"
    result = 4 if model.norm == "rmsnorm_1p" else width
    copied = (together and (centred or width < 4)) or result > width
    statistics = 0 if together else 8 if centred else 4
    kv_heads = model.kv_heads_on_rank(plan.layout.tensor, plan.layout.context)
    heads = model.num_attention_heads // plan.layout.tensor + kv_heads
    return tokens * heads * (model.head_size * (result + 4 * copied) + statistics)


def _needs_mask(plan: Plan, on_cpu: bool) -> bool:
    """Whether sliding windows need a mask; attention by blocks does not (model/attention_kernels.py)."""
    by_blocks = _has_flex_attention(plan, on_cpu) or _composes_scores(plan, on_cpu)
    return not by_blocks and (plan.model.sliding_window or plan.batch.sequence_length) < plan.batch.sequence_length


# Tensors that an activation saves besides the input of the next product; the others save their input.
SAVED_BY_ACTIVATION = {"relu": 0, "reglu": 0, "glu": 0, "bilinear": 0, "softsign": 2}


def _feed_forward(plan: Plan) -> int:
    """Bytes saved by the activation; gated: its result and up as well."""
    saved = (2 if is_gated(plan.model.activation) else 0) + SAVED_BY_ACTIVATION.get(plan.model.activation, 1)
    width = plan.model.ffn_hidden_size // plan.layout.tensor
    return saved * tokens_on_rank(plan) * width * WIDTH[plan.engine.precision]


def gradients_in_flight(plan: Plan, on_cpu: bool = False) -> int:
    """Bytes of activation gradients in the backward pass of a block, at its peak.

    That is in the feed-forward layer, or where attention computes the scores of a block of queries with products.
    """
    wide = (3 if is_gated(plan.model.activation) else 2) * plan.model.ffn_hidden_size // plan.layout.tensor
    hidden = plan.model.hidden_size * (2 if plan.layout.sequence_parallel else 1)  # gathered inputs and their gradient
    feed_forward = tokens_on_rank(plan) * (wide + hidden) * WIDTH[plan.engine.precision]
    scores = _scores_in_flight(plan) if _composes_scores(plan, on_cpu) else 0
    return max(feed_forward, scores, _float8_casts(plan))


def _float8_casts(plan: Plan) -> int:
    """Bytes while the gradient of a layer into the feed-forward width is cast to float8: itself, and two fp32 copies.

    A gated layer has two such gradients. Compiled code casts without copies: its operands, of one byte, take no more
    than the gradients that are gone by then.
    """
    if not plan.model.float8 or plan.engine.compile:
        return 0
    gradients = (2 if is_gated(plan.model.activation) else 1) * WIDTH[plan.engine.precision]
    return tokens_on_rank(plan) * plan.model.ffn_hidden_size // plan.layout.tensor * (gradients + 2 * 4)


def _scores_in_flight(plan: Plan) -> int:
    """Bytes of the scores of a block of queries and of what is computed with them, and of the gradients in fp32."""
    model, length, ranks = plan.model, plan.batch.sequence_length, plan.layout.tensor * plan.layout.context
    scores = plan.batch.micro_size * model.num_attention_heads // ranks * min(SCORE_BLOCK, length) * length
    kv_heads = model.kv_heads_on_rank(plan.layout.tensor, plan.layout.context) // plan.layout.context
    keys = 2 * plan.batch.micro_size * length * kv_heads * model.head_size
    tensors = SCORE_TENSORS + 2 * (model.attention_softcap is not None)
    return 4 * (tensors * scores + 2 * keys)
