"""Derive a Plan from a Config: `resolve(config, world_size, vocab_size)`.

A pure function: the same arguments give the same Plan on every rank. Every derived value is computed here.
"""

from collections.abc import Iterator

from megatron.config.errors import ConfigError
from megatron.config.flops import common_flops
from megatron.config.gradient_reduction import stage_for_whole_sums
from megatron.config.parameter_counts import MOMENTS, held_parameters, layer_parameters
from megatron.config.parameter_shapes import ALL_BUT_ADAPTERS, layer_shapes, target_names, trained_parameters, unmatched
from megatron.config.pipeline_stages import stage_layers
from megatron.config.plan import (
    BatchPlan,
    EnginePlan,
    Layout,
    LoraPlan,
    LossScalePlan,
    ModelPlan,
    OptimizerPlan,
    Plan,
    Precision,
    RopeScaling,
    SchedulePlan,
)
from megatron.config.precision import resolve_precision
from megatron.config.schema.config import Config
from megatron.config.widths import (
    attention_names,
    feed_forward_width,
    head_size,
    layers_without_rotary,
    norm_epsilon,
    round_up,
)

WORTH_COMPILING = 1e11  # FLOPs of a micro-batch on one rank; test models are far below, 19M parameters above


def resolve(config: Config, world_size: int, vocab_size: int, *, inference: bool = False) -> Plan:
    """Derive everything from a checked Config.

    world_size: ranks of the run. vocab_size: ids that the tokenizer can produce; the key vocab_size may add more.
    inference: the layout for generation and evaluation: whole sequences, a pipeline only if its stages fit the ranks,
    micro-batch 1 by default.
    Raises ConfigError with every rule that the ranks or the vocabulary break.
    """
    problems: list[str] = []
    layout = _layout(config, world_size, inference, problems)
    vocab_size = _vocabulary(config, vocab_size, problems)
    rows = _vocabulary_rows(config, vocab_size, problems)
    batch = _batch(config, layout.data, inference, problems)
    if problems:
        raise ConfigError(f"the configuration for {world_size} ranks", problems)
    model = _model(config, vocab_size, rows, inference)
    engine = _engine(config, model, layout, batch, _compiles(config, model, layout, batch))
    plan = Plan(layout, batch, model, _optimizer(config), schedule_of(config), engine)
    if not inference and (problems := list(_tuning_problems(plan))):
        raise ConfigError(f"the configuration for {world_size} ranks", problems)
    return plan


def _tuning_problems(plan: Plan) -> Iterator[str]:
    """What is wrong with the choice of parameters that train."""
    freeze, layers = plan.engine.freeze, layer_shapes(plan.model)
    if not freeze:
        return
    names = [name for shapes in layers for name in shapes]
    yield from unmatched("freeze", [p for p in freeze if p != ALL_BUT_ADAPTERS], names)
    lora = plan.model.lora
    if lora and (problems := list(unmatched("lora.targets", lora.targets, target_names(plan.model)))):
        yield from problems
        return
    chosen = ("lora.targets", lora.targets) if lora else ("freeze", freeze)
    stages = stage_layers(plan)
    for number, held in enumerate(stages):
        if trained_parameters(plan.model, freeze, 1, held) == 0:
            where, way = "", "freeze less"
            if len(stages) > 1:
                where = f" of stage {number} of the pipeline"
                way = f"freeze less, or lower pipe_parallel_size ({len(stages)}): each stage has to train something"
            yield f"{chosen[0]} ({', '.join(chosen[1])}) leaves no parameter{where} to train; {way}"


def padded_vocabulary(config: Config, vocab_size: int) -> int:
    """Rows of the embedding in memory for `vocab_size` ids."""
    return config.model.padded_vocab_size or round_up(vocab_size, config.model.make_vocab_size_divisible_by)


