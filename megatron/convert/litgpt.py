"""Read the models of LitGPT: `lit_model.pth`, and `model_config.yaml` (in 2023 `lit_config.json`) beside it.

Fields and names read from Lightning-AI/litgpt (litgpt/config.py, litgpt/model.py). A field that is not in the tables
below, or has a value that our model cannot have, is refused by name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.config.load import build, override_key
from megatron.config.plan import ModelPlan
from megatron.config.schema.config import Config
from megatron.config.yaml_file import Entries, read_file
from megatron.convert.family import Family
from megatron.convert.parameters import Module, fused_heads, same
from megatron.convert.torch_file import read_torch_file
from megatron.errors import UserError

WEIGHTS = "lit_model.pth"
_CONFIGS = ("model_config.yaml", "lit_config.json")
_OLDER_NAMES = {
    "_norm_class": "norm_class_name",
    "_mlp_class": "mlp_class_name",
    "condense_ratio": "rope_condense_ratio",
}

# Fields that decide the model, and their defaults in LitGPT.
_DEFAULTS: dict[str, Any] = {
    "name": "",
    "block_size": 4096,
    "n_layer": 16,
    "n_embd": 4096,
    "n_head": 32,
    "head_size": None,
    "n_query_groups": None,
    "norm_class_name": "LayerNorm",
    "norm_eps": 1e-5,
    "norm_qk": False,
    "norm_qk_type": "default",
    "norm_1": True,
    "norm_2": True,
    "post_attention_norm": False,
    "post_mlp_norm": False,
    "parallel_residual": True,
    "shared_attention_norm": False,
    "bias": True,
    "attn_bias": False,
    "lm_head_bias": False,
    "attention_scores_scalar": None,
    "attention_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_size": None,
    "sliding_window_indices": None,
    "rope_base": 10000,
    "rope_condense_ratio": 1,
    "rope_adjustments": None,
    "rope_local_base_freq": None,
    "rope_indices": None,
    "rotary_percentage": 0.25,
    "intermediate_size": None,
    "mlp_class_name": "GptNeoxMLP",
    "gelu_approximate": "none",
    "scale_embeddings": False,
}
# Fields that say nothing about the computation: the rows of the vocabulary are those of the tokenizer.
_IGNORED = {"hf_config", "org", "vocab_size", "padded_vocab_size", "padding_multiple", "rope_n_elem"}
# Fields of experts and latent attention: unset, they change nothing.
_UNSET = (None, 0, False)
_WITHOUT_EFFECT = {"norm_topk_prob", "routed_scaling_factor"}

_GELU = {"none": "gelu", "tanh": "gelu_tanh"}
_ACTIVATIONS = {"GptNeoxMLP": "{gelu}", "LLaMAMLP": "swiglu", "GemmaMLP": "{gated_gelu}"}
_PLACEMENTS = {(True, True, False, False): "input", (False, False, True, True): "output", (True,) * 4: "both"}


def read_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The model and its tokenizer in our keys; overrides: "key=value". Raises UserError or ConfigError."""
    path = next((folder / name for name in _CONFIGS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} has no {' or '.join(_CONFIGS)}")
    entries = read_file(path)
    if entries.problems:
        raise UserError(*entries.problems)
    values = {_OLDER_NAMES.get(name, name): value for name, value in entries.values.items()}
    if problems := _unknown(values):
        raise UserError(*(f"{path}: {problem}" for problem in problems))
    try:
        keys = _model_keys(_DEFAULTS | {name: values[name] for name in _DEFAULTS if name in values})
    except UserError as error:
        raise UserError(*(f"{path}: {problem}" for problem in error.problems)) from error
    for kind, name in (("HFTokenizer", "tokenizer.json"), ("SPMTokenizer", "tokenizer.model")):
        if (folder / name).is_file():
            keys |= {"tokenizer_type": kind, "vocab_file": str(folder / name)}
            break
    ours = Entries(values=keys)
    for text in overrides:
        override_key(ours, text)
    return build(ours, str(path))


def _unknown(values: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} ({value!r}) has no counterpart here"
        for name, value in values.items()
        if name not in _DEFAULTS and name not in _IGNORED | _WITHOUT_EFFECT and value not in _UNSET
    ]


