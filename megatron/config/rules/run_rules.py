"""What must hold between keys: each broken rule names both values and a way out.

A rule says which keys it reads, so that it is left out when one of them is unusable already. Rules that
depend on the number of ranks or on the vocabulary are in `resolve`.
"""

import re
from collections.abc import Iterator

from megatron.config.pipeline_stages import BLOCK_CLASS
from megatron.config.precision import refused, resolve_precision, wanted
from megatron.config.rules.data_rules import DATA_RULES
from megatron.config.rules.model_rules import MODEL_RULES
from megatron.config.rules.rule import Rule
from megatron.config.schema.config import Config
from megatron.config.widths import feed_forward_width, is_gated, neox_gated_width


def broken_rules(config: Config, wrong: set[str], script: str | None = None, planning: bool = False) -> list[str]:
    """One message for each broken rule.

    wrong: keys without a usable value. script: the door that will run. planning: data and checkpoint need not be named.
    """
    needs = SCRIPT_RULES.get(script or "", ())
    rules = (
        *MODEL_RULES,
        *DATA_RULES,
        *RUN_RULES,
        *(rule for rule in needs if not (planning and rule in NOT_FOR_A_PLAN)),
    )
    return [problem for rule in rules if not wrong.intersection(rule.keys) for problem in rule.check(config)]


def notes_on_defaults(config: Config) -> list[str]:
    """A line for each default that was taken and is another one in GPT-NeoX."""
    model = config.model
    if not is_gated(model.activation) or model.ffn_hidden_size is not None:
        return []
    width, there = feed_forward_width(model), neox_gated_width(4 * model.hidden_size, model.mlp_multiple_of)
    return [
        f"activation ({model.activation}) without ffn_hidden_size: the width is {width}, two thirds of "
        f"4 x hidden_size; in GPT-NeoX it is {there}. Writing ffn_hidden_size settles it"
    ]


def _pipeline_has_layers(config: Config) -> Iterator[str]:
    layers, stages = config.model.num_layers, config.parallelism.pipe_parallel_size
    if layers < stages:
        yield f"num_layers ({layers}) must be at least pipe_parallel_size ({stages}); lower pipe_parallel_size"


def _zero_allows_pipeline(config: Config) -> Iterator[str]:
    stages, stage = config.parallelism.pipe_parallel_size, config.engine.zero_optimization.stage
    if stages > 1 and stage > 1:
        yield (
            f"zero_optimization.stage ({stage}) excludes a pipeline (pipe_parallel_size {stages}); "
            "use stage 0 or 1, or pipe_parallel_size 0"
        )


def _selection_has_operations(config: Config) -> Iterator[str]:
    keys = config.engine
    if keys.recompute_granularity == "selective" and not keys.checkpoint_activations:
        yield "recompute_granularity (selective) needs checkpoint_activations (false); set it to true"
    elif keys.recompute_granularity == "selective" and keys.compile:
        yield (
            "recompute_granularity (selective) and compile (true) exclude each other, as it picks operations and a "
            "compiled block is one; keep one of them"
        )
    elif keys.recompute_granularity == "selective" and keys.zero_optimization.stage == 3:
        yield (
            "recompute_granularity (selective) excludes zero_optimization.stage 3, which takes weights away that the "
            "kept results still need; use stage 0 to 2, or recompute_granularity full"
        )


def _compiling_leaves_weights_in_place(config: Config) -> Iterator[str]:
    if config.engine.compile and config.engine.zero_optimization.stage == 3:
        yield (
            "compile (true) excludes zero_optimization.stage 3, which gathers weights between the operations that "
            "compiling fuses; use stage 0 to 2, or compile false"
        )


def _gradients_are_summed_in_a_fitting_type(config: Config) -> Iterator[str]:
    summed_in, weights = config.precision.data_types.grad_accum_dtype, resolve_precision(config.precision)
    if summed_in not in (None, "fp32", weights):
        yield (
            f"data_types.grad_accum_dtype ({summed_in}) fits no weights in {weights}; leave it unset, or take fp32"
            f"{'' if weights == 'fp32' else f' or {weights}'}"
        )


