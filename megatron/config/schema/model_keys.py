"""Keys that say what the model is and how it is cut over ranks."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron.config.schema.key_group import Group, NotNegativeInt, PositiveFloat, PositiveInt, registered

InitMethod = Annotated[str, registered("init_method")]
AttentionName = Annotated[str, registered("attention_backend")]
Dropout = Annotated[float, Field(ge=0, lt=1)]


def _check_shape(value: object) -> object:
    entries = value if isinstance(value, tuple) else ()
    right = [isinstance(e, tuple) and len(e) == 2 and isinstance(e[0], tuple) and e[0] != () for e in entries]
    repetitions = [e[1] == "all" or (type(e[1]) is int and e[1] > 0) for e in entries if isinstance(e, tuple) and e[1:]]
    if value is not None and not (right and all(right) and all(repetitions)):
        raise ValueError('must be a list of [kinds, repetitions], such as [[["global", "local"], 6]] or "all" for 6')
    return value


# [[kinds, repetitions], ...]
AttentionConfig = Annotated[
    tuple[tuple[tuple[AttentionName, ...], int | Literal["all"]], ...] | None, BeforeValidator(_check_shape)
]


class RopeScalingKeys(Group):
    """`rope_scaling`, as in a config.json of Hugging Face: {"rope_type": "llama3", "factor": 8.0, ...}."""

    rope_type: Literal["default", "linear", "llama3"] = "default"
    """default: nothing is stretched; linear: all positions are divided by factor; llama3: long wavelengths are
    stretched by factor, short ones stay, those between are blended (Llama 3.1)."""

    factor: Annotated[float, Field(ge=1)] | None = None
    """How far positions are stretched."""

    low_freq_factor: PositiveFloat | None = None
    """llama3: wavelengths above original_max_position_embeddings / low_freq_factor are stretched whole."""

    high_freq_factor: PositiveFloat | None = None
    """llama3: wavelengths below original_max_position_embeddings / high_freq_factor stay as they are."""

    original_max_position_embeddings: PositiveInt | None = None
    """llama3: positions of the model before it was stretched."""


class ParallelismKeys(Group):
    """How the model is cut over ranks; what is left of the ranks is data parallelism."""

    pipe_parallel_size: NotNegativeInt = 0
    """Stages of the pipeline. 0 and 1: no pipeline."""

    model_parallel_size: PositiveInt = 1
    """Tensor-parallel size: ranks that share each matrix."""

    sequence_parallel: bool = False
    """Cut the sequence over the tensor-parallel ranks between their matrices, where norms, dropout and the residual
    stream are; model_parallel_size must divide seq_length. No effect with a model_parallel_size of 1."""

    context_parallel_size: PositiveInt = 1
    """Ranks that share each sequence, for long ones: each has a part of the tokens, and in attention all tokens for a
    part of the heads (Ulysses). Must divide the key/value heads of a rank and seq_length; excludes a pipeline."""

    pipe_partition_method: str = "type:transformer"
    """How layers are dealt to stages: "type:REGEX" balances the layers whose class name matches,
    "parameters" balances parameters, "uniform" counts layers."""


class ModelKeys(Group):
    """The transformer."""

    num_layers: PositiveInt
    """Transformer blocks."""

    hidden_size: PositiveInt
    """Width of the residual stream."""

    num_attention_heads: PositiveInt
    """Query heads. Must divide hidden_size unless head_dim is set, and be divisible by model_parallel_size."""

    head_dim: PositiveInt | None = None
    """Size of each head, where it is not hidden_size / num_attention_heads."""

    num_kv_heads: PositiveInt | None = None
    """Key/value heads (grouped-query attention). Must divide num_attention_heads. Unset: num_attention_heads."""

    ffn_hidden_size: PositiveInt | None = None
    """True width of the feed-forward layer, with a gate or without: what Hugging Face calls intermediate_size.
    Unset: 4 x hidden_size, or 8/3 x hidden_size with a gated activation, rounded up to mlp_multiple_of."""

    intermediate_size: PositiveInt | None = None
    """The same as ffn_hidden_size without a gate. Refused with a gated activation, where GPT-NeoX counts it three
    times."""

    mlp_multiple_of: PositiveInt = 1
    """The width of the feed-forward layer is a multiple of this; the default width is rounded up to it."""

    seq_length: PositiveInt
    """Tokens of one training sample; one more token is read for the last label."""

    max_position_embeddings: PositiveInt | None = None
    """Positions the model can tell apart, at least seq_length. Unset: seq_length."""

    norm: Annotated[str, registered("norm")] = "layernorm"
    """Normalisation of each branch and at the end: layernorm or rmsnorm."""

    norm_placement: Literal["input", "output"] = "input"
    """Where the norm of a branch stands: on its input (GPT-2, Llama), or on its output before it is added (OLMo 2)."""

    qk_norm: Literal["head", "full"] | None = None
    """RMSNorm of queries and keys before positions are turned in: of each head (Qwen 3), or over the width of all
    heads together (OLMo 2). Needs norm: rmsnorm."""

    layernorm_epsilon: PositiveFloat = 1e-5
    """Epsilon of layernorm."""

    rms_norm_epsilon: PositiveFloat = 1e-8
    """Epsilon of rmsnorm."""

    pos_emb: Annotated[str, registered("position_embedding")] = "learned"
    """Position embedding: learned, rotary or none."""

    rotary_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each head that rotary positions turn; the turned part must be an even number of elements."""

    rotary_emb_base: PositiveFloat = 10000
    """Base of the rotary wavelengths."""

    rope_scaling: RopeScalingKeys = RopeScalingKeys()
    """How rotary positions are stretched for longer texts."""

    no_weight_tying: bool = False
    """Give the output layer weights of its own instead of those of the embedding."""

    activation: Annotated[str, registered("activation")] = "gelu"
    """Activation of the feed-forward layer; swiglu, geglu and reglu are gated."""

    gpt_j_residual: bool = False
    """Attention and feed-forward layer read the same input and are added together (parallel residual)."""

    gpt_j_tied: bool = False
    """With gpt_j_residual: one norm for both branches."""

    use_bias_in_attn_linear: bool = True
    """Biases in the projections of attention."""

    use_bias_in_mlp: bool = True
    """Biases in the feed-forward layer."""

    init_method: InitMethod = "normal"
    """Initial weights of all but the output projections: normal, scaled_normal, small_init or wang_init."""

    output_layer_init_method: InitMethod = "scaled_normal"
    """Initial weights of the projections that add to the residual stream."""

    init_method_std: PositiveFloat = 0.02
    """Standard deviation for normal and scaled_normal."""

    attention_config: AttentionConfig = None
    """Kind of attention of each layer, as [[kinds, repetitions], ...]: [[["global", "local"], 6]] is 12 layers in
    turn; "all" repeats over all layers. Kinds: global (torch's SDPA), flash (the package flash-attn), local (a
    sliding window). Unset: all global."""

    sliding_window_width: PositiveInt | None = None
    """Keys that a query of a local layer sees, itself included."""

    attention_dropout: Dropout = 0.0
    """Dropout of attention probabilities."""

    hidden_dropout: Dropout = 0.0
    """Dropout of the embedding and of each branch before it is added."""

    make_vocab_size_divisible_by: PositiveInt = 128
    """The vocabulary is padded up to a multiple of this in memory; model_parallel_size must divide the result."""

    padded_vocab_size: PositiveInt | None = None
    """Rows of the embedding in memory, at least the tokenizer's vocabulary. Unset: derived from the tokenizer, and
    taken as 50304 where no tokenizer can be asked (--dry-run)."""
