"""Small models for tests, with values in every parameter that make a mistake visible."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.plan import ModelPlan, RopeScaling
from megatron.engine.modules import Sequential
from megatron.model.cache import KVCache
from megatron.model.gpt import gpt_layers
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.parameter import load_whole
from tests import tiny


def small(**changes: Any) -> ModelPlan:
    """A model of three layers with odd sizes; `changes` are fields of ModelPlan."""
    model = replace(tiny.MODEL, num_layers=3, ffn_hidden_size=88, attention_kinds=("global",) * 3)
    return replace(model, **changes)


# one of everything that changes the computation, in few models
VARIETY = {
    "gpt2": small(position_embedding="learned", tied_embeddings=True, activation="gelu_tanh", vocab_size=53),
    "neox": small(parallel_residual=True, rotary_fraction=0.25),
    "gpt-j": small(parallel_residual=True, tied_norm=True, bias_in_query_key_value=False, bias_in_dense=False),
    "llama": small(
        norm="rmsnorm",
        activation="swiglu",
        rotary_fraction=1.0,
        num_kv_heads=2,
        bias_in_query_key_value=False,
        bias_in_dense=False,
        bias_in_mlp=False,
    ),
    "palm": small(
        norm="rmsnorm",
        activation="geglu",
        parallel_residual=True,
        tied_norm=True,
        tied_embeddings=True,
        num_kv_heads=2,
        bias_in_query_key_value=False,
        bias_in_dense=False,
        bias_in_mlp=False,
    ),
    "qwen 3": small(
        norm="rmsnorm", activation="swiglu", rotary_fraction=1.0, num_kv_heads=2, head_size=12, qk_norm="head"
    ),
    "olmo 2": small(
        norm="rmsnorm", activation="swiglu", num_kv_heads=2, qk_norm="full", norm_placement="output", bias_in_mlp=False
    ),
    "olmo 1": small(
        norm="non_parametric_layernorm",
        activation="swiglu",
        bias_in_query_key_value=False,
        bias_in_dense=False,
        bias_in_mlp=False,
    ),
    "scalenorm": small(norm="scalenorm", activation="relu"),
    "phi": small(parallel_residual=True, tied_norm=True, qk_norm="head", activation="gelu_tanh"),
    "cohere": small(
        norm_bias=False,
        parallel_residual=True,
        tied_norm=True,
        qk_norm="each_head",
        num_kv_heads=2,
        tied_embeddings=True,
        activation="swiglu",
        bias_in_query_key_value=False,
        bias_in_dense=False,
        bias_in_mlp=False,
    ),
    "full layernorm": small(norm_placement="output", qk_norm="full", num_kv_heads=2),
    "gemma 3": small(
        norm="rmsnorm_1p",
        norm_placement="both",
        qk_norm="head",
        num_kv_heads=2,
        head_size=12,
        tied_embeddings=True,
        activation="geglu",
        bias_in_query_key_value=False,
        bias_in_dense=False,
        bias_in_mlp=False,
    ),
    # key/value heads that two ranks share: each of the norms that differ by head, biases and clamped values
    "three key/value heads": small(
        num_attention_heads=6, num_kv_heads=3, qk_norm="each_head", norm_bias=False, clip_qkv=2.0
    ),
    "three key/value heads, full layernorm": small(num_attention_heads=6, num_kv_heads=3, qk_norm="full"),
    "one key/value head": small(norm="rmsnorm", activation="swiglu", num_kv_heads=1, qk_norm="full"),
    "qwen 2, granite": small(  # biases of Qwen 2, factors of Granite
        norm="rmsnorm",
        activation="swiglu",
        num_kv_heads=2,
        residual_multiplier=0.22,
        bias_in_dense=False,
        bias_in_mlp=False,
    ),
    "local": small(attention_kinds=("local", "global", "local"), sliding_window=3, activation="relu"),
    "gemma 3 positions": small(
        attention_kinds=("local", "global", "local"),
        sliding_window=3,
        rotary_base=1000.0,
        rotary_base_local=100.0,
        rope_scaling=RopeScaling("linear", 8.0),
        num_kv_heads=2,
    ),
    "smollm 3": small(layers_without_rotary=(1,), rotary_interleaved=True, rotary_fraction=1.0, activation="swiglu"),
    "phi 4 mini": small(  # in every test sequences are longer than the original ones
        rope_scaling=RopeScaling(
            "longrope", 4.0, original_positions=4, short_factors=(1.0, 1.5), long_factors=(1.0, 3.0)
        ),
        num_kv_heads=2,
        activation="swiglu",
    ),
    "ends": small(
        embedding_norm=True,
        embedding_multiplier=3.0,
        head_bias=True,
        logit_multiplier=0.5,
        logit_softcap=4.0,
        position_embedding="learned",
    ),
    "tied ends": small(
        embedding_norm=True,
        embedding_multiplier=3.0,
        logit_multiplier=2.0,
        logit_softcap=6.0,
        norm="rmsnorm",
        tied_embeddings=True,
    ),
    "opt": small(position_embedding="learned", position_offset=2, activation="relu", tied_embeddings=True),
    "sinusoidal": small(position_embedding="sinusoidal", activation="relu"),
    "gemma 2": small(
        attention_kinds=("local", "global", "local"),
        sliding_window=3,
        num_kv_heads=2,
        attention_scale=0.5,
        attention_softcap=1.5,
        clip_qkv=2.0,
    ),
    "bloom": small(position_embedding="alibi", attention_softcap=3.0),
    "falcon-rw": small(position_embedding="alibi_bf16", num_kv_heads=2),
    "relative positions": small(position_embedding="rpe", relative_buckets=6, relative_distance=9),
    "no positions": small(position_embedding="none", activation="silu", num_kv_heads=2),
    "full vocabulary": small(vocab_size=64, activation="reglu", tied_embeddings=True),
}


def build(model: ModelPlan, grid: ParallelGrid, recompute_layers: int = 0) -> Sequential:
    """The model on this rank, with random values in every parameter, the same in every layout."""
    module = Sequential(gpt_layers(model, grid, seed=1), recompute_layers)
    randomise(module)
    return module


def randomise(module: nn.Module) -> None:
    """Give biases and norms values too: weights are drawn with 0.2, biases with 0.5, norm weights around 1."""
    for parameter in module.parameters():
        name: str = parameter.global_name
        whole = random_tensor(parameter.global_shape, zlib.crc32(name.encode()))
        load_whole(parameter, spread(name, whole))


def spread(name: str, normal: Tensor) -> Tensor:
    """Standard normal values -> values as a parameter of this name may have."""
    if name.endswith("bias"):
        return 0.5 * normal
    return 1 + 0.3 * normal if normal.dim() == 1 else 0.2 * normal


def random_tensor(shape: Iterable[int], seed: int) -> Tensor:
    """Standard normal values that depend on the seed alone."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def random_tokens(model: ModelPlan, batch: int, length: int, seed: int = 5) -> Tensor:
    """Token ids [batch, length] of the true vocabulary."""
    return torch.randint(0, model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def new_cache(model: ModelPlan, slots: int, capacity: int, kv_heads: int | None = None, **options: Any) -> KVCache:
    """A cache in fp32 on the CPU."""
    heads = model.num_kv_heads if kv_heads is None else kv_heads
    return KVCache(model, slots, capacity, heads, torch.float32, torch.device("cpu"), **options)


def read_in_steps(module: nn.Module, tokens: Tensor, cache: KVCache, steps: Iterable[int]) -> Tensor:
    """Read `tokens` [b, s] into slots 0 to b-1 in steps of the given lengths; what the module gives, joined."""
    rows, start, results = range(len(tokens)), 0, []
    for part in tokens.split(list(steps), dim=1):
        cache.begin_step(rows, [start] * len(rows), [part.shape[1]] * len(rows))
        results.append(module(part, cache))
        start += part.shape[1]
    return torch.cat(results, dim=1)


def read_rows(
    module: nn.Module, rows: Sequence[Tensor], slots: Sequence[int], starts: Sequence[int], cache: KVCache
) -> list[Tensor]:
    """One step of rows of different lengths; the result of each."""
    sizes = [len(row) for row in rows]
    cache.begin_step(slots, starts, sizes)
    padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return [result[:size] for result, size in zip(module(padded, cache), sizes, strict=True)]
