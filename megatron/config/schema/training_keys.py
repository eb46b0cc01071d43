"""Training keys: optimizer, precision, ZeRO, batch and steps."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from megatron import registry
from megatron.config.schema.key_group import (
    Fraction,
    Group,
    NotNegativeFloat,
    NotNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    WholeNumber,
    registered,
)

Beta = Annotated[float, Field(ge=0, lt=1)]


def _registered_spelling(value: object) -> object:
    """The optimizer's name in the spelling of the registry, ignoring case."""
    spellings = {name.lower(): name for name in registry.names("optimizer")}
    return spellings.get(value.lower(), value.lower()) if isinstance(value, str) else value


class OptimizerParams(Group):
    """`optimizer.params`."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the first and second moment."""

    eps: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""

    weight_decay: NotNegativeFloat | None = None
    """The same as the key weight_decay; set one of them."""


class OptimizerChoice(Group):
    """`optimizer`: `{type: Adam, params: {lr: 6e-4, betas: [0.9, 0.95], eps: 1e-8}}`."""

    type: Annotated[str, BeforeValidator(_registered_spelling), registered("optimizer")] = "adam"
    """Adam and AdamW are both AdamW (decoupled weight decay); SGD has L2 weight decay: added to the gradient after
    clipping, and thus part of the momentum. Case is ignored."""

    params: OptimizerParams = OptimizerParams()
    """Settings of the optimizer."""


class OptimizerKeys(Group):
    """Optimizer and learning rate."""

    optimizer: OptimizerChoice = OptimizerChoice()
    """Type and params."""

    weight_decay: NotNegativeFloat = 0.1
    """Weight decay of matrices, decoupled with Adam and L2 with SGD; not applied to norms and biases."""

    gradient_clipping: NotNegativeFloat = 1.0
    """Maximum global gradient norm; 0: no clipping."""

    lr_decay_style: Annotated[str, registered("lr_schedule")] = "linear"
    """Schedule after warm-up: constant, linear or cosine (both from the peak to min_lr), exponential (to half of the
    peak, but not below min_lr)."""

    lr_decay_iters: PositiveInt | None = None
    """Steps, including warm-up, until the learning rate is min_lr. Unset: lr_decay_fraction, or train_iters."""

    lr_decay_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """lr_decay_iters as a fraction of train_iters."""

    min_lr: NotNegativeFloat = 0.0
    """Learning rate at the end of the decay."""

    warmup: Fraction = 0.01
    """Linear warm-up, as a fraction of the decay steps."""


def _pattern(text: str) -> str:
    """A regular expression."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f'"{text}" is not a regular expression: {error}') from error
    return text


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_pattern)]


class LoraKeys(Group):
    """`lora`: low-rank adapters (LoRA): `{rank: 8, alpha: 16, targets: [query, value]}`."""

    rank: NotNegativeInt = 0
    """Rank of the matrices A and B of an adapter; 0: no adapters."""

    alpha: PositiveFloat = 16.0
    """Adapters are multiplied by alpha / rank."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the inputs of the adapters, in training."""

    targets: Annotated[tuple[Pattern, ...], Field(min_length=1)] = ("query_key_value",)
    """Linear layers with an adapter, by regular expressions for whole parts of their global names:
    attention.query_key_value (one adapter for all three, as in GPT-NeoX and GPT-2), or attention.query, attention.key
    and attention.value (one for each, as in Llama), attention.dense, mlp.gate, mlp.up and mlp.down."""

    base: PathText | None = None
    """The base of the adapters that load names: a folder of checkpoints, or hf:MODEL. Unset: where it was when they
    were trained, or load if that is hf:MODEL. Its content must be the same."""


class TuningKeys(Group):
    """Training a part of a model that is already trained."""

    freeze: tuple[Pattern, ...] = ()
    """Parameters that do not train: they have no gradient and no optimizer state, and checkpoints hold them as ever, in
    the format of the weights. Each entry is a regular expression for whole parts of a global name, such as embedding,
    norm.*, mlp.up or blocks.[0-3] (which is blocks 0 to 3 only); inspect_checkpoint.py prints the names."""

    lora: LoraKeys = LoraKeys()
    """Train low-rank adapters of linear layers, with all other parameters frozen: load names the base, with finetune,
    or as hf:MODEL. Checkpoints hold the adapters and their optimizer state, and name their base, which is loaded with
    them; save_hf has them merged."""


