"""Text of --print-config and --dry-run."""

from collections.abc import Sequence
from typing import Any

from megatron.config.flops import token_flops
from megatron.config.gradient_reduction import reduction_line
from megatron.config.parameter_counts import checkpoint_bytes, embedding_parameters, parameter_count, trained_count
from megatron.config.plan import ModelPlan, Plan
from megatron.config.resolve import decay_steps
from megatron.config.schema.config import Config
from megatron.config.yaml_file import yaml_text
from megatron.estimate.memory_tables import holder_lines, inference_lines, memory_lines
from megatron.units import short_number

# The GPT-2 vocabulary as GPT-NeoX pads it; assumed where no tokenizer is available.
ASSUMED_VOCABULARY = 50304
NAMES = {"fp32": "fp32", "fp16": "fp16", "bf16": "bfloat16"}


def assumed_vocabulary(config: Config) -> int:
    """Vocabulary size of a Plan without a tokenizer."""
    return config.model.vocab_size or config.model.padded_vocab_size or ASSUMED_VOCABULARY


def print_config(config: Config, plan: Plan) -> str:
    """YAML of all keys that have a value, including derived ones.

    Values that depend on the number of ranks are comments, so that the text is a valid configuration for any number.
    """
    flat = _without_unset(config.to_flat(with_defaults=True) | _derived(config, plan))
    return yaml_text(flat) + "".join(f"# {line}\n" for line in ["derived:", *_layout_lines(plan)])


def dry_run(config: Config, plan: Plan, script: str, notes: Sequence[str], on_cpu: bool = False) -> str:
    """Layout, sizes, memory and steps of a run on GPUs or a CPU. notes: further items of the list 'not checked'."""
    lines = [f"{script} would run on {_count(plan.layout.world_size, 'rank')}:", *_layout_lines(plan)]
    lines += _model_lines(plan.model)
    if script == "train.py":
        lines += [
            *_trained_lines(plan),
            *_reduction_lines(plan),
            *_cost_lines(plan),
            *_snapshot_lines(config, plan),
            *_length_lines(config, plan),
            *holder_lines(plan),
        ]
        lines += memory_lines(plan, config.launcher.gpu_memory, on_cpu)
    else:
        lines += inference_lines(plan, config.launcher.gpu_memory)
    return "\n".join([*lines, "not checked:", *(f"  {note}" for note in (*notes, *_unchecked(config)))])


def plan_lines(plan: Plan) -> list[str]:
    """Layout, batch, model and reduction of gradients, for the log at the start of a run."""
    lines = (*_layout_lines(plan), *_model_lines(plan.model), *_trained_lines(plan), *_reduction_lines(plan))
    return [line.strip() for line in lines]


def _derived(config: Config, plan: Plan) -> dict[str, Any]:
    derived: dict[str, Any] = {
        "num_kv_heads": plan.model.num_kv_heads,
        "ffn_hidden_size": plan.model.ffn_hidden_size,
        "intermediate_size": None,
        "max_position_embeddings": plan.model.max_position_embeddings,
        "precision": NAMES[plan.engine.precision],
        "log_dir": config.log_folder,
    }
    if decay_steps(config):
        derived |= {"lr_decay_iters": decay_steps(config), "lr_decay_fraction": None}
    return derived


def _without_unset(flat: dict[str, Any]) -> dict[str, Any]:
    nested = {key: _without_unset(value) if isinstance(value, dict) else value for key, value in flat.items()}
    return {key: value for key, value in nested.items() if value is not None and value != {}}


def _layout_lines(plan: Plan) -> list[str]:
    layout, batch = plan.layout, plan.batch
    return [
        f"  layout: {_count(layout.world_size, 'rank')} = pipeline {layout.pipe} x data {layout.data} "
        f"{f'x context {layout.context} ' if layout.context > 1 else ''}x tensor {layout.tensor}"
        f"{' with sequence parallelism' if layout.sequence_parallel else ''}, ZeRO "
        f"{plan.engine.zero_stage}, {plan.engine.precision}",
        f"  batch: {batch.global_size} samples = micro-batch {batch.micro_size} x accumulation "
        f"{batch.accumulation_steps} x {layout.data} data-parallel",
        f"  tokens per step: {batch.tokens_per_step:,}",
    ]


