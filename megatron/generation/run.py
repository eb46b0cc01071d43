"""generate.py: continue prompts with a trained model, and write JSON lines or converse."""

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.config.schema.config import Config
from megatron.config.schema.generation_keys import GenerationKeys
from megatron.engine.distributed import stop
from megatron.errors import UserError, work_begins
from megatron.files import refuse_overwriting
from megatron.generation.engine import Engine, EngineSettings
from megatron.generation.interactive import Session
from megatron.generation.progress import TextProgress
from megatron.generation.prompts import STANDARD_INPUT, Prompt, read_prompts, several_problems
from megatron.generation.records import SamplesFile, record
from megatron.generation.requests import Answer
from megatron.generation.samples import Sample, SampleMaker, model_identity
from megatron.inference import FoundModel, find_trained_model, load_trained_model, start_ranks
from megatron.logging import configure
from megatron.parallel.grid import ParallelGrid
from megatron.tokenizer.base import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Texts to generate, and where they go. identities: of all texts, those that the output has already included."""

    samples: Sequence[Sample]
    identities: Sequence[str]
    output: SamplesFile
    tokenizer: Tokenizer


def generate(config: Config) -> None:
    """Continue the prompts that `config` names with the model in `load`. Every rank calls it; rank 0 reads and writes.

    Where the output has all texts already, it says so and loads nothing.
    Raises UserError, before work begins, for a wrong configuration, prompts or checkpoint.
    """
    rank = int(os.environ.get("RANK", "0"))
    configure(rank)
    keys = config.generation
    source = prompt_source(keys)
    found = find_trained_model(config)
    maker = sample_maker(config, found)
    with ExitStack() as opened:
        job = None
        if rank == 0 and source != "interactive":
            refuse_overwriting({"sample_output_file": keys.sample_output_file}, _inputs(config, found))
            prompts = read_prompts(keys) if source == "input-file" else [Prompt("the empty prompt", keys)]
            samples = maker.samples(prompts)
            model = model_identity(found)
            identities = [sample.identity(model) for sample in samples]
            output = SamplesFile(Path(keys.sample_output_file), identities, keys.overwrite_samples)
            job = Job(samples, identities, opened.enter_context(output), found.tokenizer)
        left = None if job is None else job.samples[job.output.kept :]
        grid = start_ranks(found, config.launcher.distributed_backend)
        is_complete = [left is not None and not left]  # which only rank 0 knows
        dist.broadcast_object_list(is_complete, src=0)
        if is_complete[0]:
            if job is not None:
                job.output.begin()  # cuts off a line that a killed run began
                log.info("all %d texts are in %s already: nothing to do", job.output.kept, job.output.path)
        else:
            slots = keys.num_beams if source == "interactive" else keys.generation_batch_size
            _work(open_engine(config, found, grid, left, slots), maker, keys, job)
    stop()


def _work(engine: Engine, maker: SampleMaker, keys: GenerationKeys, job: Job | None) -> None:
    """Do the job, or converse where there is none. Collective."""
    if dist.get_rank() != 0:
        engine.follow()
        return
    if job is not None:
        with work_begins():
            write_samples(engine, job)
    else:
        for line in ignored_at_a_prompt(keys):
            log.warning("%s", line)
        Session(engine, maker, keys).run()
    engine.close()


def sample_maker(config: Config, found: FoundModel) -> SampleMaker:
    """Makes requests of prompts for the model."""
    context = found.plan.model.max_position_embeddings
    return SampleMaker(found.tokenizer, context, config.training.seed, config.tokenizer)


def open_engine(
    config: Config, found: FoundModel, grid: ParallelGrid, samples: Sequence[Sample] | None, slots: int
) -> Engine:
    """The engine with the model on the ranks of `grid`. Collective.

    samples: on rank 0, what it will be asked: its texts are as long as these need; None: any up to the context.
    slots: texts at once in each replica; more where a beam search or a pipeline needs them.
    Raises UserError, naming each prompt that it cannot continue.
    """
    trained = load_trained_model(found, grid)
    needed = [(trained.context, slots)]
    if samples is not None:
        requests = [sample.request for sample in samples]
        longest = max((len(each.ids) + each.maximum_tokens for each in requests), default=1)
        beams = max((each.beams.count for each in requests if each.beams), default=1)
        needed = [(min(trained.context, longest), max(slots, beams * trained.grid.size("pipe")))]
    dist.broadcast_object_list(needed, src=0)
    capacity, slots = needed[0]
    slots = max(slots, trained.grid.size("pipe"))  # every stage has a text
    engine = Engine(trained, EngineSettings(slots, capacity, config.generation.prefill_chunk_size))
    problems = [f"prompt {each.prompt + 1}: {problem}" for each in samples or () for problem in _wrong(engine, each)]
    if problems:
        raise several_problems(problems)
    return engine


def _wrong(engine: Engine, sample: Sample) -> tuple[str, ...]:
    try:
        engine.check(sample.request)
    except UserError as error:
        return error.problems
    return ()


def _inputs(config: Config, found: FoundModel) -> dict[str, Path]:
    """The files that a run reads, by key."""
    keys = {
        "sample_input_file": config.generation.sample_input_file,
        "vocab_file": config.tokenizer.vocab_file,
        "merge_file": config.tokenizer.merge_file,
        "chat_template": config.tokenizer.chat_template,
    }
    if not (config.generation.json_schema or "{").startswith("{"):
        keys["json_schema"] = config.generation.json_schema
    files = {key: Path(value) for key, value in keys.items() if value and value != STANDARD_INPUT}
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
        "logprobs": "the text alone is shown",
        "sample_output_file": "texts are shown, not written",
    }
    given = {name: getattr(keys, name) for name in reasons}
    return [
        f"{name} ({value}) has no effect: text_gen_type is interactive, {reasons[name]}"
        for name, value in given.items()
        if value != fields[name].default
    ]


def write_samples(engine: Engine, job: Job) -> None:
    """Generate what the output does not have, and write it in order, each text as soon as those before it are there.

    On rank 0.
    """
    output, total = job.output, len(job.samples)
    output.begin()
    waiting = iter(range(output.kept, total))
    running: dict[int, tuple[int, Answer]] = {}  # places in the output, by the engine's numbers
    finished: dict[int, dict[str, Any]] = {}
    due = output.kept
    if due:
        log.info("%d of %d texts are in %s already", due, total, output.path)
    with TextProgress(due, total) as progress:
        while due < total:
            for place in islice(waiting, 2 * engine.slots - len(running)):
                running[engine.submit(job.samples[place].request)] = place, Answer()
            for update in engine.step():
                place, answer = running[update.request]
                answer.add(update)
                if update.reason is not None:
                    del running[update.request]
                    finished[place] = record(job.samples[place], answer, job.tokenizer, job.identities[place])
                progress.generated(len(update.tokens), int(update.reason is not None))
            while due in finished:
                output.write(finished.pop(due))
                due += 1
    log.info("%s, written to %s", progress.summary(), output.path)