def _model_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys for LitGPT's fields."""
    problems: list[str] = []
    size = values["head_size"] or values["n_embd"] // values["n_head"]
    keys = {
        "num_layers": values["n_layer"],
        "hidden_size": values["n_embd"],
        "num_attention_heads": values["n_head"],
        "num_kv_heads": values["n_query_groups"] or values["n_head"],
        "head_dim": size,
        "ffn_hidden_size": values["intermediate_size"] or 4 * values["n_embd"],
        "seq_length": values["block_size"],
        "max_position_embeddings": values["block_size"],
        "gpt_j_residual": values["parallel_residual"],
        "gpt_j_tied": values["shared_attention_norm"],
        "use_bias_in_attn_linear": values["bias"],
        "use_bias_in_qkv": values["bias"] or values["attn_bias"],
        "use_bias_in_mlp": values["bias"],
        "no_weight_tying": True,  # LitGPT stores the head, also where it equals the embedding
        "head_bias": values["lm_head_bias"],
        "attn_logit_softcapping": values["attention_logit_softcapping"],
        "final_logit_softcapping": values["final_logit_softcapping"],
        "pos_emb": "rotary",
        "rotary_pct": values["rotary_percentage"],
        "rotary_emb_base": values["rope_base"],
        "rope_scaling": _scaling(values, problems),
        "activation": _activation(values, problems),
        "qk_norm": {"default": "head", "olmo2": "full"}[values["norm_qk_type"]] if values["norm_qk"] else None,
        "embedding_multiplier": math.sqrt(values["n_embd"]) if values["scale_embeddings"] else 1.0,
    }
    if values["attention_scores_scalar"]:
        keys["attention_scale"] = values["attention_scores_scalar"] ** -0.5
    return keys | _norms(values, problems) | _windows(values, problems) | _refuse(problems)


def _refuse(problems: Sequence[str]) -> dict[str, Any]:
    if problems:
        raise UserError(*problems)
    return {}


def _activation(values: Mapping[str, Any], problems: list[str]) -> str:
    name, approximate = values["mlp_class_name"], values["gelu_approximate"]
    if name not in _ACTIVATIONS or approximate not in _GELU:
        problems.append(f"mlp_class_name {name!r} with gelu_approximate {approximate!r} has no counterpart here")
        return "gelu"
    gelu = _GELU[approximate]
    return _ACTIVATIONS[name].format(gelu=gelu, gated_gelu=gelu.replace("gelu", "geglu"))


def _norms(values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """LitGPT chooses by the model's name: Gemma's RMSNorm adds 1 to its weight, OLMo's LayerNorm has none."""
    kind = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}.get(values["norm_class_name"])
    if kind == "rmsnorm" and "Gemma" in values["name"]:
        kind = "rmsnorm_1p"
    if kind == "layernorm" and "OLMo" in values["name"]:
        kind = "non_parametric_layernorm"
    stated = tuple(values[name] for name in ("norm_1", "norm_2", "post_attention_norm", "post_mlp_norm"))
    placement = _PLACEMENTS.get(stated)
    if kind is None or placement is None:
        problems.append(f"norm_class_name {values['norm_class_name']!r} with norms {stated} has no counterpart here")
    epsilon = "layernorm_epsilon" if kind in ("layernorm", "non_parametric_layernorm") else "rms_norm_epsilon"
    return {"norm": kind, "norm_placement": placement, epsilon: values["norm_eps"]}