def _layout(config: Config, world_size: int, inference: bool, problems: list[str]) -> Layout:
    keys = config.parallelism
    pipe = max(1, keys.pipe_parallel_size)
    if inference and world_size % (pipe * keys.model_parallel_size):
        pipe = 1  # a model trained in a pipeline is often tried on fewer ranks
    context, sequence_parallel = (1, False) if inference else (keys.context_parallel_size, keys.sequence_parallel)
    tensor = keys.model_parallel_size
    taken = pipe * context * tensor
    if world_size % taken:
        shared = f"context_parallel_size ({context}) x " if context > 1 else ""
        problems.append(
            f"{world_size} ranks cannot be divided by pipe_parallel_size ({pipe}) x {shared}model_parallel_size "
            f"({tensor}); num_gpus {taken} or a multiple of it would work"
        )
    return Layout(world_size, pipe, max(1, world_size // taken), tensor, context, sequence_parallel and tensor > 1)


def _vocabulary(config: Config, tokenizer_ids: int, problems: list[str]) -> int:
    size = config.model.vocab_size or tokenizer_ids
    if size < tokenizer_ids:
        problems.append(
            f"the tokenizer has {tokenizer_ids} ids, more than vocab_size ({size}); it is another model's, or has "
            "added tokens without a row in the embedding: these are left out where the model's config.json is beside it"
        )
    return size


def _vocabulary_rows(config: Config, vocab_size: int, problems: list[str]) -> int:
    rows, split = padded_vocabulary(config, vocab_size), config.parallelism.model_parallel_size
    if rows < vocab_size:
        problems.append(
            f"{_source_of_ids(config)} {vocab_size} ids, more than padded_vocab_size ({rows}); "
            "leave padded_vocab_size out"
        )
    if rows % split:
        multiple = config.model.make_vocab_size_divisible_by
        problems.append(
            f"the padded vocabulary ({rows}) must be divisible by model_parallel_size ({split}); "
            f"make_vocab_size_divisible_by {round_up(multiple, split)} would work"
        )
    return rows


def _source_of_ids(config: Config) -> str:
    return "the tokenizer has" if config.model.vocab_size is None else "vocab_size means"


def _batch(config: Config, data: int, inference: bool, problems: list[str]) -> BatchPlan:
    """The batch sizes, global = micro x accumulation x data: two determine the third; accumulation is 1 by default."""
    keys, length = config.batch, config.model.seq_length
    whole, micro, steps = keys.train_batch_size, keys.train_micro_batch_size_per_gpu, keys.gradient_accumulation_steps
    if inference:
        return BatchPlan(micro or 1, 1, (micro or 1) * data, length)
    if whole is None:
        micro, steps = micro or 1, steps or 1
        return BatchPlan(micro, steps, micro * steps * data, length)
    if micro is not None and steps is not None and micro * steps * data != whole:
        fitting = f"{whole // (micro * steps)} replicas would give {whole}, or " if whole % (micro * steps) == 0 else ""
        problems.append(
            f"train_batch_size ({whole}) is not train_micro_batch_size_per_gpu ({micro}) x gradient_accumulation_steps "
            f"({steps}) x {data} data-parallel replicas = {micro * steps * data}; {fitting}leave one of the three out"
        )
    elif micro is None:
        steps = steps or 1
        micro = _share(whole, {"gradient_accumulation_steps": steps}, data, problems)
    elif steps is None:
        steps = _share(whole, {"train_micro_batch_size_per_gpu": micro}, data, problems)
    return BatchPlan(micro, steps or 1, whole, length)


def _share(whole: int, other: dict[str, int], data: int, problems: list[str]) -> int:
    """`whole / (other x data)`, which must be a whole number."""
    name, value = next(iter(other.items()))
    unit = value * data
    if whole % unit:
        problems.append(
            f"train_batch_size ({whole}) must be divisible by {name} ({value}) x {data} data-parallel replicas "
            f"= {unit}; {round_up(whole, unit)} would work"
        )
    return max(1, whole // unit)


def _model(config: Config, vocab_size: int, rows: int, inference: bool) -> ModelPlan:
    keys = config.model
    return ModelPlan(
        num_layers=keys.num_layers,
        hidden_size=keys.hidden_size,
        num_attention_heads=keys.num_attention_heads,
        num_kv_heads=keys.num_kv_heads or keys.num_attention_heads,
        head_size=head_size(keys),
        ffn_hidden_size=feed_forward_width(keys),
        vocab_size=vocab_size,
        padded_vocab_size=rows,
        max_position_embeddings=keys.max_position_embeddings or keys.seq_length,
        position_embedding=keys.pos_emb,
        rotary_fraction=keys.rotary_pct,
        rotary_base=keys.rotary_emb_base,
        norm=keys.norm,
        norm_epsilon=norm_epsilon(keys),
        activation=keys.activation,
        parallel_residual=keys.gpt_j_residual,
        tied_norm=keys.gpt_j_tied,
        tied_embeddings=not keys.no_weight_tying,
        bias_in_query_key_value=keys.use_bias_in_attn_linear if keys.use_bias_in_qkv is None else keys.use_bias_in_qkv,
        bias_in_dense=keys.use_bias_in_attn_linear,
        bias_in_mlp=keys.use_bias_in_mlp,
        init_method=keys.init_method,
        output_init_method=keys.output_layer_init_method,
        init_std=keys.init_method_std,
        attention_kinds=attention_names(keys),
        sliding_window=keys.sliding_window_width,
        attention_dropout=keys.attention_dropout,
        hidden_dropout=keys.hidden_dropout,
        neftune_noise_alpha=keys.neftune_noise_alpha,
        norm_placement=keys.norm_placement,
        norm_bias=keys.norm_bias,
        embedding_norm=keys.embedding_norm,
        qk_norm=keys.qk_norm,
        position_offset=keys.position_offset,
        relative_buckets=keys.rpe_num_buckets,
        relative_distance=keys.rpe_max_distance,
        rotary_interleaved=keys.rotary_interleaved,
        rotary_base_local=keys.rotary_emb_base_local,
        layers_without_rotary=layers_without_rotary(keys),
        rope_scaling=_rope_scaling(config),
        head_bias=keys.head_bias,
        embedding_multiplier=keys.embedding_multiplier,
        residual_multiplier=keys.residual_multiplier,
        logit_multiplier=keys.logit_multiplier,
        logit_softcap=keys.final_logit_softcapping,
        attention_scale=keys.attention_scale,
        attention_softcap=keys.attn_logit_softcapping,
        clip_qkv=keys.clip_qkv,
        reset_attention_mask=config.data.reset_attention_mask,
        reset_position_ids=config.data.reset_position_ids,
        float8=config.precision.precision_linear == "float8" and not inference,
        lora=_lora(config),
    )


def _lora(config: Config) -> LoraPlan | None:
    keys = config.tuning.lora
    return LoraPlan(keys.rank, keys.alpha, keys.dropout, keys.targets) if keys.rank else None


def _frozen(config: Config) -> tuple[str, ...]:
    return config.tuning.freeze + ((ALL_BUT_ADAPTERS,) if config.tuning.lora.rank else ())


def _rope_scaling(config: Config) -> RopeScaling | None:
    keys = config.model.rope_scaling
    if keys.rope_type == "default":
        return None
    return RopeScaling(
        kind=keys.rope_type,
        factor=keys.factor or 1.0,
        low_frequency=keys.low_freq_factor or 0.0,
        high_frequency=keys.high_freq_factor or 0.0,
        original_positions=keys.original_max_position_embeddings or 0,
        attention_factor=keys.attention_factor,
        beta_fast=keys.beta_fast or 32.0,
        beta_slow=keys.beta_slow or 1.0,
        mscale=keys.mscale,
        mscale_all_dim=keys.mscale_all_dim,
        truncate=keys.truncate is not False,
        short_factors=keys.short_factor or (),
        long_factors=keys.long_factor or (),
    )


def _optimizer(config: Config) -> OptimizerPlan:
    params = config.optimizer.optimizer.params
    return OptimizerPlan(
        kind=config.optimizer.optimizer.type,
        learning_rate=params.lr,
        betas=params.betas,
        epsilon=params.eps,
        weight_decay=config.optimizer.weight_decay if params.weight_decay is None else params.weight_decay,
        gradient_clipping=config.optimizer.gradient_clipping,
        skip_update=config.recovery.skip_update,
        skip_update_window=config.recovery.skip_update_window,
    )


def decay_steps(config: Config) -> int:
    """Steps until the learning rate is minimal, including warm-up; 0 if no key sets them."""
    keys, steps = config.optimizer, config.training.train_iters or 0
    if keys.lr_decay_fraction is not None:
        return round(keys.lr_decay_fraction * steps)
    return keys.lr_decay_iters or steps


def schedule_of(config: Config) -> SchedulePlan:
    """The learning rate over the steps of a run."""
    keys, steps = config.optimizer, decay_steps(config)
    return SchedulePlan(keys.lr_decay_style, keys.optimizer.params.lr, keys.min_lr, round(keys.warmup * steps), steps)


def _compiles(config: Config, model: ModelPlan, layout: Layout, batch: BatchPlan) -> bool:
    if config.engine.compile is not None:
        return config.engine.compile
    keys = config.engine
    if keys.recompute_granularity == "selective" and (keys.partition_activations or keys.checkpoint_in_cpu):
        return False
    flops = common_flops(model, batch.sequence_length) * batch.micro_size * batch.sequence_length
    return flops / (layout.pipe * layout.tensor * layout.context) >= WORTH_COMPILING


def _engine(config: Config, model: ModelPlan, layout: Layout, batch: BatchPlan, compile: bool) -> EnginePlan:
    precision, keys = resolve_precision(config.precision), config.engine
    sum_type = config.precision.data_types.grad_accum_dtype
    if sum_type is None and precision == "bf16" and batch.accumulation_steps > 1:
        sum_type = "fp32"  # bf16 sums have a relative error of 2 ** -9
    stage = _stage_that_runs(config, precision, layout.replicas)
    whole_sums = stage == 1 and precision == "bf16" and sum_type == "fp32"
    if whole_sums and keys.zero_optimization.offload_optimizer.device == "none":
        layers = range(len(layer_parameters(model)))
        parameters = held_parameters(model, layout.tensor, layers)
        if freeze := _frozen(config):
            parameters = trained_parameters(model, freeze, layout.tensor, layers)
        moments = MOMENTS.get(config.optimizer.optimizer.type, 2)
        stage = stage_for_whole_sums(parameters, moments, layout, batch, config.launcher.gpu_memory)
    in_fp32 = precision != "fp32" and sum_type == "fp32"
    return EnginePlan(
        precision=precision,
        zero_stage=stage,
        asked_stage=keys.zero_optimization.stage,
        zero_options=keys.zero_optimization.model_dump(exclude={"stage"}, exclude_defaults=True),
        loss_scale=_loss_scale(config) if precision == "fp16" else None,
        partition_method=config.parallelism.pipe_partition_method,
        recompute_layers=keys.checkpoint_num_layers if keys.checkpoint_activations else 0,
        gradient_accumulation_dtype=sum_type,
        seed=config.training.seed,
        deterministic=config.training.deterministic,
        fp32_matmul_precision=config.training.fp32_matmul_precision,
        recompute_selective=keys.checkpoint_activations and keys.recompute_granularity == "selective",
        partition_activations=keys.checkpoint_activations and keys.partition_activations,
        checkpoint_in_cpu=keys.checkpoint_activations and keys.checkpoint_in_cpu,
        fp32_allreduce=in_fp32 if keys.fp32_allreduce is None else keys.fp32_allreduce,
        compile=compile,
        async_tensor_parallel=keys.async_tensor_parallel and layout.sequence_parallel,
        freeze=_frozen(config),
    )


def _stage_that_runs(config: Config, precision: Precision, replicas: int) -> int:
    """The ZeRO stage; stages 1 and 2 become 0 with a single replica.

    fp16 without ZeRO runs as stage 1: the results are the same, and there DeepSpeed's loss scaling does not begin with
    a step on zero gradients.
    """
    zero = config.engine.zero_optimization
    if precision == "fp16":
        return max(zero.stage, 1)
    alone = replicas == 1 and zero.stage < 3 and zero.offload_optimizer.device == "none"
    return 0 if alone else zero.stage


def _loss_scale(config: Config) -> LossScalePlan:
    keys = config.precision.fp16
    return LossScalePlan(
        dynamic=keys.loss_scale == 0,
        initial=keys.loss_scale or 2.0**keys.initial_scale_power,
        window=keys.loss_scale_window,
        hysteresis=keys.hysteresis,
        minimum=keys.min_loss_scale,
    )
