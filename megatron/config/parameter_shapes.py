"""The parameters of a model by global name: their shapes, and which of them train.

Arithmetic on a plan, so that patterns are checked and trained parameters counted before torch is imported. A test
compares it with real models. h hidden size, f feed-forward width, d head size.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron.config.plan import ModelPlan
from megatron.config.widths import is_gated
from megatron.registry import nearest


@dataclass(frozen=True)
class Shape:
    """The sizes of a whole parameter in memory, and the dimension that tensor parallelism shards; None: replicated."""

    sizes: tuple[int, ...]
    shard_dim: int | None

    def elements(self, split: int = 1) -> int:
        """Elements on one of `split` tensor-parallel ranks."""
        return math.prod(self.sizes) // (1 if self.shard_dim is None else split)


Shapes = dict[str, Shape]
ALL_BUT_ADAPTERS = r"^(?!.*\.lora\.).*"  # what LoRA freezes


def layer_shapes(model: ModelPlan) -> list[Shapes]:
    """The parameters of each layer: embedding, blocks, final norm, head. A tied head has the embedding's weight."""
    inside = block_shapes(model)
    blocks = [
        {f"blocks.{layer}.{name}": shape for name, shape in (inside | adapter_shapes(model, layer)).items()}
        for layer in range(model.num_layers)
    ]
    return [embedding_shapes(model), *blocks, norm_shapes("final_norm", model), head_shapes(model)]


def embedding_shapes(model: ModelPlan) -> Shapes:
    """The parameters of the embedding: of tokens and, if learned, positions, and of its norm."""
    embedding = {"embedding.weight": Shape((model.padded_vocab_size, model.hidden_size), 0)}
    if model.position_embedding == "learned":
        positions = model.max_position_embeddings + model.position_offset
        embedding["embedding.positions.weight"] = Shape((positions, model.hidden_size), None)
    return embedding | (norm_shapes("embedding.norm", model) if model.embedding_norm else {})


def head_shapes(model: ModelPlan) -> Shapes:
    """The parameters of the head; a tied one has the embedding's weight."""
    name = "embedding" if model.tied_embeddings else "head"
    head = {f"{name}.weight": Shape((model.padded_vocab_size, model.hidden_size), 0)}
    return head | ({"head.bias": Shape((model.padded_vocab_size,), 0)} if model.head_bias else {})


def norm_shapes(name: str, model: ModelPlan) -> Shapes:
    """The parameters of a norm over h; a plugin's is taken to have a weight and a bias."""
    if model.norm == "non_parametric_layernorm":
        return {}
    shapes = {f"{name}.weight": Shape((1 if model.norm == "scalenorm" else model.hidden_size,), None)}
    if model.norm not in ("rmsnorm", "rmsnorm_1p", "scalenorm") and model.norm_bias:
        shapes[f"{name}.bias"] = Shape((model.hidden_size,), None)
    return shapes


def _linear(name: str, outputs: int, inputs: int, bias: bool, shard_dim: int) -> Shapes:
    shapes = {f"{name}.weight": Shape((outputs, inputs), shard_dim)}
    return shapes | ({f"{name}.bias": Shape((outputs,), None if shard_dim else 0)} if bias else {})


