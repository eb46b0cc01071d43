"""How like the model's answers to prompts are to references: BLEU and chrF as sacrebleu has them, and exact match."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.config.schema.config import Config
from megatron.errors import UserError, work_begins
from megatron.generation.prompts import Prompt, read_prompts
from megatron.generation.run import open_engine, sample_maker
from megatron.inference import FoundModel, start_ranks
from megatron.text_files import read_text

log = logging.getLogger(__name__)

FIELDS = 'an object with a text "prompt", and a text "reference" or a list of them, "references"'
SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Question:
    """A prompt, and the answers it should have: at least one."""

    prompt: str
    references: tuple[str, ...]


def measure_answers(config: Config, found: FoundModel) -> dict[str, Any]:
    """The figures of `score_answers` with all answers, printed too. Collective; empty on all ranks but 0.

    Raises UserError, before work begins, for prompts and references that cannot be used.
    """
    if find_spec("sacrebleu") is None:
        raise UserError('eval_references needs sacrebleu: pip install "sacrebleu>=2.4", or -e ".[eval]"')
    questions = read_questions(config)
    alone = config.generation.model_copy(update={"num_samples": 1})
    prompts = [Prompt(f"prompt {number}", alone, question.prompt) for number, question in enumerate(questions, 1)]
    samples = sample_maker(config, found).samples(prompts)
    grid = start_ranks(found, config.launcher.distributed_backend)
    engine = open_engine(config, found, grid, samples, config.generation.generation_batch_size)
    if dist.get_rank() != 0:
        engine.follow()
        return {}
    with work_begins():
        answers = [answer.text for answer in engine.run(sample.request for sample in samples)]
    engine.close()
    figures = score_answers(answers, questions)
    log.info("%s", table(figures))
    written = [
        {"prompt": question.prompt, "references": question.references, "answer": answer}
        for question, answer in zip(questions, answers, strict=True)
    ]
    return {"results": {"answers": figures}, "answers": written}


def read_questions(config: Config) -> list[Question]:
    """What `eval_references` asks: prompts with references, or references of the prompts in `sample_input_file`.

    Raises UserError for files that cannot be read, do not belong together, or hold something else.
    """
    path = Path(config.evaluation.eval_references or "")
    text = read_text(path, "eval_references")
    if path.suffix == ".jsonl":
        return _questions_of(path, text)
    keys = config.generation
    prompts = [prompt.text for prompt in read_prompts(keys)]
    references = text.removesuffix("\n").split("\n")
    if len(prompts) != len(references):
        raise UserError(
            f"eval_references ({path}) has {len(references):,} lines, one reference each, but sample_input_file "
            f"({keys.sample_input_file}) has {len(prompts):,} prompts"
        )
    return [Question(prompt, (reference,)) for prompt, reference in zip(prompts, references, strict=True)]


def score_answers(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, Any]:
    """BLEU and chrF of all answers together, 0 to 100, with sacrebleu's signatures, and the share of exact matches.

    An answer matches if it equals one of the references, white space around both left out.
    """
    from sacrebleu.metrics import BLEU, CHRF

    most = max(len(question.references) for question in questions)
    padded = [[*question.references, *[None] * (most - len(question.references))] for question in questions]
    streams = [list(stream) for stream in zip(*padded, strict=True)]
    figures: dict[str, Any] = {"prompts": len(answers)}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        figures[name] = metric.corpus_score(list(answers), streams).score
        figures[f"{name}_signature"] = str(metric.get_signature())
    matches = [
        answer.strip() in map(str.strip, question.references)
        for answer, question in zip(answers, questions, strict=True)
    ]
    return figures | {"exact_match": sum(matches) / len(matches)}


def table(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    return "\n".join(
        [
            f"answers to {figures['prompts']:,} prompts",
            f"  BLEU        {figures['bleu']:8.2f}   {figures['bleu_signature']}",
            f"  chrF        {figures['chrf']:8.2f}   {figures['chrf_signature']}",
            f"  exact match {figures['exact_match']:8.2%}",
        ]
    )


def _questions_of(path: Path, text: str) -> list[Question]:
    """The questions in JSON lines. Raises UserError with the number of each line that is something else."""
    found, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        question = _question(line)
        if question is None:
            problems.append(f"eval_references: {path}, line {number}: not {FIELDS}")
        else:
            found.append(question)
    if len(problems) > SHOWN_PROBLEMS:
        problems[SHOWN_PROBLEMS:] = [f"... and {len(problems) - SHOWN_PROBLEMS:,} more"]
    if problems or not found:
        raise UserError(*problems or [f"eval_references ({path}) holds no line"])
    return found


def _question(line: str) -> Question | None:
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    if not isinstance(fields, dict) or ("reference" in fields) == ("references" in fields):
        return None
    references = fields.get("references", [fields.get("reference")])
    is_list = isinstance(references, list) and references and all(isinstance(each, str) for each in references)
    return Question(fields["prompt"], tuple(references)) if is_list and isinstance(fields.get("prompt"), str) else None
