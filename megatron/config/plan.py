"""`Plan`: every value derived from a configuration, computed once.

Higher floors read the Plan. It is plain, frozen data without torch, so that a login node can print it.
"""

from dataclasses import dataclass
from math import gcd
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]
AttentionKind = str  # a name of the registry kind "attention_backend"


@dataclass(frozen=True)
class Layout:
    """The arrangement of ranks: `world_size = pipe * data * context * tensor`."""

    world_size: int
    pipe: int  # stages of the pipeline; 1 means no pipeline
    data: int  # data-parallel replicas
    tensor: int  # tensor-parallel size
    context: int = 1  # ranks over which a sequence is sharded
    sequence_parallel: bool = False  # shard the sequence over the tensor-parallel ranks outside the matrices

    @property
    def replicas(self) -> int:
        """Ranks with the same weights, which average gradients and over which ZeRO shards."""
        return self.data * self.context


@dataclass(frozen=True)
class BatchPlan:
    """Sizes in samples: `global_size = micro_size * accumulation_steps * Layout.data`."""

    micro_size: int
    accumulation_steps: int
    global_size: int
    sequence_length: int

    @property
    def tokens_per_step(self) -> int:
        """Labels per optimizer step."""
        return self.global_size * self.sequence_length


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary positions (model/positions.py); which fields a kind uses is in the key rope_scaling."""

    kind: Literal["linear", "dynamic", "yarn", "llama3", "longrope"]
    factor: float
    low_frequency: float = 0.0
    high_frequency: float = 0.0
    original_positions: int = 0
    attention_factor: float | None = None  # None: by the formula of the kind
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class LoraPlan:
    """Low-rank adapters: a linear layer W x becomes W x + alpha / rank * B A x, and only A and B train."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]  # patterns of names of linear layers


@dataclass(frozen=True)
class ModelPlan:
    """The model. Sizes are of the whole model, never of one rank."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_size: int
    ffn_hidden_size: int  # width of the feed-forward layer, without the gate
    vocab_size: int  # ids that the model knows; at least those of the tokenizer
    padded_vocab_size: int  # rows of the embedding in memory; logits beyond vocab_size are -inf
    max_position_embeddings: int
    position_embedding: str  # registry kind "position_embedding", such as learned, rotary or alibi
    rotary_fraction: float
    rotary_base: float
    norm: str  # registry kind "norm"
    norm_epsilon: float
    activation: str  # registry kind "activation"
    parallel_residual: bool
    tied_norm: bool  # parallel residual with one norm for both branches (gpt_j_tied)
    tied_embeddings: bool
    bias_in_query_key_value: bool
    bias_in_dense: bool  # the output projection of attention
    bias_in_mlp: bool
    init_method: str  # registry kind "init_method"
    output_init_method: str
    init_std: float
    attention_kinds: tuple[AttentionKind, ...]  # one for each layer
    sliding_window: int | None  # keys that a query of a "local" layer attends to, including its own
    attention_dropout: float
    hidden_dropout: float
    norm_placement: Literal["input", "output", "both"] = "input"  # of the branches
    norm_bias: bool = True  # of layernorm
    embedding_norm: bool = False
    # of queries and keys: per head with one weight, per head with a weight for each, or over all heads
    qk_norm: Literal["head", "each_head", "full"] | None = None
    position_offset: int = 0  # rows of the learned table before that of position 0
    relative_buckets: int = 32  # of rpe
    relative_distance: int = 128  # of rpe, from which on all tokens share the last bucket
    rotary_interleaved: bool = False  # pairs are neighbouring elements instead of elements of the two halves
    rotary_base_local: float | None = None  # in local layers, without rope_scaling; None: as the others
    layers_without_rotary: tuple[int, ...] = ()
    rope_scaling: RopeScaling | None = None
    head_bias: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    attention_scale: float | None = None  # of the scores; None: 1 / sqrt(head_size)
    attention_softcap: float | None = None
    clip_qkv: float | None = None
    neftune_noise_alpha: float | None = None  # of noise on the token embedding in training; None: no noise
    reset_attention_mask: bool = False  # tokens attend only to their own document
    reset_position_ids: bool = False  # positions restart at each document
    float8: bool = False  # the products of the blocks' linear layers
    lora: LoraPlan | None = None

    def queries_per_key(self, ranks: int) -> int:
        """Query heads for each key/value head on one of `ranks` ranks, which divide the query heads.

        If they do not divide the key/value heads, ranks have copies of them, with fewer queries each.
        """
        return gcd(self.num_attention_heads // self.num_kv_heads, self.num_attention_heads // ranks)

    def kv_heads_on_rank(self, tensor: int, context: int = 1) -> int:
        """Key/value heads of a tensor-parallel rank, copies included; with context parallelism before the exchange."""
        return self.num_attention_heads // tensor // self.queries_per_key(tensor * context)

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether the layers need the document starts."""
        return self.reset_attention_mask or self.reset_position_ids


@dataclass(frozen=True)
class OptimizerPlan:
    """Settings of the optimizer. `kind` is a name in the registry."""

    kind: str
    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    gradient_clipping: float  # 0: off
    skip_update: float | None = None  # deviations of the gradient norm; None: off
    skip_update_window: int = 100  # norms


@dataclass(frozen=True)
class SchedulePlan:
    """Learning rate schedule. `kind`: constant, linear, cosine or exponential (registry kind "lr_schedule")."""

    kind: str
    peak: float
    minimum: float
    warmup_steps: int
    decay_steps: int  # including warm-up


@dataclass(frozen=True)
class LossScalePlan:
    """Loss scale of fp16. `initial` is a power of two when dynamic, the constant scale when static."""

    dynamic: bool
    initial: float
    window: int
    hysteresis: int
    minimum: float


@dataclass(frozen=True)
class EnginePlan:
    """Settings of the engine beyond layout, batch and optimizer."""

    precision: Precision
    zero_stage: int
    zero_options: dict[str, object]  # validated keys of `zero_optimization`, passed to DeepSpeed unchanged
    loss_scale: LossScalePlan | None
    partition_method: str
    recompute_layers: int  # 0: off; N: recompute groups of N blocks
    gradient_accumulation_dtype: Literal["fp32", "bf16", "fp16"] | None
    seed: int
    recompute_selective: bool = False  # store the results of matrix products and attention
    partition_activations: bool = False  # shard stored activations over the tensor-parallel ranks
    checkpoint_in_cpu: bool = False  # store activations in host memory
    fp32_allreduce: bool = False  # replicas average 16-bit gradients in fp32
    asked_stage: int | None = None  # of ZeRO, in the configuration
    compile: bool = False  # blocks and loss, with torch.compile
    async_tensor_parallel: bool = False  # compiled blocks overlap collectives with matrix products
    deterministic: bool = False
    fp32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    freeze: tuple[str, ...] = ()  # patterns of names of parameters that do not train


@dataclass(frozen=True)
class Plan:
    """Everything `resolve` derives from a Config for a world size and a vocabulary."""

    layout: Layout
    batch: BatchPlan
    model: ModelPlan
    optimizer: OptimizerPlan
    schedule: SchedulePlan
    engine: EnginePlan