def _scaling(values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    adjustments, ratio = values["rope_adjustments"], values["rope_condense_ratio"]
    if adjustments is None:
        return {"rope_type": "linear", "factor": float(ratio)} if ratio != 1 else {"rope_type": "default"}
    names = {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_seq_len": "original_max_position_embeddings",
    }
    if ratio != 1 or set(adjustments) not in (set(names), {"factor"}):
        problems.append(f"rope_adjustments {adjustments!r} with rope_condense_ratio {ratio} has no counterpart here")
        return {}
    kind = "linear" if len(adjustments) == 1 else "llama3"
    return {"rope_type": kind} | {names[name]: value for name, value in adjustments.items()}


def _windows(values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Layers with a window (1 in sliding_window_indices, without it all), and another base of their positions."""
    layers, width, local_base = values["n_layer"], values["sliding_window_size"], values["rope_local_base_freq"]
    every = (1,) * layers
    marked = [bool(mark) for mark in values["sliding_window_indices"] or every][:layers]
    keys: dict[str, Any] = {}
    if width is not None:
        keys["sliding_window_width"] = width
        keys["attention_config"] = tuple(((("local" if mark else "global"),), 1) for mark in marked)
    if local_base is not None:
        keys["rotary_emb_base_local"] = local_base
        if width is None or [bool(mark) for mark in values["rope_indices"] or every][:layers] != marked:
            problems.append("rope_indices must be sliding_window_indices here: the layers with a window")
    return keys


def _family(model: ModelPlan, heads: Module) -> Family:
    """LitGPT's names, as a table."""
    norms = {"input_norm": "norm_1", "post_attention_norm": "norm_2"}
    if model.norm_placement != "input":
        norms = {"post_attention_norm": "post_attention_norm", "post_mlp_norm": "post_mlp_norm"}
    if model.norm_placement == "both":
        norms |= {"input_norm": "norm_1", "pre_mlp_norm": "norm_2"}
    return Family(
        name="LitGPT",
        model_type="",
        architecture="",
        fields={},
        fixed={},
        prefix="",
        modules={"embedding": "transformer.wte", "final_norm": "transformer.ln_f", "head": "lm_head"},
        layers="transformer.h",
        block={
            **norms,
            "attention.query_key_value": heads,
            "attention.norm.query": "attn.norm_q",
            "attention.norm.key": "attn.norm_k",
            "attention.dense": "attn.proj",
            "mlp.gate": "mlp.fc_1",
            "mlp.up": "mlp.fc_2" if model.activation not in _GELU.values() else "mlp.fc",
            "mlp.down": "mlp.proj",
        },
        ignored=(),
    )


def stored_parameters(folder: Path, model: ModelPlan) -> dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]:
    """Our parameters by global name: the shape of each, and a function that reads it.

    Raises UserError for a file that cannot be read, and with every parameter that is missing or has no counterpart.
    """
    path = folder / WEIGHTS
    try:
        content = read_torch_file(path)
    except UserError as error:
        hint = "`litgpt convert_pretrained_checkpoint` writes a file of the weights alone"
        raise UserError(*error.problems, *([hint] if "is refused" in str(error) else [])) from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds something else than parameters by name")
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
    grouped = any(
        name.endswith("attn.attn.weight") for name in state
    )  # before version 0.5.8: by key/value head, as ours
    table = _family(model, same("attn.attn") if grouped else fused_heads("attn.qkv")).parameters(model)
    try:
        names = table.find(state)
    except UserError as error:
        raise UserError(*(f"{path}: {problem}" for problem in error.problems)) from error
    found: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {}
    problems = []
    for entry in table.entries:
        (ours,), sources = entry.ours, [state[names[name]] for name in entry.theirs]
        rows = model.vocab_size if ours.startswith(("embedding.", "head.")) else None

        def read(entry: Any = entry, sources: Sequence[Tensor] = sources, rows: int | None = rows) -> Tensor:
            whole: Tensor = entry.join(sources)[0]
            return whole[:rows]

        whole = entry.join([source.to("meta") for source in sources])[0]
        if rows is not None and len(whole) < rows:
            problems.append(f"{path}: {entry.theirs[0]} has {len(whole)} rows, and the tokenizer {rows} ids")
        found[ours] = (tuple(whole[:rows].shape), read)
    if problems:
        raise UserError(*problems)
    return found
