"""Rules between keys: each message names the values and a way out.

A rule declares the keys that it reads, and is skipped if one of them has no valid value. Rules that depend on the
number of ranks or on the vocabulary are in `resolve`.
"""

import re
from collections.abc import Iterator

from megatron.config.pipeline_stages import BLOCK_CLASS
from megatron.config.precision import chosen_formats, excluded_formats, resolve_precision
from megatron.config.rules.data_rules import DATA_RULES
from megatron.config.rules.evaluation_rules import EVALUATION_RULES
from megatron.config.rules.generation_rules import GENERATION_RULES
from megatron.config.rules.model_rules import MODEL_RULES
from megatron.config.rules.recovery_rules import RECOVERY_RULES
from megatron.config.rules.rule import Rule, rule
from megatron.config.schema.config import Config
from megatron.config.widths import feed_forward_width, head_size, is_gated, neox_gated_width, round_up
from megatron.config.yaml_file import show

RUN_RULES: list[Rule] = []


def broken_rules(config: Config, wrong: set[str], script: str | None = None, planning: bool = False) -> list[str]:
    """One message for each broken rule.

    wrong: keys without a valid value. script: that will run. planning: data and checkpoint are not required.
    """
    needed = [
        rule
        for rule in (*MODEL_RULES, *DATA_RULES, *EVALUATION_RULES, *GENERATION_RULES, *RECOVERY_RULES, *RUN_RULES)
        if (not rule.scripts or script in rule.scripts) and (rule.for_plans or not planning)
    ]
    return [problem for rule in needed if not wrong.intersection(rule.keys) for problem in rule.check(config)]


def notes_on_defaults(config: Config) -> list[str]:
    """A line for each default that differs from GPT-NeoX's."""
    model = config.model
    if not is_gated(model.activation) or model.ffn_hidden_size is not None:
        return []
    width, there = feed_forward_width(model), neox_gated_width(4 * model.hidden_size, model.mlp_multiple_of)
    return [
        f"activation ({model.activation}) without ffn_hidden_size: the width is {width}, two thirds of "
        f"4 x hidden_size; in GPT-NeoX it is {there}. Set ffn_hidden_size to choose"
    ]


@rule(RUN_RULES, "num_layers", "pipe_parallel_size")
def _pipeline_has_layers(config: Config) -> Iterator[str]:
    layers, stages = config.model.num_layers, config.parallelism.pipe_parallel_size
    if layers < stages:
        yield f"num_layers ({layers}) must be at least pipe_parallel_size ({stages}); lower pipe_parallel_size"


@rule(RUN_RULES, "zero_optimization", "pipe_parallel_size")
def _zero_allows_pipeline(config: Config) -> Iterator[str]:
    stages, stage = config.parallelism.pipe_parallel_size, config.engine.zero_optimization.stage
    if stages > 1 and stage > 1:
        yield (
            f"zero_optimization.stage ({stage}) excludes a pipeline (pipe_parallel_size {stages}); "
            "use stage 0 or 1, or pipe_parallel_size 0"
        )


@rule(
    RUN_RULES,
    "checkpoint_activations",
    "recompute_granularity",
    "compile",
    "zero_optimization",
    "partition_activations",
    "checkpoint_in_cpu",
)
def _selection_has_operations(config: Config) -> Iterator[str]:
    keys = config.engine
    if keys.recompute_granularity != "selective":
        return
    if not keys.checkpoint_activations:
        yield "recompute_granularity (selective) needs checkpoint_activations (false); set it to true"
    elsewhere = [f"{name} (true)" for name in ("partition_activations", "checkpoint_in_cpu") if getattr(keys, name)]
    if keys.compile and elsewhere:
        yield (
            f"recompute_granularity (selective) with compile (true) excludes {' and '.join(elsewhere)}: compiled code "
            "stores the results that it keeps on the device; leave it out, or use compile false or "
            "recompute_granularity full"
        )
    if keys.zero_optimization.stage == 3 and not keys.compile:
        unset = "unset" if keys.compile is None else "false"
        yield (
            f"recompute_granularity (selective) with zero_optimization.stage 3 needs compile (true), not {unset}: "
            "without it stage 3 releases weights that stored results still need; or use stage 0 to 2, or "
            "recompute_granularity full"
        )


