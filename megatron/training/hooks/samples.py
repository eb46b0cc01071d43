"""Hook: texts that the model writes as it learns, every `sample_interval` steps."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron.config.schema.generation_keys import GenerationKeys
from megatron.errors import UserError
from megatron.files import AppendedLines
from megatron.generation.engine import Engine, EngineSettings
from megatron.generation.messages import Messages
from megatron.generation.prompts import Prompt, read_prompts, written_prompt
from megatron.generation.requests import Answer
from megatron.generation.samples import Sample, SampleMaker
from megatron.generation.sampling import wrong_settings
from megatron.inference import TrainedModel
from megatron.training.decoding import decoding
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, Run

log = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"
SHOWN = 160  # characters of a text in the log


class TextSamples(Hook):
    """Continues prompts with the weights as they are: rank 0 asks, all ranks compute, nothing is copied.

    Seeds do not depend on the step, so that a text changes because of the weights alone.
    """

    def __init__(self, run: Run, interval: int, settings: EngineSettings, samples: Sequence[Sample]) -> None:
        """interval: in steps. samples: on rank 0."""
        self._run, self._interval, self._settings, self._samples = run, interval, settings, samples
        self._messages: Messages | None = None  # of all rounds, as each has a process group
        folder = run.config.log_folder
        lost = "samples are in the log only"
        self._file = None if folder is None else AppendedLines(Path(folder) / SAMPLES_FILE, lost)

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Write texts if due, and at the last step, unless the run is being stopped early."""
        if step.is_stop or not step.is_due(self._interval):
            return NOTHING
        try:
            with decoding(self._run, "samples") as model:
                answers = self._answers(model)
        except UserError as error:  # too little memory is left: a run does not end because of its samples
            log.warning("no samples at step %d: %s", step.state.step, error)
            return NOTHING
        if dist.get_rank() == 0:
            self._record(step.state.step, answers)
        return NOTHING

    def _answers(self, model: TrainedModel) -> list[Answer]:
        """Of all samples, on rank 0. Raises UserError, on each rank or on rank 0 alone, for what does not fit."""
        self._messages = self._messages or Messages()
        engine = Engine(model, self._settings, self._messages)
        if dist.get_rank() != 0:
            engine.follow()
            return []
        try:
            return engine.run([sample.request for sample in self._samples])
        finally:
            engine.close()

    def _record(self, step: int, answers: Sequence[Answer]) -> None:
        now, lines, shown = time.time(), [], []
        for sample, answer in zip(self._samples, answers, strict=True):
            facts = {
                "step": step,
                "time": now,
                "number": sample.prompt,
                "sample": sample.number,
                "prompt": sample.context,
                "text": answer.text,
                "tokens": len(answer.tokens),
                "finish": answer.reason,
            }
            lines.append(json.dumps(facts) + "\n")
            shown.append(f"  {_shortened(sample.context)} -> {_shortened(answer.text)}")
        log.info("samples at step %d\n%s", step, "\n".join(shown))
        if self._file is not None:
            self._file.append("".join(lines))
        self._run.events.record("samples", f"{len(lines)} texts", step, prompts=len(lines))


def _shortened(text: str) -> str:
    """In one line, in quotation marks."""
    return json.dumps(text if len(text) <= SHOWN else f"{text[:SHOWN]}...", ensure_ascii=False)


def prompts_of(keys: GenerationKeys) -> list[Prompt]:
    """The prompts that `sample_prompts` holds or names. Raises UserError for a file that cannot be used."""
    if isinstance(keys.sample_prompts, str):
        named = {"sample_input_file": keys.sample_prompts, "sample_input_format": None}
        try:
            return read_prompts(keys.model_copy(update=named))
        except UserError as error:
            raise UserError(
                *(text.replace("sample_input_file", "sample_prompts") for text in error.problems)
            ) from error
    prompts = enumerate(keys.sample_prompts or (), 1)
    return [written_prompt(text, keys, f"sample_prompts, text {number}") for number, text in prompts]


def samples(run: Run) -> TextSamples | None:
    """Registry entry: with `sample_interval`. Collective.

    Raises UserError, on rank 0, for prompts that cannot be continued.
    """
    keys, grid = run.config.generation, run.engine.grid
    if keys.sample_interval is None:
        return None
    context = run.plan.model.max_position_embeddings
    found: list[Sample] = []
    needed = [(1, 1)]
    if dist.get_rank() == 0:
        maker = SampleMaker(run.tokenizer, context, run.config.training.seed, run.config.tokenizer)
        found = maker.samples(prompts_of(keys))
        _refuse_unusable(found, run.tokenizer.vocab_size, context)
        longest = max(len(sample.request.ids) + sample.request.maximum_tokens for sample in found)
        beams = max((sample.request.beams.count for sample in found if sample.request.beams), default=1)
        needed = [(min(context, longest), max(min(keys.generation_batch_size, len(found)), beams * grid.size("pipe")))]
    dist.broadcast_object_list(needed, src=0, group=grid.host_group)
    capacity, slots = needed[0]
    settings = EngineSettings(max(slots, grid.size("pipe")), capacity, keys.prefill_chunk_size)
    return TextSamples(run, keys.sample_interval, settings, found)


def _refuse_unusable(samples: Sequence[Sample], vocabulary: int, context: int) -> None:
    """Raise UserError for what the engine would refuse when training has long begun."""
    problems = []
    for sample in samples:
        asked, place = sample.request, f"sample_prompts, text {sample.prompt + 1}"
        problems += [f"{place}: {problem}" for problem in wrong_settings(asked.sampling, vocabulary)]
        if asked.beams and len(asked.ids) + asked.maximum_tokens > context:
            problems.append(f"{place}: a beam search cannot go beyond the model's context ({context} tokens)")
    if problems:
        raise UserError(*problems)
