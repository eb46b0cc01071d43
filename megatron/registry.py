"""The table of everything that a configuration chooses by name: kind -> name -> "module:attribute".

A new norm, tokenizer or schedule is one file and one line here; a plugin adds names from outside. Targets are imported
when they are resolved, so that reading the table needs no torch.
"""

import importlib
import pkgutil
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from megatron.errors import UserError

TARGET = re.compile(r"[\w.]+:[\w.]+")
# The only mutable state of the package: `load_plugins` adds to it.
TABLE: dict[str, dict[str, str]] = {
    "tokenizer": {
        "HFTokenizer": "megatron.tokenizer.huggingface:build_hf_tokenizer",
        "GPT2BPETokenizer": "megatron.tokenizer.huggingface:build_gpt2_bpe_tokenizer",
        "HFGPT2Tokenizer": "megatron.tokenizer.huggingface:build_gpt2_bpe_tokenizer",
        "CharLevelTokenizer": "megatron.tokenizer.char_level:build_char_level_tokenizer",
        "TiktokenTokenizer": "megatron.tokenizer.tiktoken_bpe:build_tiktoken_tokenizer",
        "SPMTokenizer": "megatron.tokenizer.sentencepiece_model:build_spm_tokenizer",
    },
    "corpus": {
        "stdlib": "megatron.preprocessing.corpora:stdlib",
        "tinyshakespeare": "megatron.preprocessing.corpora:tinyshakespeare",
        "enwik8": "megatron.preprocessing.corpora:enwik8",
        "openwebtext": "megatron.preprocessing.corpora:openwebtext",
        "fineweb-edu": "megatron.preprocessing.corpora:fineweb_edu",
    },
    "norm": {
        "layernorm": "megatron.model.norms:LayerNorm",
        "rmsnorm": "megatron.model.norms:RMSNorm",
        "rmsnorm_1p": "megatron.model.norms:RMSNorm1p",
        "non_parametric_layernorm": "megatron.model.norms:NonParametricLayerNorm",
        "scalenorm": "megatron.model.norms:ScaleNorm",
    },
    "position_embedding": {
        "learned": "megatron.model.positions:learned",
        "sinusoidal": "megatron.model.positions:sinusoidal",
        "rotary": "megatron.model.positions:rotary",
        "alibi": "megatron.model.positions:alibi",
        "alibi_bf16": "megatron.model.positions:alibi_bf16",
        "rpe": "megatron.model.positions:rpe",
        "none": "megatron.model.positions:none",
    },
    "activation": {
        "gelu": "megatron.model.activations:gelu",
        "gelu_tanh": "megatron.model.activations:gelu_tanh",
        "relu": "megatron.model.activations:relu",
        "silu": "megatron.model.activations:silu",
        "mish": "megatron.model.activations:mish",
        "softsign": "megatron.model.activations:softsign",
        "glu": "megatron.model.activations:glu",
        "bilinear": "megatron.model.activations:bilinear",
        "swiglu": "megatron.model.activations:swiglu",
        "geglu": "megatron.model.activations:geglu",
        "geglu_tanh": "megatron.model.activations:geglu_tanh",
        "reglu": "megatron.model.activations:reglu",
    },
    "attention_backend": {
        "global": "megatron.model.attention_backends:global_attention",
        "flash": "megatron.model.attention_backends:flash_attention",
        "local": "megatron.model.attention_backends:local_attention",
    },
    "init_method": {
        "normal": "megatron.model.init:normal",
        "scaled_normal": "megatron.model.init:scaled_normal",
        "single_residual_scaled_normal": "megatron.model.init:single_residual_scaled_normal",
        "small_init": "megatron.model.init:small_init",
        "wang_init": "megatron.model.init:wang_init",
        "xavier_normal": "megatron.model.init:xavier_normal",
        "xavier_uniform": "megatron.model.init:xavier_uniform",
        "orthogonal": "megatron.model.init:orthogonal",
        "scaled_orthogonal": "megatron.model.init:scaled_orthogonal",
    },
    "optimizer": {
        "adam": "megatron.optimizers.build:adamw",
        "adamw": "megatron.optimizers.build:adamw",
        "sgd": "megatron.optimizers.build:sgd",
    },
    "lr_schedule": {
        "constant": "megatron.optimizers.schedules:constant",
        "linear": "megatron.optimizers.schedules:linear",
        "cosine": "megatron.optimizers.schedules:cosine",
        "exponential": "megatron.optimizers.schedules:exponential",
    },
    "launcher": {
        "local": "megatron.launch.launchers.local:local",
        "pdsh": "megatron.launch.launchers.pdsh:pdsh",
        "openmpi": "megatron.launch.launchers.openmpi:openmpi",
        "slurm": "megatron.launch.launchers.slurm:slurm",
    },
    "hugging_face_family": {
        "gpt2": "megatron.convert.families.gpt2:FAMILY",
        "gpt_neox": "megatron.convert.families.gpt_neox:FAMILY",
        "gptj": "megatron.convert.families.gptj:FAMILY",
        "gpt_neo": "megatron.convert.families.gpt_neo:FAMILY",
        "opt": "megatron.convert.families.opt:FAMILY",
        "bloom": "megatron.convert.families.bloom:FAMILY",
        "falcon": "megatron.convert.families.falcon:FAMILY",
        "mpt": "megatron.convert.families.mpt:FAMILY",
        "llama": "megatron.convert.families.llama:FAMILY",
        "mistral": "megatron.convert.families.mistral:FAMILY",
        "qwen2": "megatron.convert.families.qwen2:FAMILY",
        "qwen3": "megatron.convert.families.qwen3:FAMILY",
        "phi": "megatron.convert.families.phi:FAMILY",
        "phi3": "megatron.convert.families.phi3:FAMILY",
        "gemma": "megatron.convert.families.gemma:FAMILY",
        "gemma2": "megatron.convert.families.gemma2:FAMILY",
        "gemma3_text": "megatron.convert.families.gemma3_text:FAMILY",
        "olmo": "megatron.convert.families.olmo:FAMILY",
        "olmo2": "megatron.convert.families.olmo2:FAMILY",
        "starcoder2": "megatron.convert.families.starcoder2:FAMILY",
        "stablelm": "megatron.convert.families.stablelm:FAMILY",
        "smollm3": "megatron.convert.families.smollm3:FAMILY",
        "cohere": "megatron.convert.families.cohere:FAMILY",
        "granite": "megatron.convert.families.granite:FAMILY",
    },
    "weights_source": {  # of `load: hf:MODEL`: a function from MODEL to keys of the configuration
        "hf": "megatron.hugging_face.published:configuration_keys",
    },
    "adapter_base": {  # of adapters whose base is hf:MODEL: a function that loads it
        "hf": "megatron.hugging_face.published:load_base",
    },
    "hook": {
        "stragglers": "megatron.training.hooks.stragglers:stragglers",
        "compiling": "megatron.training.hooks.compiling:compiling",
        "breakdown": "megatron.training.hooks.breakdown:breakdown",
        "profiling": "megatron.training.hooks.profiling:profiling",
        "liveness": "megatron.training.hooks.liveness:liveness",
        "totals": "megatron.training.hooks.totals:totals",
        "norms": "megatron.training.hooks.norms:norms",
        "gradient_noise": "megatron.training.hooks.gradient_noise:gradient_noise",
        "metrics_log": "megatron.training.hooks.metrics_log:metrics_log",
        "spikes": "megatron.training.hooks.spikes:spikes",
        "skipped_updates": "megatron.training.hooks.skipped_updates:skipped_updates",
        "divergence": "megatron.training.hooks.divergence:divergence",
        "replicas": "megatron.training.hooks.replicas:replicas",
        "validation": "megatron.training.hooks.validation:validation",
        "tasks": "megatron.training.hooks.tasks:tasks",
        "samples": "megatron.training.hooks.samples:samples",
        "saving": "megatron.training.hooks.saving:saving",
        "report": "megatron.training.hooks.report:report",
        "panel": "megatron.training.hooks.panel:panel",
    },
    "metric_writer": {
        "jsonl": "megatron.metrics.local_writers:json_lines",
        "csv": "megatron.metrics.local_writers:csv_file",
        "tensorboard": "megatron.metrics.local_writers:tensorboard",
        "wandb": "megatron.metrics.services:weights_and_biases",
        "mlflow": "megatron.metrics.services:mlflow",
        "comet": "megatron.metrics.services:comet",
        "trackio": "megatron.metrics.services:trackio",
        "prometheus": "megatron.metrics.prometheus:scrape_port",
        "prometheus_textfile": "megatron.metrics.prometheus:textfile",
    },
}


