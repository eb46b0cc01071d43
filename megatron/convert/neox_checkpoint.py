"""Read the checkpoints of GPT-NeoX (DeepSpeed's files), whatever layout wrote them.

A step's folder holds, for each layer and tensor-parallel rank, `layer_03-model_00-model_states.pt`; or, if the run had
pipe_parallel_size 0, for each rank one `mp_rank_00_model_states.pt` with all layers. Layers are numbered 0 for the
embedding, 2 ... L + 1 for the blocks, L + 3 for the final norm and L + 4 for the head. `configs/` holds the YAML files.

Formats read from EleutherAI/gpt-neox 2.0.0 (megatron/model/transformer.py, megatron/checkpointing.py) and older
versions: `dense_h_to_4h` was renamed to `linear1`; Llama's layers had `w1`, `w2` and `w3`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.config.load import build, merge, override_key
from megatron.config.neox.answers import ANSWERS
from megatron.config.plan import ModelPlan
from megatron.config.schema.config import Config, group_of_key
from megatron.config.widths import is_gated
from megatron.config.yaml_file import Entries, read_file
from megatron.convert.torch_file import read_torch_file
from megatron.errors import UserError

_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_SUFFIXES = {".yml", ".yaml", ".json"}

# Names in the files that hold no parameters: buffers that are computed anew.
_BUFFERS = re.compile(r"(.*\.)?(inv_freq|slopes|masked_bias|attention\.bias|cos_cached|sin_cached)")

# GPT-NeoX's keys that change what the model computes and are no keys of ours; each has its own answer.
_OF_THE_MODEL = {
    "use_qk_layernorm",
    "opt_pos_emb_offset",
    "num_unique_layers",
    "soft_prompt_tuning",
    "use_mup",
    "moe_num_experts",
    "bias_gelu_fusion",
    "onnx_safe",
    "te_columnparallel",
    "te_rowparallel",
    "te_layernorm_mlp",
    "te_mha",
    "te_fp8_mha",
} & set(ANSWERS)
# Keys of ours that the files themselves answer: widths meant different things in its versions.
_FROM_FILES = {"intermediate_size", "ffn_hidden_size", "mlp_multiple_of", "padded_vocab_size"}
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu": "reglu"}  # of Llama's layers in old versions

Merge = Callable[[Sequence[Tensor]], Tensor]  # the parts of all tensor-parallel ranks -> one of our parameters


@dataclass(frozen=True)
class Row:
    """One of our parameters, and where it is stored: the first of `sources` that the layer's files have."""

    ours: str
    shape: tuple[int, ...]
    layer: int
    sources: Mapping[str, Merge]


class NeoXFiles:
    """The files of one step."""

    def __init__(self, step: Path) -> None:
        """step: the folder. Raises UserError if it is not complete, as far as names tell."""
        self.step = step
        names = sorted(path.name for path in step.iterdir())
        layers = [match for name in names if (match := _LAYER_FILE.fullmatch(name))]
        ranks = [match for name in names if (match := _RANK_FILE.fullmatch(name))]
        if not layers and not ranks:
            raise UserError(f"{step} holds neither layer_*-model_*-model_states.pt nor mp_rank_*_model_states.pt")
        found = {int(match[2]) for match in layers} or {int(match[1]) for match in ranks}
        self.tensor_parallel_size = max(found) + 1
        self._whole: list[dict[str, Tensor]] | None = None
        missing = sorted(set(range(self.tensor_parallel_size)) - found)
        self.layers = sorted({int(match[1]) for match in layers})
        if layers:
            present = {match[0] for match in layers}
            expected = [self._layer_file(layer, rank) for layer in self.layers for rank in range(max(found) + 1)]
            problems = [f"{step / name} is missing" for name in expected if name not in present]
        else:
            problems = [f"{step / f'mp_rank_{rank:02d}_model_states.pt'} is missing" for rank in missing]
        if problems:
            more = [f"... and {len(problems) - 5} more"] if len(problems) > 5 else []
            raise UserError(*problems[:5], *more)

    def parts(self, layer: int) -> list[dict[str, Tensor]]:
        """Parameters of a layer by name, for each tensor-parallel rank; empty for a layer that has none.

        The tensors are mapped from the files. Raises UserError if a file cannot be read.
        """
        ranks = range(self.tensor_parallel_size)
        if self.layers:
            if layer not in self.layers:
                return [{} for _ in ranks]
            return [
                _tensors(path := self.step / self._layer_file(layer, rank), read_torch_file(path)) for rank in ranks
            ]
        if self._whole is None:
            paths = [self.step / f"mp_rank_{rank:02d}_model_states.pt" for rank in ranks]
            self._whole = [_module(path, read_torch_file(path)) for path in paths]
        start = f"sequential.{layer}."
        return [{n.removeprefix(start): t for n, t in whole.items() if n.startswith(start)} for whole in self._whole]

    @staticmethod
    def _layer_file(layer: int, rank: int) -> str:
        return f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"


