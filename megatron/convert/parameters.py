"""The parameters of one of our models and those of a Hugging Face model: one table for both directions.

Our names are global names; tensors are unsharded and without vocabulary padding. Entries only move elements, so a round
trip is bit exact, and each entry stands alone, so that a model can be converted tensor by tensor.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.config.plan import ModelPlan
from megatron.config.widths import is_gated
from megatron.errors import UserError


@dataclass(frozen=True)
class Entry:
    """Some of our parameters, and their parameters with the same elements; one of both sides is a single tensor."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    join: Callable[[Sequence[Tensor]], Sequence[Tensor]]  # theirs -> ours, views where possible
    split: Callable[[Sequence[Tensor]], Sequence[Tensor]]  # ours -> theirs


@dataclass(frozen=True)
class Module:
    """How one of our modules stands among theirs: the entries of its weight and of its bias.

    entry: from our module's name, their name, "weight" or "bias", and the model.
    """

    theirs: str
    entry: Callable[[str, str, str, ModelPlan], Entry]


def same(theirs: str) -> Module:
    """The same tensors under another name."""

    def entry(ours: str, theirs: str, kind: str, model: ModelPlan) -> Entry:
        return Entry((f"{ours}.{kind}",), (f"{theirs}.{kind}",), _unchanged, _unchanged)

    return Module(theirs, entry)


def transposed(theirs: str) -> Module:
    """A linear layer whose weight they store as [inputs, outputs]."""

    def entry(ours: str, theirs: str, kind: str, model: ModelPlan) -> Entry:
        change = _transposed if kind == "weight" else _unchanged
        return Entry((f"{ours}.{kind}",), (f"{theirs}.{kind}",), change, change)

    return Module(theirs, entry)


def separate_heads(theirs: str, names: Sequence[str] = ("q_proj", "k_proj", "v_proj")) -> Module:
    """Queries, keys and values from three layers in the module `theirs`, each with its heads in order."""

    def entry(ours: str, theirs: str, kind: str, model: ModelPlan) -> Entry:
        return Entry(
            (f"{ours}.{kind}",),
            tuple(f"{theirs}.{name}.{kind}" for name in names),
            lambda tensors: (_group_heads(tensors, model),),
            lambda tensors: _separate_heads(tensors[0], model),
        )

    return Module(theirs, entry)


def fused_heads(theirs: str, *, inputs_first: bool = False) -> Module:
    """One layer whose outputs are all queries, then all keys, then all values.

    inputs_first: its weight is stored as [inputs, outputs].
    """

    def entry(ours: str, theirs: str, kind: str, model: ModelPlan) -> Entry:
        turn = _transposed if inputs_first and kind == "weight" else _unchanged
        sizes = [heads * model.head_size for heads in (model.num_attention_heads, *(model.num_kv_heads,) * 2)]
        return Entry(
            (f"{ours}.{kind}",),
            (f"{theirs}.{kind}",),
            lambda tensors: (_group_heads(turn(tensors)[0].split(sizes), model),),
            lambda tensors: turn((torch.cat(_separate_heads(tensors[0], model)),)),
        )

    return Module(theirs, entry)


def fused_gate(theirs: str) -> Module:
    """Our modules "mlp.gate+mlp.up": one layer of theirs, whose outputs are first the gate's, then those of up."""

    def entry(ours: str, theirs: str, kind: str, model: ModelPlan) -> Entry:
        return Entry(
            tuple(f"{name}.{kind}" for name in ours.split("+")),
            (f"{theirs}.{kind}",),
            lambda tensors: tensors[0].chunk(2),
            lambda tensors: (torch.cat(tuple(tensors)),),
        )

    return Module(theirs, entry)


def weights_of_heads(theirs: str) -> Module:
    """A norm's weights of all heads, which they store as [heads, size]."""

    def entry(ours: str, theirs: str, kind: str, model: ModelPlan) -> Entry:
        return Entry(
            (f"{ours}.{kind}",),
            (f"{theirs}.{kind}",),
            lambda tensors: (tensors[0].flatten(),),
            lambda tensors: (tensors[0].unflatten(0, (-1, model.head_size)),),
        )

    return Module(theirs, entry)


def norms_of_heads(theirs: str) -> Module:
    """A norm's weights of all heads, of which they have a list."""

    def entry(ours: str, theirs: str, kind: str, model: ModelPlan) -> Entry:
        heads = model.num_attention_heads if ours.endswith("query") else model.num_kv_heads
        return Entry(
            (f"{ours}.{kind}",),
            tuple(f"{theirs}.{head}.{kind}" for head in range(heads)),
            lambda tensors: (torch.cat(tuple(tensors)),),
            lambda tensors: tensors[0].split(model.head_size),
        )

    return Module(theirs, entry)


def either(choose: Callable[[ModelPlan], str]) -> Module:
    """The same tensors, under a name that depends on the model."""

    def entry(ours: str, theirs: str, kind: str, model: ModelPlan) -> Entry:
        return same("").entry(ours, theirs + choose(model), kind, model)

    return Module("", entry)