def _offload_has_a_stage(config: Config) -> Iterator[str]:
    keys = config.engine.zero_optimization
    if keys.offload_optimizer.device != "none" and keys.stage == 0:
        yield "zero_optimization.offload_optimizer (cpu) needs zero_optimization.stage 1, 2 or 3, not 0"
    if keys.offload_param.device != "none" and keys.stage != 3:
        yield f"zero_optimization.offload_param (cpu) needs zero_optimization.stage 3, not {keys.stage}"


def _partition_method_is_known(config: Config) -> Iterator[str]:
    method = config.parallelism.pipe_partition_method
    kind, _, pattern = method.lower().partition(":")
    if kind == "type" and pattern:
        try:
            if not re.search(pattern, BLOCK_CLASS.lower()):
                yield f'pipe_partition_method ("{method}") matches no layer; the blocks are called {BLOCK_CLASS}'
        except re.error as error:
            yield f'pipe_partition_method ("{method}") has a regular expression that is wrong: {error}'
    elif method not in ("uniform", "parameters"):
        yield f'pipe_partition_method ("{method}") must be "type:REGEX", "parameters" or "uniform"'


def _precision_is_one(config: Config) -> Iterator[str]:
    wishes = wanted(config.precision)
    texts = list(wishes)
    if len(set(wishes.values())) > 1:
        other = next(text for text in texts if wishes[text] != wishes[texts[0]])
        yield f"{texts[0]} and {other} contradict each other; keep one of them"
    for text, excluded in refused(config.precision).items():
        if excluded in wishes.values():
            wish = next(wish for wish, value in wishes.items() if value == excluded)
            yield f"{wish} and {text} contradict each other; keep one of them"


def _weight_decay_is_one(config: Config) -> Iterator[str]:
    inner, outer = config.optimizer.optimizer.params.weight_decay, config.optimizer.weight_decay
    if inner is not None and inner != outer and "weight_decay" in config.optimizer.model_fields_set:
        yield f"weight_decay ({outer}) and optimizer.params.weight_decay ({inner}) differ; keep one of them"


def _decay_length_is_one(config: Config) -> Iterator[str]:
    keys = config.optimizer
    if keys.lr_decay_iters is not None and keys.lr_decay_fraction is not None:
        yield (
            f"lr_decay_iters ({keys.lr_decay_iters}) and lr_decay_fraction ({keys.lr_decay_fraction}) "
            "say the same thing twice; keep one of them"
        )


def _minimum_is_below_peak(config: Config) -> Iterator[str]:
    lowest, peak = config.optimizer.min_lr, config.optimizer.optimizer.params.lr
    if lowest > peak:
        yield f"min_lr ({lowest}) must not be above optimizer.params.lr ({peak}); a tenth of it is usual"


def _loading_names_a_place(config: Config) -> Iterator[str]:
    keys = config.checkpoint
    if keys.load is None and keys.finetune:
        yield "finetune (true) needs load, the folder with the weights to start from"
    if keys.load is None and keys.save is None and keys.iteration is not None:
        yield f"iteration ({keys.iteration}) needs load, the folder of the checkpoint"


def _prompts_have_a_file(config: Config) -> Iterator[str]:
    if config.generation.text_gen_type == "input-file" and config.generation.sample_input_file is None:
        yield "text_gen_type (input-file) needs sample_input_file (or -i FILE)"


def _devices_are_chosen_once(config: Config) -> Iterator[str]:
    keys = config.launcher
    chosen = {name: getattr(keys, name) for name in ("include", "exclude", "num_gpus")}
    given = [f"{name} ({value})" for name, value in chosen.items() if value is not None]
    if len(given) > 1:
        yield f"{' and '.join(given)} exclude each other; keep one of them"


