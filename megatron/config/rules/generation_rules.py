"""Rules between the keys of generation, for a configuration and for the settings of a single prompt."""

from collections.abc import Iterator

from megatron.config.rules.rule import Rule, rule
from megatron.config.schema.config import Config
from megatron.config.schema.generation_keys import AnswerKeys
from megatron.config.yaml_file import show

GENERATION_RULES: list[Rule] = []
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
BEAMS_ALONE = ("num_samples", "stop", "logprobs", "return_logits")


@rule(GENERATION_RULES, *AnswerKeys.model_fields)
def _answers_can_be_made(config: Config) -> Iterator[str]:
    yield from broken_answer_rules(config.generation)


@rule(GENERATION_RULES, "text_gen_type", "sample_input_file", "sample_input_format", "chat")
def _prompts_have_a_source(config: Config) -> Iterator[str]:
    keys = config.generation
    if keys.text_gen_type == "input-file" and keys.sample_input_file is None:
        yield "text_gen_type (input-file) needs sample_input_file (or -i FILE, and -i - for standard input)"
    source = keys.text_gen_type or ("unconditional" if keys.sample_input_file is None else "input-file")
    if source != "input-file" and keys.sample_input_format is not None:
        yield f"sample_input_format ({keys.sample_input_format}) needs sample_input_file (or -i FILE); leave it out"
    if source == "unconditional" and keys.chat:
        yield "chat (true) needs messages: from sample_input_file (or -i FILE), or with text_gen_type interactive"


@rule(GENERATION_RULES, "sample_prompts", "sample_interval", "context_parallel_size", scripts=("train.py",))
def _samples_in_training_have_prompts_and_steps(config: Config) -> Iterator[str]:
    prompts, interval = config.generation.sample_prompts, config.generation.sample_interval
    ranks = config.parallelism.context_parallel_size
    if prompts and interval is None:
        yield "sample_prompts needs sample_interval, the steps between two samples; set it, such as 1000"
    if interval is not None and not prompts:
        yield f"sample_interval ({interval}) needs sample_prompts, a list of texts or a file; set it, or leave both out"
    if interval is not None and ranks > 1:
        yield (
            f"sample_interval ({interval}) excludes context_parallel_size ({ranks}), whose ranks hold parts of a "
            "sequence; use generate.py on the checkpoints, or set context_parallel_size to 1"
        )


def broken_answer_rules(keys: AnswerKeys) -> Iterator[str]:
    """A message for each way in which the settings of a text exclude each other."""
    if keys.minimum_tokens > keys.maximum_tokens:
        yield (
            f"minimum_tokens ({keys.minimum_tokens}) must be at most maximum_tokens ({keys.maximum_tokens}); lower it, "
            "or raise that"
        )
    if keys.json_schema is not None and keys.regex is not None:
        yield "json_schema and regex exclude each other; keep one of them"
    constraint = "json_schema" if keys.json_schema is not None else "regex" if keys.regex is not None else None
    if constraint and keys.ignore_end_of_document:
        yield f"ignore_end_of_document (true) excludes {constraint}, which says where the text ends; leave it out"
    if keys.num_beams > 1:
        yield from _beams_excluded_by(keys, SAMPLING, "which choose tokens at random")
        yield from _beams_excluded_by(keys, BEAMS_ALONE, "because a search writes one text, without its steps")
        return
    if given := _given(keys, ("length_penalty", "early_stopping")):
        yield f"{given} need a beam search; set num_beams to 2 or more, or leave them out"


def _beams_excluded_by(keys: AnswerKeys, names: tuple[str, ...], reason: str) -> Iterator[str]:
    if given := _given(keys, names):
        yield f"num_beams ({keys.num_beams}) excludes {given}, {reason}; leave them out, or num_beams"


def _given(keys: AnswerKeys, names: tuple[str, ...]) -> str:
    """The keys that differ from their defaults, with their values."""
    fields = AnswerKeys.model_fields
    differing = [(name, getattr(keys, name)) for name in names if getattr(keys, name) != fields[name].default]
    return " and ".join(f"{name} ({show(value)})" for name, value in differing)
