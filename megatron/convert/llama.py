"""Map Hugging Face's LlamaForCausalLM to our GPT, and two models that differ from it in their norms.

Qwen 3 (Qwen3ForCausalLM) normalizes query and key per head. OLMo 2 (Olmo2ForCausalLM) normalizes them over all heads,
and normalizes the outputs of attention and feed-forward layer instead of their inputs.
"""

from dataclasses import dataclass
from typing import Any

from megatron.config.plan import ModelPlan
from megatron.convert.maps import (
    Entry,
    ParameterMap,
    named_as,
    require,
    rotary_keys,
    same,
    separate_heads,
    weight_and_bias,
)
from megatron.errors import UserError

ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu": "reglu"}
IGNORED = ("rotary_emb.inv_freq",)  # a buffer of older versions


@dataclass(frozen=True)
class Family:
    """How the architectures differ."""

    name: str
    qk_norm: str | None = None
    norm_placement: str = "input"
    bias_in_mlp: bool = False  # whether its feed-forward layer may have biases

    def model_keys(self, config: Any) -> dict[str, Any]:
        """Our configuration keys for a configuration of transformers. Raises UserError for unsupported settings."""
        if getattr(config, "use_sliding_window", False):
            raise UserError("use_sliding_window must be False: only some of its layers would have a window")
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return rotary_keys(config) | {
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": size,
            "ffn_hidden_size": config.intermediate_size,
            "seq_length": config.max_position_embeddings,
            "max_position_embeddings": config.max_position_embeddings,
            "norm": "rmsnorm",
            "rms_norm_epsilon": config.rms_norm_eps,
            "norm_placement": self.norm_placement,
            "qk_norm": self.qk_norm,
            "activation": named_as(ACTIVATIONS, config.hidden_act, "hidden_act"),
            "gpt_j_residual": False,
            "no_weight_tying": not config.tie_word_embeddings,
            "use_bias_in_attn_linear": config.attention_bias,
            "use_bias_in_mlp": getattr(config, "mlp_bias", False),
        }

    def parameter_map(self, model: ModelPlan) -> ParameterMap:
        """The map of all parameters. Raises UserError for a model that this architecture cannot hold."""
        require(
            model,
            self.name,
            norm=["rmsnorm"],
            norm_placement=[self.norm_placement],
            qk_norm=[self.qk_norm],
            position_embedding=["rotary"],
            rotary_fraction=[1.0],
            activation=sorted(set(ACTIVATIONS.values())),
            parallel_residual=[False],
            bias_in_mlp=[False, True] if self.bias_in_mlp else [False],
        )
        entries = [same("embedding.weight", "model.embed_tokens.weight")]
        for index in range(model.num_layers):
            entries += _block(f"blocks.{index}", f"model.layers.{index}", model)
        entries.append(same("final_norm.weight", "model.norm.weight"))
        if model.tied_embeddings:
            return ParameterMap(entries, (*IGNORED, "lm_head.weight"))
        return ParameterMap([*entries, same("head.weight", "lm_head.weight")], IGNORED)


llama = Family("Llama", bias_in_mlp=True)
qwen3 = Family("Qwen3", qk_norm="head")
olmo2 = Family("Olmo2", qk_norm="full", norm_placement="output")


def _block(ours: str, theirs: str, model: ModelPlan) -> list[Entry]:
    attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    kinds = ("weight", "bias") if model.bias_in_query_key_value else ("weight",)
    return [
        *_norms(ours, theirs, model),
        *(
            separate_heads(
                f"{ours}.attention.query_key_value.{kind}",
                (f"{attention}.q_proj.{kind}", f"{attention}.k_proj.{kind}", f"{attention}.v_proj.{kind}"),
                model,
            )
            for kind in kinds
        ),
        *weight_and_bias(same, f"{ours}.attention.dense", f"{attention}.o_proj", model.bias_in_dense),
        *weight_and_bias(same, f"{ours}.mlp.gate", f"{mlp}.gate_proj", model.bias_in_mlp),
        *weight_and_bias(same, f"{ours}.mlp.up", f"{mlp}.up_proj", model.bias_in_mlp),
        *weight_and_bias(same, f"{ours}.mlp.down", f"{mlp}.down_proj", model.bias_in_mlp),
    ]


def _norms(ours: str, theirs: str, model: ModelPlan) -> list[Entry]:
    names = {"input_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
    if model.norm_placement == "output":
        names = {"post_attention_norm": "post_attention_layernorm", "post_mlp_norm": "post_feedforward_layernorm"}
    if model.qk_norm is not None:
        names |= {"attention.norm.query": "self_attn.q_norm", "attention.norm.key": "self_attn.k_norm"}
    return [same(f"{ours}.{mine}.weight", f"{theirs}.{other}.weight") for mine, other in names.items()]