def _harness_keys_have_tasks(config: Config) -> Iterator[str]:
    keys = config.evaluation
    named = ("eval_num_fewshot", "eval_limit", "eval_include_path")
    given = [f"{name} ({getattr(keys, name)})" for name in named if getattr(keys, name) is not None]
    if given and not keys.eval_tasks:
        yield f"{' and '.join(given)} mean nothing without eval_tasks; name the tasks, or leave them out"


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
            f"{name} (true) begins after profile_step_start ({begin}) steps, but train_iters ({steps}) ends the run "
            "by then; lower profile_step_start"
        )


def _profile_has_a_place(config: Config) -> Iterator[str]:
    keys = config.profiling
    if config.log_folder is not None:
        return
    if keys.profile:
        yield "profile (true) writes files, but neither log_dir nor save is set; set log_dir"
    if keys.memory_profiling and keys.memory_profiling_path is None:
        yield "memory_profiling (true) writes files, but there is no place; set memory_profiling_path, log_dir or save"


def _training_has_an_end(config: Config) -> Iterator[str]:
    if config.training.train_iters is None:
        yield '"train_iters" is missing; training needs the number of steps'


def _training_has_a_batch(config: Config) -> Iterator[str]:
    if config.batch.train_batch_size is None and config.batch.train_micro_batch_size_per_gpu is None:
        yield "train_batch_size or train_micro_batch_size_per_gpu is missing; one of them gives the size of a step"


def _data_are_named(config: Config) -> Iterator[str]:
    keys = config.data
    if keys.data_path is None and keys.train_data_paths is None and keys.data_impl != "mock":
        yield (
            '"data_path" is missing; name a prefix of .bin and .idx files (or several in train_data_paths), '
            "or try things out with data_impl: mock"
        )


def _weights_are_named(config: Config) -> Iterator[str]:
    if config.checkpoint.load is None and config.checkpoint.save is None:
        yield '"load" is missing; name the folder of the checkpoint'


RUN_RULES = (
    Rule(("num_layers", "pipe_parallel_size"), _pipeline_has_layers),
    Rule(("zero_optimization", "pipe_parallel_size"), _zero_allows_pipeline),
    Rule(("zero_optimization",), _offload_has_a_stage),
    Rule(("data_types", "precision", "bf16", "fp16"), _gradients_are_summed_in_a_fitting_type),
    Rule(("compile", "zero_optimization"), _compiling_leaves_weights_in_place),
    Rule(
        ("checkpoint_activations", "recompute_granularity", "compile", "zero_optimization"), _selection_has_operations
    ),
    Rule(("pipe_partition_method",), _partition_method_is_known),
    Rule(("precision", "fp16", "bf16"), _precision_is_one),
    Rule(("optimizer", "weight_decay"), _weight_decay_is_one),
    Rule(("lr_decay_iters", "lr_decay_fraction"), _decay_length_is_one),
    Rule(("min_lr", "optimizer"), _minimum_is_below_peak),
    Rule(("load", "save", "finetune", "iteration"), _loading_names_a_place),
    Rule(("text_gen_type", "sample_input_file"), _prompts_have_a_file),
    Rule(("include", "exclude", "num_gpus"), _devices_are_chosen_once),
    Rule(("eval_tasks", "eval_num_fewshot", "eval_limit", "eval_include_path"), _harness_keys_have_tasks),
)

_LOADS = Rule(("load", "save"), _weights_are_named)
_HAS_DATA = Rule(("data_path", "train_data_paths", "data_impl"), _data_are_named)
NOT_FOR_A_PLAN = (_LOADS, _HAS_DATA)
SCRIPT_RULES = {
    "train.py": (
        Rule(("train_iters",), _training_has_an_end),
        Rule(
            ("profile", "memory_profiling", "profile_step_start", "profile_step_stop", "train_iters"),
            _profile_has_steps,
        ),
        Rule(("profile", "memory_profiling", "memory_profiling_path", "log_dir", "save"), _profile_has_a_place),
        Rule(("train_batch_size", "train_micro_batch_size_per_gpu"), _training_has_a_batch),
        _HAS_DATA,
    ),
    "generate.py": (_LOADS,),
    "evaluate.py": (_LOADS,),
}
