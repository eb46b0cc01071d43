"""How many parameters a Plan has, whole and per rank, and what they take in memory.

Floor 1: arithmetic on sizes, so that --dry-run needs no torch. A test compares it with real models.
Letters: h hidden size, f feed-forward width, n query heads, g key/value heads, d head size.
"""

from dataclasses import dataclass

from megatron.config.plan import ModelPlan, Plan
from megatron.config.widths import is_gated

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def parameter_count(model: ModelPlan) -> int:
    """Parameters of the whole model, without the padding of the vocabulary: what a checkpoint holds."""
    return _outer(model, model.vocab_size) + model.num_layers * _block(model, split=1)


def embedding_parameters(model: ModelPlan) -> int:
    """How many of them are token and position embeddings."""
    return (model.vocab_size + _positions(model)) * model.hidden_size


@dataclass(frozen=True)
class RankEstimate:
    """The rank that holds most. Bytes are of weights, gradients and optimizer, without activations."""

    parameters: int
    state_bytes: int


def largest_rank(plan: Plan) -> RankEstimate:
    """Parameters in memory on the rank that holds most, and what training takes there.

    Exact where the blocks divide evenly over the stages; else the largest share a stage can have.
    """
    model, layout = plan.model, plan.layout
    embedding = _embedding(model, layout.model)
    last = _norm(model) + model.padded_vocab_size // layout.model * model.hidden_size
    blocks = -(-model.num_layers // layout.pipe) * _block(model, layout.model)
    if layout.pipe == 1:
        most = embedding + blocks + _norm(model) + (0 if model.tied_embeddings else last - _norm(model))
    else:
        most = blocks + max(embedding, last)
    return RankEstimate(most, _state_bytes(plan, most))


def _state_bytes(plan: Plan, parameters: int) -> int:
    """Weights, gradients, and what the optimizer keeps: moments, and fp32 weights beside 16-bit ones."""
    width, data = BYTES[plan.engine.precision], plan.layout.data
    stage = plan.engine.zero_stage if width == 4 else max(1, plan.engine.zero_stage)  # the engine's choice for 16 bit
    moments = 4 if plan.optimizer.kind == "sgd" else 8
    sharded_from = ((width, 3), (width, 2), (moments + (0 if width == 4 else 4), 1))
    return sum(parameters * size // (data if stage >= first else 1) for size, first in sharded_from)


def _outer(model: ModelPlan, rows: int) -> int:
    """Everything but the blocks."""
    head = 0 if model.tied_embeddings else rows * model.hidden_size
    return (rows + _positions(model)) * model.hidden_size + _norm(model) + head


def _embedding(model: ModelPlan, split: int) -> int:
    return (model.padded_vocab_size // split + _positions(model)) * model.hidden_size


def _positions(model: ModelPlan) -> int:
    return model.max_position_embeddings if model.position_embedding == "learned" else 0


def _norm(model: ModelPlan) -> int:
    return model.hidden_size * (1 if model.norm == "rmsnorm" else 2)


def _block(model: ModelPlan, split: int) -> int:
    """Parameters of one block on one of `split` tensor-parallel ranks; what is not split is counted whole."""
    hidden, width = model.hidden_size, model.ffn_hidden_size
    queries = model.num_attention_heads * model.head_size
    fused = queries + 2 * model.num_kv_heads * model.head_size
    inner = (2 if is_gated(model.activation) else 1) * width
    attention = (fused + queries) * hidden // split
    feed_forward = (inner + width) * hidden // split
    biases = (fused // split + hidden) * model.bias_in_attention + (inner // split + hidden) * model.bias_in_mlp
    return attention + feed_forward + biases + (1 if model.tied_norm else 2) * _norm(model)
