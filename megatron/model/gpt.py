"""GPT as a list of layers, from embedding to logits or loss: the file to read first.

Shapes: b micro-batch, s sequence, h hidden, v vocabulary in memory, tp tensor-parallel ranks.
tokens [b, s] -> Embedding -> [b, s, h] -> TransformerBlock x num_layers -> FinalNorm -> Head -> logits [b, s, v/tp],
or with targets the loss, of which no logits are stored (parallel/cross_entropy.py).
Where documents are kept apart, document starts accompany the hidden states (`layer.LayerInput`).
"""

from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from megatron.config.parameter_shapes import is_adapter
from megatron.config.plan import ModelPlan
from megatron.model.adapters import attach_adapters
from megatron.model.block import TransformerBlock
from megatron.model.embedding_and_head import Embedding, FinalNorm, Head, apply_head
from megatron.model.layer import Layer
from megatron.model.positions import PositionEmbedding, rotations
from megatron.parallel.collectives import gather_from_group
from megatron.parallel.grid import LoneGrid, ParallelGrid
from megatron.parallel.parameter import PlacedParameter, name_parameters
from megatron.registry import resolve


def gpt_layers(model: ModelPlan, grid: ParallelGrid, seed: int | None, adapter_seed: int | None = None) -> list[Layer]:
    """The layers of the whole model, in order; memory is allocated when a layer is built.

    seed: with a parameter's name it determines the initial value, the same under every layout. An engine draws it;
    None: the values are loaded, and zero until then. adapter_seed: that of adapters, if they are not loaded with them.
    """
    kind: PositionEmbedding = resolve("position_embedding", model.position_embedding)

    def layer(module_class: type[nn.Module], name: str, *arguments: Any, **options: Any) -> Layer:
        build = partial(_build, module_class, name, (seed, adapter_seed), model, grid, *arguments)
        return Layer(module_class, build, **options)

    blocks = [
        layer(TransformerBlock, f"blocks.{i}", i, rotation, recompute=True)
        for i, rotation in enumerate(rotations(kind, model, grid))
    ]
    if model.tied_embeddings:
        first = layer(Embedding, "embedding", kind, tied="embedding")
        # on a separate stage, the last layer needs no position embedding
        last = layer(Embedding, "embedding", None, tied="embedding", tied_forward=apply_head)
    else:
        first, last = layer(Embedding, "embedding", kind), layer(Head, "head")
    return [first, *blocks, layer(FinalNorm, ""), last]


def parameter_shapes(model: ModelPlan) -> dict[str, tuple[int, ...]]:
    """The whole shape of every parameter by its global name, in the order of the layers; no memory is allocated."""
    shapes = {}
    for layer in gpt_layers(model, LoneGrid("meta"), seed=None):
        for parameter in layer.build().parameters():
            placed = cast(PlacedParameter, parameter)
            shapes[placed.global_name] = placed.global_shape
    return shapes


def _build(
    module_class: type[nn.Module],
    name: str,
    seeds: tuple[int | None, int | None],
    model: ModelPlan,
    grid: ParallelGrid,
    *arguments: Any,
) -> nn.Module:
    module, (seed, adapter_seed) = module_class(model, grid, *arguments), seeds
    attach_adapters(module, name, model, grid)
    name_parameters(module, name, seed)
    if seed is None:
        for parameter in module.parameters():
            placed = cast(PlacedParameter, parameter)
            placed.seed = adapter_seed if is_adapter(placed.global_name) else None
    return module


def gather_logits(logits: Tensor, grid: ParallelGrid, vocab_size: int) -> Tensor:
    """Logits [b, s, v/tp] of this rank -> [b, s, vocab_size] without vocabulary padding. One all-gather."""
    return gather_from_group(logits, grid.group("tensor"))[..., :vocab_size]