class Fp16Keys(Group):
    """`fp16`."""

    enabled: bool | None = None
    """Train in fp16 with loss scaling."""

    loss_scale: NotNegativeFloat = 0.0
    """Constant loss scale; 0: dynamic."""

    loss_scale_window: PositiveInt = 1000
    """Steps without overflow before a dynamic scale is doubled."""

    hysteresis: PositiveInt = 2
    """Overflows before a dynamic scale is halved."""

    min_loss_scale: PositiveFloat = 1.0
    """Minimum dynamic scale."""

    initial_scale_power: Annotated[WholeNumber, Field(ge=0, le=127)] = 12
    """A dynamic scale starts at 2 to this power."""


class Bf16Keys(Group):
    """`bf16`."""

    enabled: bool | None = None
    """Train in bfloat16 with fp32 master weights."""


class DataTypes(Group):
    """`data_types`."""

    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Type in which gradients of micro-batches are accumulated. Unset: fp32 with bf16 weights, else that of the
    weights. Replicas average their gradients in fp32 too, unless fp32_allreduce is false."""


class PrecisionKeys(Group):
    """Number formats. Default: fp32."""

    precision: Literal["fp32", "fp16", "bfloat16"] | None = None
    """Format of weights and activations. Unset: from fp16 and bf16, else fp32."""

    precision_linear: Literal["float8"] | None = None
    """float8: the matrix products of the blocks' linear layers in float8, forward and backward, each tensor scaled by
    its largest element; meant for large layers with compile, which fuses the casts. Weights and checkpoints stay as
    they are, and generation and evaluation do not use it. Needs precision bfloat16, a GPU of compute capability 8.9 or
    above, and widths divisible by 16. Unset: in the format of the weights."""

    fp16: Fp16Keys = Fp16Keys()
    """fp16 and its loss scale."""

    bf16: Bf16Keys = Bf16Keys()
    """bfloat16."""

    data_types: DataTypes = DataTypes()
    """Other formats."""


class OffloadKeys(Group):
    """`zero_optimization.offload_optimizer` and `.offload_param`."""

    device: Literal["none", "cpu"] = "none"
    """cpu: kept in host memory."""

    pin_memory: bool = True
    """Use pinned memory, for faster copies; false if the limit of locked memory is low."""


class ZeroKeys(Group):
    """`zero_optimization`: DeepSpeed's ZeRO."""

    stage: Annotated[WholeNumber, Field(ge=0, le=3)] = 0
    """0: off; 1: optimizer states, 2: and gradients, 3: and parameters are sharded over data-parallel ranks.
    2 and 3 exclude a pipeline. 1 and 2 run as 0 with a single replica. 1 runs as 2 with bf16 gradients summed in fp32
    if there is one micro-batch, or if whole sums would not fit gpu_memory; the start-up lines say so."""

    allgather_partitions: bool = True
    """Collect updated parameters by all-gather instead of broadcasts."""

    allgather_bucket_size: PositiveInt = 500_000_000
    """Elements gathered at a time."""

    overlap_comm: bool | None = None
    """Reduce gradients during the backward pass. Unset: in stage 3 only. No effect in stage 0, with a pipeline, and in
    stage 1 with bf16 gradients summed in fp32, which are reduced once, after the last backward pass."""

    reduce_scatter: bool = True
    """Average gradients by reduce-scatter instead of all-reduce."""

    reduce_bucket_size: PositiveInt = 500_000_000
    """Elements reduced at a time."""

    contiguous_gradients: bool = True
    """Copy gradients into one buffer as they are produced."""

    round_robin_gradients: bool = False
    """Stages 1 and 2: assign gradients to ranks in turn."""

    sub_group_size: PositiveInt = 1_000_000_000
    """Stage 3: elements that one optimizer update handles at a time."""

    stage3_prefetch_bucket_size: PositiveInt = 50_000_000
    """Stage 3: elements that are prefetched."""

    stage3_param_persistence_threshold: PositiveInt = 100_000
    """Stage 3: smaller parameters are not sharded."""

    stage3_max_live_parameters: PositiveInt = 1_000_000_000
    """Stage 3: maximum number of elements that are gathered at a time."""

    stage3_max_reuse_distance: PositiveInt = 1_000_000_000
    """Stage 3: a parameter that is reused within this many elements is not released."""

    offload_optimizer: OffloadKeys = OffloadKeys()
    """Stages 1 to 3: keep fp32 weights and optimizer states in host memory and run the update on the CPU."""

    offload_param: OffloadKeys = OffloadKeys()
    """Stage 3: keep weights in host memory, and on the device only while they are used."""


