"""Rules between the keys of evaluation."""

from collections.abc import Iterator

from megatron.config.rules.rule import Rule, rule
from megatron.config.schema.config import Config
from megatron.config.yaml_file import show

EVALUATION_RULES: list[Rule] = []
HARNESS_KEYS = (
    "eval_tasks_interval",
    "eval_num_fewshot",
    "eval_limit",
    "eval_include_path",
    "eval_batch_size",
    "eval_chat_template",
    "eval_log_samples",
    "eval_requests_cache",
)
PERPLEXITY_KEYS = ("eval_data", "eval_split", "eval_stride")


@rule(EVALUATION_RULES, "eval_tasks", *HARNESS_KEYS)
def _harness_keys_have_tasks(config: Config) -> Iterator[str]:
    keys, fields = config.evaluation, type(config.evaluation).model_fields
    changed = {name: value for name in HARNESS_KEYS if (value := getattr(keys, name)) != fields[name].default}
    given = [f"{name} ({str(value).lower() if value is True else value})" for name, value in changed.items()]
    if given and not keys.eval_tasks:
        yield f"{' and '.join(given)} need eval_tasks; name the tasks, or leave them out"


@rule(EVALUATION_RULES, "eval_tasks", "eval_data", "eval_split", "eval_stride", "eval_references", "seq_length")
def _perplexity_is_of_one_text(config: Config) -> Iterator[str]:
    keys, length = config.evaluation, config.model.seq_length
    given = [f"{name} ({show(getattr(keys, name))})" for name in PERPLEXITY_KEYS if name in keys.model_fields_set]
    other = next((name for name in ("eval_tasks", "eval_references") if getattr(keys, name)), None)
    if given and other:
        yield f"{' and '.join(given)} set how perplexity is measured, which {other} replaces; keep one of them"
    if keys.eval_tasks and keys.eval_references:
        yield f"eval_tasks and eval_references ({keys.eval_references}) exclude each other; leave out one of them"
    if keys.eval_data and "eval_split" in keys.model_fields_set:
        yield f"eval_data and eval_split ({keys.eval_split}) each name the text to score; keep one of them"
    if keys.eval_stride is not None and keys.eval_stride > length:
        yield f"eval_stride ({keys.eval_stride}) must be at most seq_length ({length}), or windows leave out tokens"


@rule(EVALUATION_RULES, "eval_references", "sample_input_file")
def _references_have_prompts(config: Config) -> Iterator[str]:
    references, prompts = config.evaluation.eval_references, config.generation.sample_input_file
    if references is None:
        return
    if references.endswith(".jsonl") and prompts is not None:
        yield f"eval_references ({references}) holds prompts itself; leave out sample_input_file ({prompts})"
    if not references.endswith(".jsonl") and prompts is None:
        yield (
            f"eval_references ({references}) needs sample_input_file, the prompts that its lines belong to; set it, or "
            "use a .jsonl file with prompt and reference in each line"
        )


@rule(EVALUATION_RULES, "eval_tasks_interval", "context_parallel_size", scripts=("train.py",))
def _tasks_in_training_have_whole_sequences(config: Config) -> Iterator[str]:
    interval, ranks = config.evaluation.eval_tasks_interval, config.parallelism.context_parallel_size
    if interval is not None and ranks > 1:
        yield (
            f"eval_tasks_interval ({interval}) excludes context_parallel_size ({ranks}), whose ranks hold parts of "
            "a sequence; evaluate the checkpoints with evaluate.py, or set context_parallel_size to 1"
        )