def _module(path: Path, content: Any) -> dict[str, Tensor]:
    module = content.get("module") if isinstance(content, dict) else None
    if not isinstance(module, dict) or not module:
        raise UserError(f"{path} holds no weights: the layer_*-model_*-model_states.pt of this step have them")
    return _tensors(path, module)


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds something else than parameters by name")
    return {name: tensor for name, tensor in content.items() if not _BUFFERS.fullmatch(name)}


def find_step(path: Path) -> Path:
    """The folder of a step: `path` itself, or the one that its file `latest` names. Raises UserError if neither is."""
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    latest = path / "latest"
    if not latest.is_file() or any(_LAYER_FILE.fullmatch(each.name) for each in path.iterdir()):
        return path
    named = path / latest.read_text(encoding="utf-8", errors="replace").strip()
    if not named.is_dir():
        raise UserError(f"{latest} names {named.name}, which is not there; give the folder of a step")
    return named


def read_config(files: NeoXFiles, paths: Sequence[Path], overrides: Sequence[str]) -> Config:
    """The model and its tokenizer in our keys.

    paths: YAML files of the run; none: those in the folder `configs` of the step. overrides: "key=value". Keys of
    training are left out. Raises ConfigError, also for a model that has no counterpart here.
    """
    chosen = list(paths) or sorted(path for path in (files.step / "configs").glob("*") if path.suffix in _SUFFIXES)
    if not chosen:
        raise UserError(f"{files.step / 'configs'} has no YAML file of the run; name it with --config")
    merged = merge([read_file(path) for path in chosen])
    groups = group_of_key()
    wanted = {key for key, group in groups.items() if group in ("model", "tokenizer")} - _FROM_FILES | _OF_THE_MODEL
    merged.values = {key: value for key, value in merged.values.items() if key in wanted}
    for text in overrides:
        override_key(merged, text)
    _from_files(merged, files)
    return build(merged, " + ".join(map(str, chosen)))


def _from_files(entries: Entries, files: NeoXFiles) -> None:
    """Set the keys that the first block's parameters answer, whatever version and settings they came from."""
    keys, first = entries.values, files.parts(2)
    if not first[0]:
        raise UserError(f"{files.step} has no parameters of the first block (layer 2)")
    name = next((name for name in _DOWN if f"{name}.weight" in first[0]), None)
    if name is None:
        raise UserError(
            f"{files.step}: the first block has no feed-forward layer of a known kind: {', '.join(first[0])}"
        )
    keys["ffn_hidden_size"] = sum(part[f"{name}.weight"].shape[-1] for part in first)
    keys["use_bias_in_mlp"] = f"{name}.bias" in first[0]
    keys["use_bias_in_attn_linear"] = "attention.dense.bias" in first[0]
    if name == "mlp.w2":
        keys["activation"] = _GATED.get(keys.get("activation", "gelu"), keys.get("activation", "gelu"))
    _set_windows(entries)


def _set_windows(entries: Entries) -> None:
    """GPT-NeoX applies sliding_window_width to all layers, and does not count a query's own key."""
    keys, width = entries.values, entries.values.get("sliding_window_width")
    kinds = {kind for kinds, _ in keys.get("attention_config") or () for kind in kinds}
    if sparse := kinds - {"global", "flash"}:
        entries.problems.append(
            f"attention_config has sparse attention ({', '.join(sorted(sparse))}), which has no counterpart here; "
            'attention_config=[[["global"],"all"]] converts it as a model that attends to all tokens'
        )
    if isinstance(width, int):
        keys |= {"sliding_window_width": width + 1, "attention_config": ((("local",), "all"),)}