class EngineKeys(Group):
    """Memory and speed."""

    fp32_allreduce: bool | None = None
    """Average 16-bit gradients over replicas in fp32: twice the traffic, less rounding. Unset: where the gradients of
    micro-batches are summed in fp32."""

    zero_optimization: ZeroKeys = ZeroKeys()
    """Sharding of optimizer states, gradients and parameters."""

    checkpoint_activations: bool = False
    """Recompute activations in the backward pass instead of storing them."""

    checkpoint_num_layers: PositiveInt = 1
    """Number of blocks that are recomputed together."""

    recompute_granularity: Literal["full", "selective"] = "full"
    """With checkpoint_activations: full stores only the input of each group of blocks; selective also stores the
    results of matrix products and attention, which are expensive to recompute. With ZeRO 3 it needs compile. Compiled
    blocks are recomputed one by one, and not with partition_activations or checkpoint_in_cpu."""

    partition_activations: bool = False
    """With checkpoint_activations: shard stored activations over the tensor-parallel ranks, and gather them for use."""

    checkpoint_in_cpu: bool = False
    """With checkpoint_activations: store the inputs in host memory."""

    compile: bool | None = None
    """Compile blocks and loss with torch.compile. Unset: if a micro-batch is large enough to benefit (10^11 FLOPs per
    rank)."""

    async_tensor_parallel: bool = False
    """With compile and sequence_parallel: split each all-gather and the matrix product after it into one part per rank,
    and each matrix product and the reduce-scatter after it, and overlap communication with computation, by torch's
    symmetric memory (experimental in torch). Needs GPUs connected by NVLink, and takes a buffer of a gathered input.
    Products with a bias are not overlapped with the all-gather before them."""


class BatchKeys(Group):
    """Batch sizes in samples. Two determine the third; with only one, accumulation is 1."""

    train_batch_size: PositiveInt | None = None
    """Samples of one optimizer step, over all ranks."""

    train_micro_batch_size_per_gpu: PositiveInt | None = None
    """Samples that a data-parallel replica processes at a time."""

    gradient_accumulation_steps: PositiveInt | None = None
    """Micro-batches of one optimizer step."""


class TrainingKeys(Group):
    """Length, validation and seed of a run."""

    train_iters: PositiveInt | None = None
    """Optimizer steps of the run. Required for training."""

    eval_interval: PositiveInt = 1000
    """Steps between validations."""

    eval_iters: NotNegativeInt = 100
    """Batches of each validation, always the same ones; 0: no validation."""

    seed: NotNegativeInt = 1234
    """Seed of initial weights, data order, dropout and sampling."""

    deterministic: bool = False
    """Bitwise reproducible results on GPUs, at some speed: use deterministic kernels, and fail where an operation has
    none. Results on CPUs are always reproducible."""

    fp32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """How products of fp32 matrices are computed (torch.set_float32_matmul_precision). highest: in fp32; high: in TF32
    on NVIDIA GPUs since Ampere, which reads 10 of the 23 bits of a mantissa and is up to eight times as fast; medium:
    as high, and in bfloat16 on CPUs that have it. The default is torch's: with it alone a GPU agrees with a CPU, and a
    layout with another, to fp32's rounding. With 16-bit weights hardly any product is in fp32."""

    exit_interval: PositiveInt | None = None
    """End the run, with a checkpoint, at the first step that is a multiple of this."""