def names(kind: str) -> list[str]:
    """The names of a kind, in the order of the table."""
    return list(TABLE[kind])


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The most similar choice, ignoring case, or None if none is similar."""
    by_lower_case = {choice.lower(): choice for choice in choices}
    found = get_close_matches(word.lower(), by_lower_case, n=1, cutoff=0.6)
    return by_lower_case[found[0]] if found else None


def unknown_name(kind: str, name: str) -> str:
    """A message that `kind` has no such name, with the nearest name and all names."""
    near = nearest(name, TABLE[kind])
    hint = f'. Did you mean "{near}"?' if near else ""
    return f'unknown {kind.replace("_", " ")} "{name}"{hint} (known: {", ".join(TABLE[kind])})'


def resolve(kind: str, name: str) -> Any:
    """Import and return the target of `name`.

    Raises UserError for a name that is not in the table, and for a plugin's target that cannot be imported.
    """
    if name not in TABLE[kind]:
        raise UserError(unknown_name(kind, name))
    target = TABLE[kind][name]
    try:
        return pkgutil.resolve_name(target)
    except Exception as error:
        if target.startswith(f"{__package__}."):
            raise  # our own defect
        reason = _reason(error)
        raise UserError(f'{kind} "{name}": the plugin\'s {target} cannot be imported: {reason}') from error


def load_plugins(modules: Sequence[str]) -> None:
    """Import each module and add the names of its `DEEPY_REGISTRY: dict[kind, dict[name, "module:attribute"]]`.

    Raises UserError if a module cannot be imported, has no such table, or redefines a name.
    """
    for module in modules:
        try:
            declared = getattr(importlib.import_module(module), "DEEPY_REGISTRY", None)
        except Exception as error:
            raise UserError(f'plugins: "{module}" cannot be imported: {_reason(error)}') from error
        if not isinstance(declared, Mapping):
            raise UserError(f'plugins: "{module}" has no table DEEPY_REGISTRY')
        _add(module, declared)


def _add(plugin: str, declared: Mapping[Any, Any]) -> None:
    for kind, entries in declared.items():
        if not isinstance(entries, Mapping) or not all(TARGET.fullmatch(str(target)) for target in entries.values()):
            raise UserError(
                f'plugins: "{plugin}": DEEPY_REGISTRY["{kind}"] must be a dictionary of names and "module:attribute"'
            )
        if kind not in TABLE:
            raise UserError(f'plugins: "{plugin}" declares an unknown kind "{kind}" (known: {", ".join(TABLE)})')
        for name, target in entries.items():
            if TABLE[kind].get(name, target) != target:
                raise UserError(f'plugins: "{plugin}" declares {kind} "{name}", which is {TABLE[kind][name]} already')
            TABLE[kind][name] = target


def _reason(error: Exception) -> str:
    return traceback.format_exception_only(error)[-1].strip()