@rule(RUN_RULES, "async_tensor_parallel", "compile", "sequence_parallel", "model_parallel_size")
def _async_tensor_parallel_has_something_to_overlap(config: Config) -> Iterator[str]:
    keys, compile = config.parallelism, config.engine.compile
    if not config.engine.async_tensor_parallel:
        return
    if not compile:
        written = "unset" if compile is None else "false"
        yield f"async_tensor_parallel (true) needs compile (true), not {written}: the compiler overlaps; set it to true"
    if not keys.sequence_parallel or keys.model_parallel_size == 1:
        yield (
            f"async_tensor_parallel (true) needs sequence_parallel ({str(keys.sequence_parallel).lower()}) and "
            f"model_parallel_size ({keys.model_parallel_size}) of at least 2, whose collectives it overlaps; set them, "
            "or leave it out"
        )


@rule(RUN_RULES, "precision_linear", "precision", "bf16", "fp16")
def _float8_has_bfloat16_weights(config: Config) -> Iterator[str]:
    weights = resolve_precision(config.precision)
    if config.precision.precision_linear and weights != "bf16":
        yield f"precision_linear (float8) needs weights in bfloat16, not {weights}; set precision: bfloat16"


@rule(
    RUN_RULES,
    "precision_linear",
    "hidden_size",
    "num_attention_heads",
    "num_kv_heads",
    "ffn_hidden_size",
    "activation",
    "seq_length",
    "model_parallel_size",
    "context_parallel_size",
)
def _float8_has_fitting_widths(config: Config) -> Iterator[str]:
    """The kernels take multiples of 16 along each operand's contiguous dimension."""
    if not config.precision.precision_linear:
        return
    model, keys = config.model, config.parallelism
    split, heads = ("model_parallel_size", keys.model_parallel_size), model.num_attention_heads
    widths = (
        ("hidden_size", model.hidden_size, ("", 1)),
        ("num_attention_heads x head size", heads * head_size(model), split),
        ("width of queries, keys and values", (heads + 2 * (model.num_kv_heads or heads)) * head_size(model), split),
        ("ffn_hidden_size", feed_forward_width(model), split),
        ("seq_length", model.seq_length, ("context_parallel_size", keys.context_parallel_size)),
    )
    for name, width, (key, ranks) in widths:
        if width % (16 * ranks):
            yield (
                f"precision_linear (float8): {name} ({width}){f' / {key} ({ranks})' if ranks > 1 else ''} must be "
                f"divisible by 16; {round_up(width, 16 * ranks)} would work, or leave precision_linear out"
            )


@rule(RUN_RULES, "data_types", "precision", "bf16", "fp16")
def _gradients_are_summed_in_a_fitting_type(config: Config) -> Iterator[str]:
    summed_in, weights = config.precision.data_types.grad_accum_dtype, resolve_precision(config.precision)
    if summed_in not in (None, "fp32", weights):
        yield (
            f"data_types.grad_accum_dtype ({summed_in}) does not fit weights in {weights}; leave it unset, or use fp32"
            f"{'' if weights == 'fp32' else f' or {weights}'}"
        )


@rule(RUN_RULES, "zero_optimization")
def _offload_has_a_stage(config: Config) -> Iterator[str]:
    keys = config.engine.zero_optimization
    if keys.offload_optimizer.device != "none" and keys.stage == 0:
        yield "zero_optimization.offload_optimizer (cpu) needs zero_optimization.stage 1, 2 or 3, not 0"
    if keys.offload_param.device != "none" and keys.stage != 3:
        yield f"zero_optimization.offload_param (cpu) needs zero_optimization.stage 3, not {keys.stage}"


@rule(RUN_RULES, "alert_webhook", "alert_command", "log_dir", "save", scripts=("train.py",))
def _alerts_have_events(config: Config) -> Iterator[str]:
    """The name of a variable is not shown where it may be an address, which may hold a secret."""
    keys = config.alerts
    if keys.alert_webhook is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", keys.alert_webhook):
        yield (
            "alert_webhook must be the name of an environment variable, such as DEEPY_ALERT_WEBHOOK; export the "
            "address in it, because an address may hold a secret"
        )
    elif (keys.alert_webhook or keys.alert_command) and config.log_folder is None:
        which = f"alert_webhook ({keys.alert_webhook})" if keys.alert_webhook else "alert_command"
        yield f"{which} needs save or log_dir, the folder in which the ranks record what happens"


