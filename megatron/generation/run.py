"""generate.py: continue prompts with a trained model and write JSON lines."""

import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.config.schema.config import Config
from megatron.config.schema.run_keys import GenerationKeys
from megatron.engine.distributed import stop
from megatron.errors import UserError, work_begins
from megatron.files import refuse_overwriting
from megatron.generation.decoding import DecodingSettings, continue_texts
from megatron.generation.prompts import encode_prompts, read_prompts, typed_prompts
from megatron.generation.records import JsonLinesFile, record
from megatron.generation.requests import Sampling
from megatron.inference import FoundModel, TrainedModel, find_trained_model, open_trained_model
from megatron.logging import configure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A text to continue. seed: for sampling, a function of the run's seed and the prompt's number alone."""

    text: str
    ids: list[int]
    seed: str


def generate(config: Config) -> None:
    """Continue the prompts that `config` names with the model in `load`. Every rank calls it; rank 0 writes.

    Raises UserError, before work begins, for a wrong configuration, prompts or checkpoint.
    """
    rank = int(os.environ.get("RANK", "0"))
    configure(rank)
    keys = config.generation
    source = prompt_source(keys)
    found = find_trained_model(config)
    context = found.plan.model.max_position_embeddings
    if source == "interactive":
        for line in ignored_at_a_prompt(keys) if rank == 0 else ():
            log.warning("%s", line)
        converse(open_trained_model(found, config.launcher.distributed_backend), keys, config.training.seed)
        stop()
        return
    refuse_overwriting({"sample_output_file": keys.sample_output_file}, _inputs(config, found))
    texts = read_prompts(Path(keys.sample_input_file or ""), keys.prompt_end) if source == "input-file" else [""]
    prompts = [
        Prompt(text, ids, f"{config.training.seed}/{number}/{sample}")
        for number, (text, ids) in enumerate(zip(texts, encode_prompts(texts, found.tokenizer, context), strict=True))
        for sample in range(keys.num_samples)
    ]
    with ExitStack() as opened:
        output = opened.enter_context(JsonLinesFile(Path(keys.sample_output_file))) if rank == 0 else None
        model = open_trained_model(found, config.launcher.distributed_backend)
        with work_begins():
            write_all(model, prompts, keys, output)
    stop()


def _inputs(config: Config, found: FoundModel) -> dict[str, Path]:
    """The files that a run reads, by key."""
    keys = {
        "sample_input_file": config.generation.sample_input_file,
        "vocab_file": config.tokenizer.vocab_file,
        "merge_file": config.tokenizer.merge_file,
    }
    files = {key: Path(value) for key, value in keys.items() if value}
    return files | {
        f"{path.relative_to(found.checkpoint)} of the checkpoint": path for path in found.checkpoint.rglob("*")
    }


def prompt_source(keys: GenerationKeys) -> str:
    """input-file, unconditional or interactive."""
    source = keys.text_gen_type or ("input-file" if keys.sample_input_file else "unconditional")
    if source != "input-file" and keys.sample_input_file:
        log.warning("sample_input_file (%s) is not read: text_gen_type is %s", keys.sample_input_file, source)
    return source


def ignored_at_a_prompt(keys: GenerationKeys) -> list[str]:
    """A line for each setting that has no effect in interactive generation."""
    fields = GenerationKeys.model_fields
    reasons = {
        "num_samples": "each prompt gets one text",
        "return_logits": "the text alone is shown",
        "sample_output_file": "texts are shown, not written",
    }
    given = {name: getattr(keys, name) for name in reasons}
    return [
        f"{name} ({value}) has no effect: text_gen_type is interactive, {reasons[name]}"
        for name, value in given.items()
        if value != fields[name].default
    ]


def decoding_settings(keys: GenerationKeys) -> DecodingSettings:
    """The decoding settings of the keys."""
    return DecodingSettings(
        Sampling(temperature=keys.temperature, top_k=keys.top_k, top_p=keys.top_p),
        maximum_tokens=keys.maximum_tokens,
        use_cache=not keys.recompute,
        keep_logits=keys.return_logits,
    )


def write_all(
    model: TrainedModel, prompts: Sequence[Prompt], keys: GenerationKeys, output: JsonLinesFile | None
) -> None:
    """Continue all prompts in batches and write them in order. Collective; `output` is None on all ranks but 0."""
    replicas, size = model.grid.size("data"), keys.generation_batch_size
    tokens, started = 0, time.perf_counter()
    for first in range(0, len(prompts), size * replicas):
        mine = first + model.grid.rank("data") * size
        records = _gathered(model, continue_batch(model, prompts[mine : mine + size], keys))
        tokens += sum(fields["length"] for fields in records)
        if output is not None:
            output.write(records)
    if output is not None:
        seconds = time.perf_counter() - started
        log.info(
            "%d texts, %d tokens in %.1f s (%.1f tokens/s), written to %s",
            len(prompts), tokens, seconds, tokens / seconds, keys.sample_output_file,
        )  # fmt: skip


def continue_batch(model: TrainedModel, prompts: Sequence[Prompt], keys: GenerationKeys) -> list[dict[str, Any]]:
    """The records of one batch of prompts."""
    if not prompts:
        return []
    started = time.perf_counter()
    found = continue_texts(
        model, [prompt.ids for prompt in prompts], decoding_settings(keys), [prompt.seed for prompt in prompts]
    )
    seconds = time.perf_counter() - started
    return [
        record(prompt.text, continuation, model.tokenizer, seconds)
        for prompt, continuation in zip(prompts, found, strict=True)
    ]


def converse(model: TrainedModel, keys: GenerationKeys, seed: int) -> None:
    """Continue typed prompts until the input ends. Collective over all ranks."""
    for number, text in enumerate(typed_prompts(keys.prompt_end)):
        try:
            [ids] = encode_prompts([text], model.tokenizer, model.context)
        except UserError as error:
            log.info("%s", error)
            continue
        [fields] = continue_batch(model, [Prompt(text, ids, f"{seed}/{number}/0")], keys)
        log.info("%s", fields["text"] if fields["message"] is None else fields["message"])


def _gathered(model: TrainedModel, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of all data-parallel replicas, in order."""
    if model.grid.size("data") == 1:
        return records
    parts: list[Any] = [None] * model.grid.size("data")
    dist.all_gather_object(parts, records, group=model.grid.group("data"))
    return [fields for part in parts for fields in part]
