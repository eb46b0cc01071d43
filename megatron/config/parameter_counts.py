"""Parameter counts of a model and of one rank, and checkpoint size.

Arithmetic on sizes, so that --dry-run needs no torch. A test compares it with real models.
Letters: h hidden size, f feed-forward width, n query heads, g key/value heads, d head size.
"""

from collections.abc import Iterable
from dataclasses import replace

from megatron.config.parameter_shapes import adapter_shapes, trained_parameters
from megatron.config.plan import ModelPlan, Plan
from megatron.config.widths import is_gated

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of a weight
MOMENTS = {"sgd": 1}  # optimizer states per parameter; 2 for all others


def parameter_count(model: ModelPlan) -> int:
    """Parameters of the whole model without the padding of the vocabulary, as in a checkpoint."""
    head = 0 if model.tied_embeddings else model.vocab_size * (model.hidden_size + model.head_bias)
    head += _norm(model) * model.embedding_norm
    ends = (model.vocab_size + _positions(model)) * model.hidden_size + _norm(model) + head
    return ends + model.num_layers * _block(model, split=1)


def embedding_parameters(model: ModelPlan) -> int:
    """Parameters of token and position embeddings."""
    return (model.vocab_size + _positions(model)) * model.hidden_size


def layer_parameters(model: ModelPlan, split: int = 1) -> list[int]:
    """Parameters of each layer in the memory of one of `split` tensor-parallel ranks: embedding, blocks, norm, head."""
    rows = model.padded_vocab_size // split
    embedding, head = rows * model.hidden_size, rows * (model.hidden_size + model.head_bias)
    embedding += _positions(model) * model.hidden_size + _norm(model) * model.embedding_norm
    inside = _block(model, split)
    blocks = [inside + _adapters(model, layer, split) for layer in range(model.num_layers)]
    return [embedding, *blocks, _norm(model), head]


def _adapters(model: ModelPlan, layer: int, split: int) -> int:
    return sum(shape.elements(split) for shape in adapter_shapes(model, layer).values())


def held_parameters(model: ModelPlan, split: int, layers: Iterable[int]) -> int:
    """Parameters of some layers in the memory of one rank; tied embedding and head on the same rank count once."""
    held, counts = set(layers), layer_parameters(model, split)
    shared = model.tied_embeddings and {0, len(counts) - 1} <= held
    return sum(counts[layer] for layer in held) - (counts[-1] if shared else 0)


def product_weights(model: ModelPlan, split: int = 1) -> int:
    """Weights of a block's matrices, on one of `split` tensor-parallel ranks: each is one multiply-add per token."""
    queries = model.num_attention_heads * model.head_size
    fused = queries + 2 * model.num_kv_heads * model.head_size
    inner = (2 if is_gated(model.activation) else 1) * model.ffn_hidden_size
    return (fused + queries) * model.hidden_size // split + (inner + model.ffn_hidden_size) * model.hidden_size // split


def trained_count(plan: Plan) -> int:
    """Parameters of the whole model that train, without the padding of the vocabulary."""
    whole = replace(plan.model, padded_vocab_size=plan.model.vocab_size)
    if not plan.engine.freeze:
        return parameter_count(whole)
    return trained_parameters(whole, plan.engine.freeze, 1, range(whole.num_layers + 3))


def held_trained(plan: Plan, layers: Iterable[int]) -> int:
    """Parameters of some layers that train, in the memory of one rank."""
    model, freeze, split = plan.model, plan.engine.freeze, plan.layout.tensor
    return trained_parameters(model, freeze, split, layers) if freeze else held_parameters(model, split, layers)


def checkpoint_bytes(plan: Plan) -> int:
    """Bytes of a checkpoint: fp32 weights and moments, 12 per parameter with Adam; of frozen ones the weights alone.

    With LoRA the adapters alone.
    """
    trained = trained_count(plan)
    frozen = (parameter_count(plan.model) - trained) * WIDTH[plan.engine.precision]
    stored = frozen if plan.model.lora is None else 0
    return 4 * (1 + MOMENTS.get(plan.optimizer.kind, 2)) * trained + stored


def _positions(model: ModelPlan) -> int:
    """Rows of the learned table of positions."""
    return model.max_position_embeddings + model.position_offset if model.position_embedding == "learned" else 0


def _norm(model: ModelPlan) -> int:
    """Parameters of one norm; a plugin's is taken to have a weight and a bias."""
    if model.norm == "scalenorm":
        return 1
    vectors = {"rmsnorm": 1, "rmsnorm_1p": 1, "non_parametric_layernorm": 0, "layernorm": 1 + model.norm_bias}
    return model.hidden_size * vectors.get(model.norm, 2)


def _block(model: ModelPlan, split: int) -> int:
    """Parameters of one block on one of `split` tensor-parallel ranks; replicated ones count in full."""
    hidden, fused = model.hidden_size, (model.num_attention_heads + 2 * model.num_kv_heads) * model.head_size
    inner = (2 if is_gated(model.activation) else 1) * model.ffn_hidden_size
    biases = fused // split * model.bias_in_query_key_value + hidden * model.bias_in_dense
    biases += (inner // split + hidden) * model.bias_in_mlp
    norms = (1 if model.tied_norm else 4 if model.norm_placement == "both" else 2) * _norm(model)
    table = model.relative_buckets * model.num_attention_heads // split if model.position_embedding == "rpe" else 0
    return product_weights(model, split) + biases + norms + _query_key_norm(model, split) + table


def _query_key_norm(model: ModelPlan, split: int) -> int:
    """Parameters of the norms of queries and keys in one block."""
    if model.qk_norm is None:
        return 0
    heads = 2 if model.qk_norm == "head" else (model.num_attention_heads + model.num_kv_heads) // split
    has_bias = model.norm == "layernorm" and model.norm_bias and model.qk_norm != "each_head"
    return heads * model.head_size * (1 + has_bias)
