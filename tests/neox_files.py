"""Write a checkpoint as GPT-NeoX does, from a model of transformers: an independent account of its format.

Written after EleutherAI/gpt-neox 2.0.0: names and order of its modules (megatron/model/transformer.py), and the shards
of its tensor-parallel layers (megatron/mpu/layers.py). None of our converter is used.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruamel.yaml import YAML
from torch import Tensor

Shards = list[Tensor]
Block = dict[str, Shards]


def write_step(
    folder: Path,
    layers: dict[int, dict[str, Shards]],
    tp: int,
    keys: dict[str, Any],
    whole_files: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A step's folder with the parameters of each layer, cut over `tp` ranks.

    whole_files: one file for each rank, as with pipe_parallel_size 0, with the random state of the run beside them.
    """
    step = folder / "global_step30"
    (step / "configs").mkdir(parents=True)
    for rank in range(tp):
        module = {}
        for number, parameters in layers.items():
            mine = {name: shards[rank].to(dtype).clone() for name, shards in parameters.items()}
            module |= {f"sequential.{number}.{name}": tensor for name, tensor in mine.items()}
            if not whole_files:
                torch.save(mine, step / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
        state = {
            "module": module if whole_files else None,
            "iteration": 30,
            "args": {"num_layers": keys["num-layers"], "tokenizer_type": "CharLevelTokenizer"},
            "np_rng_state": np.random.RandomState(3).get_state(),
            "random_rng_state": (3, (1, 2, 3), None),
            "csr_tensor_module_names": {"a"},
        }
        torch.save(state, step / f"mp_rank_{rank:02d}_model_states.pt")
    with (step / "configs" / "model.yml").open("w") as file:
        YAML(typ="safe", pure=True).dump(keys, file)
    (folder / "latest").write_text(step.name)
    return step


def columns(tensor: Tensor, tp: int) -> Shards:
    return list(tensor.chunk(tp, dim=0))


def rows(tensor: Tensor, tp: int) -> Shards:
    return list(tensor.chunk(tp, dim=1))


def same(tensor: Tensor, tp: int) -> Shards:
    return [tensor] * tp


def summed(tensor: Tensor, tp: int) -> Shards:
    """A bias that ranks add before their sum: shards differ, and only their sum counts."""
    if tp == 1:
        return [tensor]
    first = 0.25 * tensor + torch.linspace(-1, 1, tensor.numel())
    return [first, tensor - first]


def vocabulary(tensor: Tensor, rows: int, tp: int) -> Shards:
    """Padded to `rows` with values that must not matter."""
    return columns(torch.cat([tensor, torch.full((rows - len(tensor), tensor.shape[1]), 9.0)]), tp)


def neox_layers(state: dict[str, Tensor], config: Any, tp: int, padded: int, new_names: bool = False) -> dict[int, Any]:
    """Of transformers.GPTNeoXForCausalLM. new_names: linear1 and linear2, as since version 2.0."""
    up, down = ("mlp.linear1", "mlp.linear2") if new_names else ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    bias = summed if config.use_parallel_residual else same
    layers = {0: {"word_embeddings.weight": vocabulary(state["gpt_neox.embed_in.weight"], padded, tp)}}
    for index in range(config.num_hidden_layers):
        theirs = f"gpt_neox.layers.{index}."
        cut: dict[str, tuple[str, Callable[[Tensor, int], Shards]]] = {
            **{f"{norm}.{kind}": (f"{norm}.{kind}", same) for norm in NORMS for kind in ("weight", "bias")},
            "attention.query_key_value.weight": ("attention.query_key_value.weight", columns),
            "attention.query_key_value.bias": ("attention.query_key_value.bias", columns),
            "attention.dense.weight": ("attention.dense.weight", rows),
            "attention.dense.bias": ("attention.dense.bias", bias),
            f"{up}.weight": ("mlp.dense_h_to_4h.weight", columns),
            f"{up}.bias": ("mlp.dense_h_to_4h.bias", columns),
            f"{down}.weight": ("mlp.dense_4h_to_h.weight", rows),
            f"{down}.bias": ("mlp.dense_4h_to_h.bias", bias),
        }
        block = {name: split(state[theirs + source], tp) for name, (source, split) in cut.items()}
        block["attention.rotary_emb.inv_freq"] = same(torch.ones(3), tp)
        layers[index + 2] = block
    last = config.num_hidden_layers + 3
    layers[last] = {f"norm.{kind}": same(state[f"gpt_neox.final_layer_norm.{kind}"], tp) for kind in ("weight", "bias")}
    if not config.tie_word_embeddings:
        layers[last + 1] = {"final_linear.weight": vocabulary(state["lm_head.weight"], padded, tp)}
    return layers


NORMS = ("input_layernorm", "post_attention_layernorm")


def llama_layers(
    state: dict[str, Tensor], config: Any, tp: int, padded: int, old_names: bool = False
) -> dict[int, Any]:
    """Of transformers.LlamaForCausalLM. old_names: w1, w2 and w3."""
    layers = {0: {"word_embeddings.weight": vocabulary(state["model.embed_tokens.weight"], padded, tp)}}
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    for index in range(config.num_hidden_layers):
        theirs = f"model.layers.{index}."
        query, key, value = (state[f"{theirs}self_attn.{name}_proj.weight"] for name in "qkv")
        if kv_heads == heads:
            per_head = [part.view(heads, size, -1) for part in (query, key, value)]
            fused = columns(torch.stack(per_head, dim=1).flatten(0, 2), tp)
        else:
            parts = [part.chunk(tp) for part in (query, key, value)]
            fused = [torch.cat([part[rank] for part in parts]) for rank in range(tp)]
        gate, up, down = (state[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        block = {
            **{f"{norm}.scale": same(state[f"{theirs}{norm}.weight"], tp) for norm in NORMS},
            "attention.query_key_value.weight": fused,
            "attention.dense.weight": rows(state[f"{theirs}self_attn.o_proj.weight"], tp),
        }
        if old_names:
            block |= {"mlp.w1.weight": columns(gate, tp), "mlp.w3.weight": columns(up, tp)}
            block["mlp.w2.weight"] = rows(down, tp)
        else:
            pairs = zip(up.chunk(tp), gate.chunk(tp), strict=True)
            block |= {"mlp.linear1.weight": [torch.cat(pair) for pair in pairs], "mlp.linear2.weight": rows(down, tp)}
        layers[index + 2] = block
    last = config.num_hidden_layers + 3
    layers[last] = {"norm.scale": same(state["model.norm.weight"], tp)}
    layers[last + 1] = {"final_linear.weight": vocabulary(state["lm_head.weight"], padded, tp)}
    return layers


def gpt2_layers(state: dict[str, Tensor], config: Any, tp: int, padded: int) -> dict[int, Any]:
    """Of transformers.GPT2LMHeadModel, whose head is the embedding."""
    layers: dict[int, Any] = {
        0: {
            "word_embeddings.weight": vocabulary(state["transformer.wte.weight"], padded, tp),
            "position_embeddings.weight": same(state["transformer.wpe.weight"], tp),
        }
    }
    heads, size = config.n_head, config.n_embd // config.n_head
    for index in range(config.n_layer):
        theirs = f"transformer.h.{index}."

        def interleaved(name: str, theirs: str = theirs) -> Tensor:
            tensor = state[f"{theirs}attn.c_attn.{name}"]
            tensor = tensor.t() if name == "weight" else tensor
            return tensor.view(3, heads, size, -1).transpose(0, 1).reshape(tensor.shape)

        block = {
            "attention.query_key_value.weight": columns(interleaved("weight"), tp),
            "attention.query_key_value.bias": columns(interleaved("bias"), tp),
            "attention.dense.weight": rows(state[f"{theirs}attn.c_proj.weight"].t(), tp),
            "attention.dense.bias": same(state[f"{theirs}attn.c_proj.bias"], tp),
            "mlp.dense_h_to_4h.weight": columns(state[f"{theirs}mlp.c_fc.weight"].t(), tp),
            "mlp.dense_h_to_4h.bias": columns(state[f"{theirs}mlp.c_fc.bias"], tp),
            "mlp.dense_4h_to_h.weight": rows(state[f"{theirs}mlp.c_proj.weight"].t(), tp),
            "mlp.dense_4h_to_h.bias": same(state[f"{theirs}mlp.c_proj.bias"], tp),
        }
        for ours, norm in zip(NORMS, ("ln_1", "ln_2"), strict=True):
            block |= {f"{ours}.{kind}": same(state[f"{theirs}{norm}.{kind}"], tp) for kind in ("weight", "bias")}
        layers[index + 2] = block
    final = {f"norm.{kind}": same(state[f"transformer.ln_f.{kind}"], tp) for kind in ("weight", "bias")}
    return layers | {config.n_layer + 3: final}
