"""Parameter counts of a model and of one rank, and checkpoint size.

Arithmetic on sizes, so that --dry-run needs no torch. A test compares it with real models.
"""

from collections.abc import Iterable
from dataclasses import replace

from megatron.config.parameter_shapes import (
    Shapes,
    adapter_shapes,
    block_shapes,
    embedding_shapes,
    head_shapes,
    norm_shapes,
    trained_parameters,
)
from megatron.config.plan import ModelPlan, Plan
from megatron.config.widths import is_gated

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of a weight
MOMENTS = {"sgd": 1}  # optimizer states per parameter; 2 for all others


def parameter_count(model: ModelPlan) -> int:
    """Parameters of the whole model without the padding of the vocabulary and without adapters."""
    whole = replace(model, padded_vocab_size=model.vocab_size)
    ends = embedding_shapes(whole) | norm_shapes("final_norm", whole) | head_shapes(whole)
    return _elements(ends) + model.num_layers * _elements(block_shapes(whole))


def embedding_parameters(model: ModelPlan) -> int:
    """Parameters of token and position embeddings, and of their norm."""
    return _elements(embedding_shapes(replace(model, padded_vocab_size=model.vocab_size)))


def layer_parameters(model: ModelPlan, split: int = 1) -> list[int]:
    """Parameters of each layer in the memory of one of `split` tensor-parallel ranks: embedding, blocks, norm, head."""
    inside = _elements(block_shapes(model), split)
    blocks = [inside + _elements(adapter_shapes(model, layer), split) for layer in range(model.num_layers)]
    ends = (embedding_shapes(model), norm_shapes("final_norm", model), head_shapes(model))
    embedding, norm, head = (_elements(shapes, split) for shapes in ends)
    return [embedding, *blocks, norm, head]


def _elements(shapes: Shapes, split: int = 1) -> int:
    return sum(shape.elements(split) for shape in shapes.values())


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