def _unchanged(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors


def _transposed(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensor.t() for tensor in tensors]


def _group_heads(tensors: Sequence[Tensor], model: ModelPlan) -> Tensor:
    """Queries, keys and values, each with its heads in order -> for each key/value head its queries, key and value."""
    grouped = [tensor.reshape(model.num_kv_heads, -1, *tensor.shape[1:]) for tensor in tensors]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _separate_heads(tensor: Tensor, model: ModelPlan) -> list[Tensor]:
    """The inverse of `_group_heads`."""
    groups, size = model.num_kv_heads, model.head_size
    share = model.num_attention_heads // groups
    grouped = tensor.reshape(groups, (share + 2) * size, *tensor.shape[1:])
    return [part.flatten(0, 1) for part in grouped.split([share * size, size, size], dim=1)]


@dataclass(frozen=True)
class ParameterMap:
    """The entries for all parameters of a model.

    prefix: with which all of their names but the head's begin, and which some published files leave out.
    ignored: ends of their names without content of their own, such as buffers and a tied head.
    in_files: names that files have for parameters that transformers names otherwise in memory.
    """

    entries: Sequence[Entry]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    in_files: Mapping[str, str] = field(default_factory=dict)

    def find(self, stored: Iterable[str]) -> dict[str, str]:
        """Their names in the entries -> the names in files that hold the tensors `stored`.

        Raises UserError for missing names and for names without a counterpart: no weight is dropped silently.
        """
        required = {name for entry in self.entries for name in entry.theirs}
        in_memory = {stored_name: name for name, stored_name in self.in_files.items()}
        found, unknown = {}, []
        for name in stored:
            whole = in_memory.get(name, name)
            whole = whole if whole in required or whole.startswith(self.prefix) else self.prefix + whole
            if whole in required:
                found[whole] = name
            elif not whole.endswith(self.ignored):
                unknown.append(name)
        problems = [f"{name}: not among the stored tensors" for name in sorted(required - set(found))]
        problems += [f"{name}: has no counterpart in our model" for name in sorted(unknown)]
        if problems:
            raise UserError(*problems)
        return found

    def from_hugging_face(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their parameters -> ours. Raises UserError as `find` does."""
        found = self.find(state)
        return {
            name: part.contiguous()
            for entry in self.entries
            for name, part in zip(entry.ours, entry.join([state[found[t]] for t in entry.theirs]), strict=True)
        }

    def to_hugging_face(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our parameters -> theirs. Raises UserError if a name is missing or unknown."""
        different = {name for entry in self.entries for name in entry.ours} ^ set(state)
        if different:
            raise UserError(f"missing in the model or in its map to Hugging Face: {', '.join(sorted(different))}")
        return {
            name: part.contiguous()
            for entry in self.entries
            for name, part in zip(entry.theirs, entry.split([state[ours] for ours in entry.ours]), strict=True)
        }


WEIGHT, BOTH = ("weight",), ("weight", "bias")


def tensors_around_the_blocks(model: ModelPlan) -> dict[str, tuple[str, ...]]:
    """Our modules outside the blocks, and the parameters of each."""
    modules = {"embedding": WEIGHT, "final_norm": _norm(model)}
    if model.position_embedding == "learned":
        modules["embedding.positions"] = WEIGHT
    if model.embedding_norm:
        modules["embedding.norm"] = _norm(model)
    if not model.tied_embeddings:
        modules["head"] = BOTH if model.head_bias else WEIGHT
    return modules


def tensors_of_a_block(model: ModelPlan) -> dict[str, tuple[str, ...]]:
    """Our modules in a block, and the parameters of each."""
    norms = {"input": ("input_norm", "post_attention_norm"), "output": ("post_attention_norm", "post_mlp_norm")}
    named = norms.get(model.norm_placement, ("input_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm"))
    modules = dict.fromkeys(named[:1] if model.parallel_residual and model.tied_norm else named, _norm(model))
    modules["attention.query_key_value"] = BOTH if model.bias_in_query_key_value else WEIGHT
    modules["attention.dense"] = BOTH if model.bias_in_dense else WEIGHT
    if model.qk_norm is not None:
        kinds = WEIGHT if model.qk_norm == "each_head" else _norm(model)
        modules |= {"attention.norm.query": kinds, "attention.norm.key": kinds}
    if model.position_embedding == "rpe":
        modules["attention.score_bias"] = WEIGHT
    linear = ("mlp.gate", "mlp.up", "mlp.down") if is_gated(model.activation) else ("mlp.up", "mlp.down")
    return modules | dict.fromkeys(linear, BOTH if model.bias_in_mlp else WEIGHT)


def _norm(model: ModelPlan) -> tuple[str, ...]:
    if model.norm == "non_parametric_layernorm":
        return ()
    return BOTH if model.norm == "layernorm" and model.norm_bias else WEIGHT