_DOWN = ("mlp.linear2", "mlp.dense_4h_to_h", "mlp.w2")
_NORMS = ("layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm")
_POSITIONS = ("learned", "sinusoidal", "rotary", "alibi", "none")
_UP = ("mlp.linear1", "mlp.dense_h_to_4h")


def rows(model: ModelPlan) -> list[Row]:
    """Where each of our parameters is stored. Raises UserError for a model that GPT-NeoX does not have."""
    if model.norm not in _NORMS or model.position_embedding not in _POSITIONS:
        raise UserError(f"norm {model.norm} with pos_emb {model.position_embedding} cannot be converted from GPT-NeoX")
    hidden, vocabulary = model.hidden_size, model.vocab_size
    last = model.num_layers + 3

    def cut(parts: Sequence[Tensor]) -> Tensor:
        return _rows(parts)[:vocabulary]

    found = [Row("embedding.weight", (vocabulary, hidden), 0, {"word_embeddings.weight": cut})]
    if model.position_embedding == "learned":
        table = (model.max_position_embeddings + model.position_offset, hidden)
        found.append(Row("embedding.positions.weight", table, 0, {"position_embeddings.weight": _one_of_equals}))
    for index in range(model.num_layers):
        found += _block(f"blocks.{index}", index + 2, model)
    found += _norm("final_norm", last, "norm", model)
    if not model.tied_embeddings:
        found.append(Row("head.weight", (vocabulary, hidden), last + 1, {"final_linear.weight": cut}))
    return found


def _block(ours: str, layer: int, model: ModelPlan) -> list[Row]:
    hidden, inner = model.hidden_size, model.num_attention_heads * model.head_size
    fused = inner + 2 * model.num_kv_heads * model.head_size
    heads = partial(_heads, model) if model.num_kv_heads < model.num_attention_heads else _rows
    # with a parallel residual each rank adds its bias before the sum over ranks, else all add the same one after it
    bias = _sum if model.parallel_residual else _one_of_equals

    def matrix(name: str, shape: tuple[int, int], sources: Mapping[str, Merge]) -> Row:
        return Row(f"{ours}.{name}.weight", shape, layer, {f"{theirs}.weight": m for theirs, m in sources.items()})

    def vector(name: str, size: int, sources: Mapping[str, Merge]) -> Row:
        return Row(f"{ours}.{name}.bias", (size,), layer, {f"{theirs}.bias": m for theirs, m in sources.items()})

    found = [
        *_norm(f"{ours}.input_norm", layer, "input_layernorm", model),
        matrix("attention.query_key_value", (fused, hidden), {"attention.query_key_value": heads}),
        matrix("attention.dense", (hidden, inner), {"attention.dense": _columns}),
        matrix("mlp.down", (hidden, model.ffn_hidden_size), dict.fromkeys(_DOWN, _columns)),
    ]
    if not (model.parallel_residual and model.tied_norm):
        found += _norm(f"{ours}.post_attention_norm", layer, "post_attention_layernorm", model)
    if model.bias_in_query_key_value:
        found.append(vector("attention.query_key_value", fused, {"attention.query_key_value": heads}))
    if model.bias_in_dense:
        found.append(vector("attention.dense", hidden, {"attention.dense": bias}))
    if model.bias_in_mlp:
        found.append(vector("mlp.down", hidden, dict.fromkeys(_DOWN, bias)))
    widths: dict[str, dict[str, Merge]] = {"mlp.up": dict.fromkeys(_UP, _rows)}
    if is_gated(model.activation):  # the first half of a rank's rows is multiplied by the activation of the second
        up, gate = partial(_half, 0), partial(_half, 1)
        widths = {
            "mlp.up": {**dict.fromkeys(_UP, up), "mlp.w3": _rows},
            "mlp.gate": {**dict.fromkeys(_UP, gate), "mlp.w1": _rows},
        }
    for name, sources in widths.items():
        found.append(matrix(name, (model.ffn_hidden_size, hidden), sources))
        if model.bias_in_mlp:
            found.append(vector(name, model.ffn_hidden_size, sources))
    return found


