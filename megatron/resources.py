"""What a configuration names outside of itself, opened: the tokenizer, the data, the checkpoint it must agree with.

Training, generation and evaluation share it. Below floor 6.
"""

from dataclasses import asdict
from pathlib import Path

from megatron.checkpoint.store import checkpoint_config
from megatron.config.load import config_from_flat
from megatron.config.plan import ModelPlan
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config, group_of_key
from megatron.config.schema.data_keys import DataKeys
from megatron.data.datasets import PARTS, Mixture, Part, Sources, build_sources
from megatron.errors import UserError
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer

# What changes the function that the weights compute without changing their shapes, and the keys it comes from.
FUNCTION = {
    "num_layers": "num_layers",
    "tied_embeddings": "tying of the embeddings (no_weight_tying false)",
    "bias_in_attention": "use_bias_in_attn_linear",
    "bias_in_mlp": "use_bias_in_mlp",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_kv_heads",
    "position_embedding": "pos_emb",
    "rotary_fraction": "rotary_pct",
    "rotary_base": "rotary_emb_base",
    "norm": "norm",
    "norm_epsilon": "the norm's epsilon",
    "activation": "activation",
    "parallel_residual": "gpt_j_residual",
    "tied_norm": "gpt_j_tied",
    "local_layers": "attention_config",
    "sliding_window": "sliding_window_width",
}

# The groups of keys which the function depends on.
GROUPS_OF_FUNCTION = {"model", "parallelism", "data"}


def open_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer that the configuration names. Raises UserError."""
    keys = config.tokenizer
    return build_tokenizer(keys.tokenizer_type, keys.vocab_file, keys.merge_file, keys.end_of_document_token)


def open_data(config: Config, vocab_size: int) -> Sources:
    """The data that the configuration names, divided into their parts. Raises UserError."""
    keys = config.data
    return build_sources(
        data_path=keys.data_path,
        data_impl=keys.data_impl,
        split=keys.split,
        mixtures={part: mixture for part in PARTS if (mixture := _mixture(keys, part)) is not None},
        seq_length=config.model.seq_length,
        seed=config.training.seed,
        vocab_size=vocab_size,
        pack_impl=keys.pack_impl,
        allow_chopped=keys.allow_chopped,
    )


def _mixture(keys: DataKeys, part: Part) -> Mixture | None:
    """The corpora that `PART_data_paths` names."""
    paths = getattr(keys, f"{part}_data_paths")
    if paths is None:
        return None
    alpha = keys.weighted_sampler_alpha if keys.weight_by_num_documents else None
    weights, labels = getattr(keys, f"{part}_data_weights"), getattr(keys, f"{part}_label_data_paths")
    return Mixture(paths, weights, labels, alpha)


def check_same_model(model: ModelPlan, checkpoint: Path) -> None:
    """Weights mean something only in the model they were trained in; shapes alone do not tell.

    Raises UserError with each setting in which `model` differs from the run that wrote `checkpoint`.
    """
    config = config_from_flat(_keys_of_function(checkpoint_config(checkpoint)), str(checkpoint / "config.json"))
    written = resolve(config, config.parallelism.model_parallel_size, model.vocab_size, inference=True).model
    here, there = _function(model), _function(written)
    differing = [
        f"  {key} is {here[field]} here, and was {there[field]} there"
        for field, key in FUNCTION.items()
        if here[field] != there[field]
    ]
    if differing:
        raise UserError(
            f"{checkpoint} holds another model than the configuration describes:",
            *differing,
            "to take its weights all the same: allow_changes=[model]",
        )


def _keys_of_function(flat: dict[str, object]) -> dict[str, object]:
    """What of a checkpoint's configuration matters, and keys that this version does not know, to be told of.

    Its plugins are left out: no module is imported because a file says so.
    """
    groups = group_of_key() | {"plugins": ""}
    return {key: value for key, value in flat.items() if groups.get(key, "model") in GROUPS_OF_FUNCTION}


def _function(model: ModelPlan) -> dict[str, object]:
    """What of the plan matters; kernels ("flash" for "global") and what is not used do not."""
    local = [layer for layer, kind in enumerate(model.attention_kinds) if kind == "local"]
    rotary = {} if model.position_embedding == "rotary" else {"rotary_fraction": None, "rotary_base": None}
    return asdict(model) | {"local_layers": local} | rotary | ({} if local else {"sliding_window": None})
