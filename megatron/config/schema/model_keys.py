"""Keys of the model and its parallelism."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron.config.schema.key_group import Group, NotNegativeInt, PositiveFloat, PositiveInt, WholeNumber, registered

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

    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"] = "default"
    """default: no scaling; linear: all positions are divided by factor; dynamic: the base grows with the length of a
    sequence beyond original_max_position_embeddings; yarn: wavelengths are scaled by the turns they make within
    original_max_position_embeddings (beta_fast, beta_slow); llama3: long wavelengths are scaled by factor, short ones
    are unchanged, and those in between are interpolated (Llama 3.1); longrope: each wavelength has a factor of its own
    (Phi-3). dynamic and longrope go by the length of a sequence as it is read, in generation with all the tokens that
    may follow."""

    factor: Annotated[float, Field(ge=1)] | None = None
    """Scaling factor. longrope: max_position_embeddings / original_max_position_embeddings of the published model, from
    which attention_factor follows."""

    original_max_position_embeddings: PositiveInt | None = None
    """Positions of the model before scaling (all but linear). dynamic: max_position_embeddings in the config.json."""

    low_freq_factor: PositiveFloat | None = None
    """llama3: wavelengths above original_max_position_embeddings / low_freq_factor are fully scaled."""

    high_freq_factor: PositiveFloat | None = None
    """llama3: wavelengths below original_max_position_embeddings / high_freq_factor are unchanged."""

    attention_factor: PositiveFloat | None = None
    """Factor of rotated queries and keys (yarn, longrope). Unset: 0.1 ln(factor) + 1 with yarn, and
    sqrt(1 + ln(factor) / ln(original_max_position_embeddings)) with longrope."""

    beta_fast: PositiveFloat | None = None
    """yarn: wavelengths of more turns are unchanged. Unset: 32."""

    beta_slow: PositiveFloat | None = None
    """yarn: wavelengths of fewer turns are scaled by factor. Unset: 1."""

    mscale: PositiveFloat | None = None
    """yarn: with mscale_all_dim, attention_factor is (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)
    (DeepSeek)."""

    mscale_all_dim: PositiveFloat | None = None
    """yarn: see mscale."""

    truncate: bool | None = None
    """yarn: round the first and the last pair between beta_fast and beta_slow outwards to whole ones. Unset: true."""

    short_factor: tuple[PositiveFloat, ...] | None = None
    """longrope: the factor of each wavelength in sequences up to original_max_position_embeddings."""

    long_factor: tuple[PositiveFloat, ...] | None = None
    """longrope: the factor of each wavelength in longer sequences."""


class ParallelismKeys(Group):
    """How the model is split over ranks; the remaining factor of the ranks is data parallelism."""

    pipe_parallel_size: NotNegativeInt = 0
    """Stages of the pipeline. 0 and 1: no pipeline."""

    model_parallel_size: PositiveInt = 1
    """Tensor-parallel size: ranks over which each matrix is sharded."""

    sequence_parallel: bool = False
    """Shard the sequence over the tensor-parallel ranks outside the matrices: in norms, dropout and the residual
    stream. model_parallel_size must divide seq_length. No effect if model_parallel_size is 1."""

    context_parallel_size: PositiveInt = 1
    """Ranks over which each sequence is sharded, for long sequences: each holds a slice of the tokens, and in attention
    all tokens of a subset of the heads (Ulysses). Must divide the query heads of a rank and seq_length; excludes a
    pipeline."""

    pipe_partition_method: str = "type:transformer"
    """How layers are assigned to stages: "type:REGEX" balances the layers whose class name matches,
    "parameters" balances parameters, "uniform" balances the number of layers."""


class ModelKeys(Group):
    """The transformer."""

    num_layers: Annotated[WholeNumber, Field(gt=0, le=100_000)]
    """Transformer blocks."""

    hidden_size: PositiveInt
    """Width of the residual stream."""

    num_attention_heads: PositiveInt
    """Query heads. Must divide hidden_size unless head_dim is set, and be divisible by model_parallel_size."""

    head_dim: PositiveInt | None = None
    """Size of each head. Unset: hidden_size / num_attention_heads."""

    num_kv_heads: PositiveInt | None = None
    """Key/value heads (grouped-query attention). Must divide num_attention_heads; model_parallel_size may be larger, or
    not divide them. Unset: num_attention_heads."""

    ffn_hidden_size: PositiveInt | None = None
    """Width of the feed-forward layer, gated or not, as intermediate_size in Hugging Face.
    Unset: 4 x hidden_size, or 8/3 x hidden_size with a gated activation, rounded up to mlp_multiple_of."""

    intermediate_size: PositiveInt | None = None
    """The same as ffn_hidden_size, for activations without a gate. Refused with a gated activation, for which GPT-NeoX
    counts it three times."""

    mlp_multiple_of: PositiveInt = 1
    """The width of the feed-forward layer must be a multiple of this; the default width is rounded up."""

    seq_length: PositiveInt
    """Tokens of a training sample; one more token is read for the last label."""

    max_position_embeddings: PositiveInt | None = None
    """Number of positions, at least seq_length. Unset: seq_length."""

    norm: Annotated[str, registered("norm")] = "layernorm"
    """Norm of each branch and of the output: layernorm, rmsnorm, rmsnorm_1p (it multiplies by 1 + weight: Gemma),
    non_parametric_layernorm (without weight and bias: OLMo 1) or scalenorm (the vector divided by its length, times one
    learned factor)."""

    norm_bias: bool = True
    """Biases in layernorm (MPT, Cohere: false). The other norms have none."""

    norm_placement: Literal["input", "output", "both"] = "input"
    """Normalize the input of each branch (GPT-2, Llama), its output before it is added (OLMo 2), or both (Gemma 2)."""

    embedding_norm: bool = False
    """Normalize the output of the embedding (BLOOM)."""

    qk_norm: Literal["head", "each_head", "full"] | None = None
    """Norm of queries and keys before rotary positions, of the kind that norm names: per head with one weight for all
    heads (Qwen 3, Gemma 3, Phi), per head with a weight for each head and no bias (StableLM, Cohere), or over all heads
    together (OLMo 2)."""

    layernorm_epsilon: PositiveFloat = 1e-5
    """Epsilon of layernorm and non_parametric_layernorm, added to the variance."""

    rms_norm_epsilon: PositiveFloat = 1e-8
    """Epsilon of rmsnorm and rmsnorm_1p, added to the mean square."""

    scalenorm_epsilon: PositiveFloat = 1e-8
    """Smallest length by which scalenorm divides."""

    pos_emb: Annotated[str, registered("position_embedding")] = "learned"
    """Position embedding: learned, sinusoidal, rotary, alibi (linear biases: BLOOM, MPT), alibi_bf16 (the same, rounded
    and scaled as in Falcon-RW), rpe (learned relative biases in each layer: T5) or none."""

    position_offset: NotNegativeInt = 0
    """Rows of the learned table before that of position 0 (OPT: 2)."""

    rpe_num_buckets: PositiveInt = 32
    """Buckets of relative distances (rpe), half of which hold one distance each."""

    rpe_max_distance: PositiveInt = 128
    """Distance from which on all tokens share the last bucket (rpe)."""

    rotary_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of each head that rotary positions rotate, an even number of elements."""

    rotary_emb_base: PositiveFloat = 10000
    """Base of the rotary wavelengths."""

    rotary_interleaved: bool = False
    """Rotate neighbouring elements of a head (GPT-J, Cohere) instead of elements of its two halves."""

    rotary_emb_base_local: PositiveFloat | None = None
    """Base of the rotary wavelengths in local layers, to which rope_scaling does not apply then (Gemma 3).
    Unset: local layers rotate as the others."""

    no_rope_layer_interval: Annotated[int, Field(ge=2)] | None = None
    """Every n-th layer has no rotary positions (SmolLM 3: 4). Unset: all layers have them."""

    rope_scaling: RopeScalingKeys = RopeScalingKeys()
    """Scaling of rotary positions for longer sequences."""

    no_weight_tying: bool = False
    """Give the output layer its own weights instead of those of the embedding."""

    head_bias: bool = False
    """A bias in the output layer (GPT-J, Phi). Requires no_weight_tying."""

    embedding_multiplier: PositiveFloat = 1.0
    """Factor of the token embedding (Gemma: the square root of hidden_size; Granite)."""

    residual_multiplier: PositiveFloat = 1.0
    """Factor of the output of each branch before it is added (Granite)."""

    logit_multiplier: PositiveFloat = 1.0
    """Factor of the logits (Cohere's logit_scale; 1 / logits_scaling of Granite)."""

    final_logit_softcapping: PositiveFloat | None = None
    """Cap c of the logits: c * tanh(logits / c) (Gemma 2). Unset: no cap."""

    activation: Annotated[str, registered("activation")] = "gelu"
    """Activation of the feed-forward layer: gelu, gelu_tanh, relu, silu, mish or softsign; with a gate swiglu, geglu,
    geglu_tanh (Gemma), reglu, glu or bilinear, which compute function(gate) * up."""

    gpt_j_residual: bool = False
    """Parallel residual: attention and feed-forward layer read the same input and their outputs are added."""

    gpt_j_tied: bool = False
    """With gpt_j_residual: one norm for both branches."""

    use_bias_in_attn_linear: bool = True
    """Biases in the attention projections."""

    use_bias_in_qkv: bool | None = None
    """Biases in the projection to queries, keys and values alone (Qwen 2: true, with use_bias_in_attn_linear false).
    Unset: as use_bias_in_attn_linear."""

    use_bias_in_mlp: bool = True
    """Biases in the feed-forward layer."""

    init_method: InitMethod = "normal"
    """Initialization of all weights except output projections: normal, scaled_normal, single_residual_scaled_normal,
    small_init, wang_init, xavier_normal, xavier_uniform, orthogonal or scaled_orthogonal. The last two factorize whole
    matrices on every rank that holds a part of them: one of 4096 x 4096 takes 10 seconds of a core, an embedding of
    50,000 rows of that width two minutes."""

    output_layer_init_method: InitMethod = "scaled_normal"
    """Initialization of the projections into the residual stream."""

    init_method_std: PositiveFloat = 0.02
    """Standard deviation of normal, which scaled_normal divides by sqrt(2 x num_layers) and
    single_residual_scaled_normal by sqrt(num_layers)."""

    attention_config: AttentionConfig = None
    """Attention of each layer, as [[kinds, repetitions], ...]: [[["global", "local"], 6]] is 12 alternating layers;
    "all" repeats over all layers. Kinds: global (torch's SDPA), flash (the fastest kernel for the GPU: FlashAttention-3
    on Hopper if installed, else cuDNN's in torch's SDPA; the package flash-attn elsewhere), local (sliding window).
    Unset: all global."""

    sliding_window_width: PositiveInt | None = None
    """Keys that a query of a local layer attends to, including its own."""

    attention_scale: PositiveFloat | None = None
    """Factor of the attention scores (Granite, Gemma 2; GPT-Neo: 1). Unset: 1 / sqrt(head_dim)."""

    attn_logit_softcapping: PositiveFloat | None = None
    """Cap c of the scaled attention scores: c * tanh(scores / c) (Gemma 2). Unset: no cap."""

    clip_qkv: PositiveFloat | None = None
    """Queries, keys and values are clamped to +-this (OLMo 1, MPT). Unset: not clamped."""

    attention_dropout: Dropout = 0.0
    """Dropout of attention probabilities."""

    hidden_dropout: Dropout = 0.0
    """Dropout of the embedding and of the output of each branch."""

    neftune_noise_alpha: PositiveFloat | None = None
    """Noise on the token embedding in training, for fine-tuning on instructions (NEFTune): each element is moved by a
    random number of at most this / sqrt(seq_length x hidden_size). 5 to 15 are usual. Unset: no noise."""

    vocab_size: PositiveInt | None = None
    """Ids that the model knows: rows of its embedding in a checkpoint, at least the tokenizer's vocabulary. Published
    models often have more rows than their tokenizer has ids. Unset: the tokenizer's vocabulary."""

    make_vocab_size_divisible_by: PositiveInt = 128
    """The vocabulary is padded to a multiple of this in memory; model_parallel_size must divide the result."""

    padded_vocab_size: PositiveInt | None = None
    """Rows of the embedding in memory, at least vocab_size. Unset: derived from vocab_size or the tokenizer;
    --dry-run assumes 50304."""