def _norm(ours: str, layer: int, theirs: str, model: ModelPlan) -> list[Row]:
    """A norm's parameters, which GPT-NeoX calls differently in each kind."""
    names = {"scalenorm": ["g"], "non_parametric_layernorm": []}.get(model.norm, ["weight", "scale"])
    shape = (1,) if model.norm == "scalenorm" else (model.hidden_size,)
    found = []
    if names:
        sources: dict[str, Merge] = dict.fromkeys([f"{theirs}.{name}" for name in names], _one_of_equals)
        found.append(Row(f"{ours}.weight", shape, layer, sources))
    if model.norm == "layernorm" and model.norm_bias:
        found.append(Row(f"{ours}.bias", shape, layer, {f"{theirs}.bias": _one_of_equals}))
    return found


def _rows(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def _columns(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=1)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.float() for part in parts]).sum(0)


def _one_of_equals(parts: Sequence[Tensor]) -> Tensor:
    """What every rank has; where ranks have drifted apart (GPT-NeoX-20B), their mean, as in its own tool."""
    if all(part.is_meta or torch.equal(part, parts[0]) for part in parts):
        return parts[0]
    return torch.stack([part.float() for part in parts]).mean(0)


def _half(number: int, parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.chunk(2)[number] for part in parts])


def _heads(model: ModelPlan, parts: Sequence[Tensor]) -> Tensor:
    """Each rank's queries, then its keys, then its values -> grouped by key/value head."""
    share, size = model.num_attention_heads // model.num_kv_heads, model.head_size
    groups = []
    for part in parts:
        unit = part.shape[0] // (share + 2)
        split = part.split([share * unit, unit, unit])
        grouped = [each.reshape(unit // size, -1, *each.shape[1:]) for each in split]
        groups.append(torch.cat(grouped, dim=1).flatten(0, 1))
    return torch.cat(groups)


def stored_parameters(files: NeoXFiles, model: ModelPlan) -> dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]:
    """Our parameters by global name: the shape of each, and a function that reads it.

    Every file is opened before anything is returned. Raises UserError with what does not fit: a parameter that is
    missing, has another shape, or has no counterpart in our model.
    """
    table, problems = rows(model), []
    by_layer: dict[int, list[Row]] = {layer: [] for layer in files.layers}
    for row in table:
        by_layer.setdefault(row.layer, []).append(row)
    for layer, wanted in sorted(by_layer.items()):
        problems += _problems(layer, wanted, files.parts(layer), model)
    if problems:
        more = [f"... and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise UserError(f"{files.step} does not hold the model of its configuration:", *problems[:8], *more)
    return {row.ours: (row.shape, partial(_read, files, row)) for row in table}


def _problems(layer: int, wanted: Sequence[Row], parts: Sequence[Mapping[str, Tensor]], model: ModelPlan) -> list[str]:
    problems, used = [], set()
    for row in wanted:
        name = _source(row, parts)
        if name is None:
            problems.append(f"layer {layer}: {' or '.join(row.sources)} is missing on a tensor-parallel rank")
            continue
        used.add(name)
        try:
            shape = tuple(row.sources[name]([part[name].to("meta") for part in parts]).shape)
        except RuntimeError:  # parts that cannot be joined
            shape = ()
        if shape != row.shape:
            have = ", ".join(str(list(part[name].shape)) for part in parts)
            problems.append(f"layer {layer}: {name} has {have} on the tensor-parallel ranks, for {list(row.shape)}")
    unknown = sorted({name for part in parts for name in part} - used)
    if model.parallel_residual and model.tied_norm:  # stored, and used by nothing
        unknown = [name for name in unknown if not name.startswith("post_attention_layernorm.")]
    return problems + [f"layer {layer}: {name} has no counterpart in our model" for name in unknown]


def _source(row: Row, parts: Sequence[Mapping[str, Tensor]]) -> str | None:
    return next((name for name in row.sources if all(name in part for part in parts)), None)


def _read(files: NeoXFiles, row: Row) -> Tensor:
    parts = files.parts(row.layer)
    name = _source(row, parts)
    if name is None:
        raise UserError(f"{files.step}: layer {row.layer} has changed while it was read")
    return row.sources[name]([part[name] for part in parts])