def _model_lines(model: ModelPlan) -> list[str]:
    total, embedding = parameter_count(model), embedding_parameters(model)
    return [
        f"  model: {model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads "
        f"({model.num_kv_heads} key/value), feed-forward {model.ffn_hidden_size}, vocabulary {model.vocab_size:,} "
        f"({model.padded_vocab_size:,} in memory)",
        f"  parameters: {total:,} ({short_number(total)}; {short_number(total - embedding)} without embeddings); "
        "active per token: all",
    ]


def _trained_lines(plan: Plan) -> list[str]:
    if not plan.engine.freeze:
        return []
    trained, total = trained_count(plan), parameter_count(plan.model)
    return [f"  trainable parameters: {trained:,} of {total:,} ({trained / total:.2%}); the others are frozen"]


def _reduction_lines(plan: Plan) -> list[str]:
    line = reduction_line(plan)
    return [f"  {line}"] if line else []


def _cost_lines(plan: Plan) -> list[str]:
    flops, tokens = token_flops(plan), plan.batch.tokens_per_step
    at_most = " at most" if plan.model.reset_attention_mask else ""
    recomputed = f"; {short_number(flops.recomputed, 'FLOP')} more recomputed" if flops.recomputed else ""
    return [
        f"  FLOPs per token: {short_number(flops.common, 'FLOP')} by the common formula, 6 N + 12 L n d T "
        f"({short_number(flops.common * tokens, 'FLOP')} per step)",
        f"  FLOPs per token: {short_number(flops.executed, 'FLOP')}{at_most} executed "
        f"({short_number(flops.executed * tokens, 'FLOP')} per step){recomputed}",
        f"  checkpoint: {checkpoint_bytes(plan) / 1e9:,.2f} GB",
    ]


def _snapshot_lines(config: Config, plan: Plan) -> list[str]:
    """The host memory that async_save takes. Without ZeRO, the replicas of a rank hold the same state and save none."""
    if not config.checkpoint.async_save:
        return []
    layout = plan.layout
    savers = layout.pipe * layout.tensor * (layout.replicas if plan.engine.zero_stage else 1)
    ranks = "each rank" if savers == layout.world_size else f"{savers} of {layout.world_size} ranks"
    return [f"  async_save: {checkpoint_bytes(plan) / savers / 1e9:,.2f} GB of host memory on {ranks}, pinned on a GPU"]


def _length_lines(config: Config, plan: Plan) -> list[str]:
    steps = config.training.train_iters or 0
    tokens = steps * plan.batch.tokens_per_step
    return [
        f"  run: {steps:,} steps, {short_number(tokens)} tokens, warm-up {plan.schedule.warmup_steps} steps, "
        f"{plan.schedule.kind} from {plan.schedule.peak:g} to {plan.schedule.minimum:g}"
    ]


def _unchecked(config: Config) -> list[str]:
    """What a dry run does not check, with its values."""
    name = "vocab_size" if config.model.vocab_size else "padded_vocab_size"
    rows = getattr(config.model, name)
    stated = f"{name} {rows:,}" if rows else f"{ASSUMED_VOCABULARY:,}"
    files = [config.tokenizer.vocab_file, config.tokenizer.merge_file]
    named = " with " + ", ".join(name for name in files if name) if any(files) else ""
    notes = [f"tokenizer: {config.tokenizer.tokenizer_type}{named}; the vocabulary size is assumed to be {stated}"]
    paths = (config.data.data_path,) if config.data.data_path else config.data.train_data_paths or ()
    if config.data.data_impl != "mock" and paths:
        notes.append(f"data: {', '.join(paths)}")
    if config.checkpoint.load is not None:
        notes.append(f"checkpoint: {config.checkpoint.load}")
    return notes


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