def block_shapes(model: ModelPlan) -> Shapes:
    """The parameters of a block by their name in it, without adapters."""
    hidden, wide = model.hidden_size, model.ffn_hidden_size
    queries, keys = model.num_attention_heads * model.head_size, model.num_kv_heads * model.head_size
    shapes: Shapes = {}
    for name in norms_of_a_block(model):
        shapes |= norm_shapes(name, model)
    shapes |= _linear("attention.query_key_value", queries + 2 * keys, hidden, model.bias_in_query_key_value, 0)
    shapes |= _linear("attention.dense", hidden, queries, model.bias_in_dense, 1)
    if model.position_embedding == "rpe":
        shapes["attention.score_bias.weight"] = Shape((model.relative_buckets, model.num_attention_heads), 1)
    if model.qk_norm is not None:
        shared = model.qk_norm == "head"
        biased = model.norm == "layernorm" and model.norm_bias and model.qk_norm != "each_head"
        kinds = ("weight", "bias") if biased else ("weight",)
        for name, width in (("query", queries), ("key", keys)):
            shape = Shape((model.head_size if shared else width,), None if shared else 0)
            shapes |= {f"attention.norm.{name}.{kind}": shape for kind in kinds}
    for name in ("mlp.gate", "mlp.up") if is_gated(model.activation) else ("mlp.up",):
        shapes |= _linear(name, wide, hidden, model.bias_in_mlp, 0)
    return shapes | _linear("mlp.down", hidden, wide, model.bias_in_mlp, 1)


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter of a linear layer of a block."""

    layer: str  # the name in the block
    part: str | None  # of the fused layer: query, key or value; None: of the whole layer
    inputs: int
    outputs: int
    outputs_are_sharded: bool  # by tensor parallelism; else the inputs are

    @property
    def name(self) -> str:
        """The name in the block, of which A and B are `.a` and `.b`."""
        return f"{self.layer}.lora" + (f".{self.part}" if self.part else "")


def adapters_of(model: ModelPlan, layer: int) -> list[Adapter]:
    """The adapters of a block, by `model.lora.targets`.

    A pattern is compared with the global names of linear layers. Queries, keys and values are attention.query, .key and
    .value; where a pattern is attention.query_key_value, one adapter serves them all.
    """
    if model.lora is None:
        return []
    fused = "attention.query_key_value"
    queries, keys = model.num_attention_heads * model.head_size, model.num_kv_heads * model.head_size
    hidden, wide = model.hidden_size, model.ffn_hidden_size
    adapters = [Adapter(fused, None, hidden, queries + 2 * keys, True)]
    if not _is_target(model.lora.targets, layer, fused):
        widths = {"query": queries, "key": keys, "value": keys}
        adapters = [Adapter(fused, part, hidden, width, True) for part, width in widths.items()]
    adapters.append(Adapter("attention.dense", None, queries, hidden, False))
    gated = ("mlp.gate", "mlp.up") if is_gated(model.activation) else ("mlp.up",)
    adapters += [Adapter(name, None, hidden, wide, True) for name in gated]
    adapters.append(Adapter("mlp.down", None, wide, hidden, False))
    return [each for each in adapters if _is_target(model.lora.targets, layer, _target_name(each))]


def target_names(model: ModelPlan) -> list[str]:
    """The global names that a pattern of `lora.targets` may match."""
    names = ["query_key_value", "query", "key", "value", "dense"]
    inside = [f"attention.{name}" for name in names]
    inside += ["mlp.gate"] * is_gated(model.activation) + ["mlp.up", "mlp.down"]
    return [f"blocks.{layer}.{name}" for layer in range(model.num_layers) for name in inside]


def _target_name(adapter: Adapter) -> str:
    return adapter.layer if adapter.part is None else f"attention.{adapter.part}"


def _is_target(targets: Iterable[str], layer: int, name: str) -> bool:
    return any(matches(pattern, f"blocks.{layer}.{name}") for pattern in targets)


def adapter_shapes(model: ModelPlan, layer: int) -> Shapes:
    """The parameters of a block's adapters, by their name in the block."""
    shapes: Shapes = {}
    rank = model.lora.rank if model.lora else 0
    for each in adapters_of(model, layer):
        shapes[f"{each.name}.a"] = Shape((rank, each.inputs), None if each.outputs_are_sharded else 1)
        shapes[f"{each.name}.b"] = Shape((each.outputs, rank), 0 if each.outputs_are_sharded else None)
    return shapes


def is_adapter(name: str) -> bool:
    """Whether a global name, or that of a tensor in a checkpoint, belongs to an adapter."""
    return ".lora." in name


def norms_of_a_block(model: ModelPlan) -> Sequence[str]:
    """The names of the norms on the inputs and outputs of a block's branches."""
    if model.parallel_residual and model.tied_norm:
        return ("input_norm",)
    named = {"input": ("input_norm", "post_attention_norm"), "output": ("post_attention_norm", "post_mlp_norm")}
    return named.get(model.norm_placement, ("input_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm"))


def matches(pattern: str, name: str) -> bool:
    """Whether the regular expression `pattern` is one or more whole parts of a dotted `name`, anywhere in it."""
    return re.search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", name) is not None


def trains(name: str, freeze: Iterable[str]) -> bool:
    """Whether the parameter `name` trains where the patterns `freeze` do not."""
    return not any(matches(pattern, name) for pattern in freeze)


def trained_parameters(model: ModelPlan, freeze: Sequence[str], split: int, layers: Iterable[int]) -> int:
    """Parameters of some layers that train, in the memory of one of `split` ranks; a tied head counts once."""
    shapes = layer_shapes(model)
    held: Mapping[str, Shape] = {name: shape for layer in layers for name, shape in shapes[layer].items()}
    return sum(shape.elements(split) for name, shape in held.items() if trains(name, freeze))


def unmatched(key: str, patterns: Iterable[str], names: Iterable[str]) -> Iterator[str]:
    """A message for each pattern that is part of no name, with the nearest one that is."""
    known = list(names)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in known):
            near = nearest(pattern, _parts(known))
            hint = f'. Did you mean "{near}"?' if near else f"; such as: {', '.join(_examples(known))}"
            yield f'{key}: "{pattern}" matches no parameter of this model{hint}'


def _parts(names: Iterable[str]) -> dict[str, None]:
    """Everything that a pattern may name; of the blocks only the first."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        if parts[0] != "blocks" or parts[1] == "0":
            ends = range(1, len(parts) + 1)
            found |= dict.fromkeys(".".join(parts[start:end]) for end in ends for start in range(end))
    return found


def _examples(names: Sequence[str]) -> list[str]:
    return [name.rpartition(".")[0] for name in names if name.endswith(".weight")][:3]