@rule(RUN_RULES, "pipe_partition_method")
def _partition_method_is_known(config: Config) -> Iterator[str]:
    method = config.parallelism.pipe_partition_method
    kind, _, pattern = method.lower().partition(":")
    if kind == "type" and pattern:
        try:
            if not re.search(pattern, BLOCK_CLASS.lower()):
                yield f'pipe_partition_method ("{method}") matches no layer; type:{BLOCK_CLASS} matches the blocks'
        except (re.error, OverflowError, RecursionError) as error:
            yield (
                f"pipe_partition_method ({show(method)}) has an invalid regular expression ({error}); "
                f"type:{BLOCK_CLASS} would work"
            )
    elif method not in ("uniform", "parameters"):
        yield f'pipe_partition_method ("{method}") must be "type:REGEX", "parameters" or "uniform"'


@rule(RUN_RULES, "precision", "fp16", "bf16")
def _precision_is_one(config: Config) -> Iterator[str]:
    chosen = chosen_formats(config.precision)
    texts = list(chosen)
    if len(set(chosen.values())) > 1:
        other = next(text for text in texts if chosen[text] != chosen[texts[0]])
        yield f"{texts[0]} and {other} contradict each other; keep one of them"
    for text, excluded in excluded_formats(config.precision).items():
        if excluded in chosen.values():
            choice = next(choice for choice, value in chosen.items() if value == excluded)
            yield f"{choice} and {text} contradict each other; keep one of them"


@rule(RUN_RULES, "optimizer", "weight_decay")
def _weight_decay_is_one(config: Config) -> Iterator[str]:
    inner, outer = config.optimizer.optimizer.params.weight_decay, config.optimizer.weight_decay
    if inner is not None and inner != outer and "weight_decay" in config.optimizer.model_fields_set:
        yield f"weight_decay ({outer}) and optimizer.params.weight_decay ({inner}) differ; keep one of them"


@rule(RUN_RULES, "lr_decay_iters", "lr_decay_fraction")
def _decay_length_is_one(config: Config) -> Iterator[str]:
    keys = config.optimizer
    if keys.lr_decay_iters is not None and keys.lr_decay_fraction is not None:
        yield (
            f"lr_decay_iters ({keys.lr_decay_iters}) and lr_decay_fraction ({keys.lr_decay_fraction}) "
            "set the same thing; keep one of them"
        )


@rule(RUN_RULES, "min_lr", "optimizer")
def _minimum_is_below_peak(config: Config) -> Iterator[str]:
    lowest, peak = config.optimizer.min_lr, config.optimizer.optimizer.params.lr
    if lowest > peak:
        yield f"min_lr ({lowest}) must not be above optimizer.params.lr ({peak}); a tenth of it is usual"


@rule(RUN_RULES, "load", "save", "finetune", "iteration")
def _loading_has_a_folder(config: Config) -> Iterator[str]:
    keys = config.checkpoint
    if keys.load is None and keys.finetune:
        yield "finetune (true) needs load, the folder with the weights to start from"
    if keys.load is not None and keys.load.startswith("hf:") and keys.finetune:
        yield f"finetune (true) has no effect with load ({keys.load}), which always starts at step 0; leave it out"
    if keys.load is None and keys.save is None and keys.iteration is not None:
        yield f"iteration ({keys.iteration}) needs load, the folder of the checkpoint"


@rule(RUN_RULES, "lora", "load", scripts=("train.py",), for_plans=False)
def _training_of_adapters_has_a_base(config: Config) -> Iterator[str]:
    rank = config.tuning.lora.rank
    if rank and config.checkpoint.load is None:
        yield (
            f"lora.rank ({rank}) needs load, the model to adapt: the folder of its checkpoints, with finetune: true, "
            "or hf:MODEL of Hugging Face"
        )


@rule(RUN_RULES, "max_restarts", "save", "checkpoint_factor", scripts=("train.py",))
def _restarts_have_checkpoints(config: Config) -> Iterator[str]:
    most, keys = config.launcher.max_restarts, config.checkpoint
    if most and keys.save is None:
        yield f"max_restarts ({most}) needs save, the folder of the checkpoints to start again from; set it"
    if most and keys.checkpoint_factor is None:
        yield f"max_restarts ({most}) needs checkpoint_factor, the steps between these checkpoints; set it"


@rule(RUN_RULES, "serve_max_choices", "serve_max_waiting", "generation_batch_size")
def _choices_find_room(config: Config) -> Iterator[str]:
    keys, slots = config.serving, config.generation.generation_batch_size
    if keys.serve_max_choices > slots + keys.serve_max_waiting:
        yield (
            f"serve_max_choices ({keys.serve_max_choices}) is more than generation_batch_size ({slots}) and "
            f"serve_max_waiting ({keys.serve_max_waiting}) together, so such a request would never be taken; lower it, "
            "or raise serve_max_waiting"
        )


@rule(RUN_RULES, "include", "exclude", "num_gpus")
def _devices_are_chosen_once(config: Config) -> Iterator[str]:
    keys = config.launcher
    chosen = {name: getattr(keys, name) for name in ("include", "exclude", "num_gpus")}
    given = [f"{name} ({value})" for name, value in chosen.items() if value is not None]
    if len(given) > 1:
        yield f"{' and '.join(given)} exclude each other; keep one of them"


@rule(
    RUN_RULES,
    "profile",
    "memory_profiling",
    "profile_step_start",
    "profile_step_stop",
    "train_iters",
    scripts=("train.py",),
)
def _profile_has_steps(config: Config) -> Iterator[str]:
    keys, steps = config.profiling, config.training.train_iters
    begin, end = keys.profile_step_start, keys.profile_step_stop
    name = "profile" if keys.profile else "memory_profiling"
    if not (keys.profile or keys.memory_profiling):
        return
    if end <= begin:
        yield f"profile_step_stop ({end}) must be above profile_step_start ({begin}), or no step is profiled; raise it"
    elif steps is not None and steps <= begin:
        yield (
            f"{name} (true) begins after profile_step_start ({begin}) steps, but the run ends after train_iters "
            f"({steps}); lower profile_step_start"
        )


@rule(RUN_RULES, "profile", "memory_profiling", "memory_profiling_path", "log_dir", "save", scripts=("train.py",))
def _profile_has_a_folder(config: Config) -> Iterator[str]:
    keys = config.profiling
    if config.log_folder is not None:
        return
    if keys.profile:
        yield "profile (true) writes files, but neither log_dir nor save is set; set log_dir"
    if keys.memory_profiling and keys.memory_profiling_path is None:
        yield "memory_profiling (true) writes files, but has no folder; set memory_profiling_path, log_dir or save"


@rule(RUN_RULES, "use_csv", "log_dir", "save", scripts=("train.py",))
def _csv_has_a_folder(config: Config) -> Iterator[str]:
    if config.logging.use_csv and config.log_folder is None:
        yield "use_csv (true) writes metrics.csv, but neither log_dir nor save is set; set log_dir"


@rule(RUN_RULES, "use_wandb", "wandb_project")
def _wandb_takes_the_project(config: Config) -> Iterator[str]:
    name, refused = config.logging.wandb_project, set("/\\#?%:")
    if config.logging.use_wandb and (found := sorted(refused & set(name))):
        yield f'wandb_project ("{name}") must not contain {" ".join(found)}, which Weights & Biases refuses; use - or _'


@rule(RUN_RULES, "prometheus_textfile")
def _textfile_is_collected(config: Config) -> Iterator[str]:
    path = config.logging.prometheus_textfile
    if path is not None and not path.endswith(".prom"):
        yield f'prometheus_textfile ("{path}") must end in .prom, as node_exporter reads no others; add .prom'


@rule(RUN_RULES, "train_iters", scripts=("train.py",))
def _training_has_an_end(config: Config) -> Iterator[str]:
    if config.training.train_iters is None:
        yield '"train_iters" is missing; training needs the number of steps'


@rule(RUN_RULES, "train_batch_size", "train_micro_batch_size_per_gpu", scripts=("train.py",))
def _training_has_a_batch(config: Config) -> Iterator[str]:
    if config.batch.train_batch_size is None and config.batch.train_micro_batch_size_per_gpu is None:
        yield "train_batch_size or train_micro_batch_size_per_gpu is missing; training needs one of them"


@rule(RUN_RULES, "data_path", "train_data_paths", "data_impl", scripts=("train.py",), for_plans=False)
def _data_are_named(config: Config) -> Iterator[str]:
    keys = config.data
    if keys.data_path is None and keys.train_data_paths is None and keys.data_impl != "mock":
        yield (
            '"data_path" is missing; name a prefix of .bin and .idx files (or several in train_data_paths), '
            "or use random text (data_impl: mock)"
        )


@rule(RUN_RULES, "load", "save", scripts=("generate.py", "evaluate.py", "serve.py"), for_plans=False)
def _weights_are_named(config: Config) -> Iterator[str]:
    if config.checkpoint.load is None and config.checkpoint.save is None:
        yield '"load" is missing; name the folder of the checkpoint'
