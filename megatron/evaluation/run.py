"""evaluate.py: find the model, measure what is asked, write the results."""

import json
import logging
import os
from datetime import datetime
from pathlib import Path

import torch.distributed as dist

from megatron.config.schema.config import Config
from megatron.engine.distributed import stop
from megatron.errors import UserError
from megatron.evaluation.answers import measure_answers
from megatron.evaluation.perplexity import measure_perplexity
from megatron.harness.run import evaluate_tasks
from megatron.inference import find_trained_model
from megatron.logging import configure
from megatron.record.secrets import values_without_secrets

log = logging.getLogger(__name__)


def evaluate(config: Config) -> None:
    """Evaluate the model in `load`, print tables and write a JSON file. Every rank calls it.

    Raises UserError, before work begins, for a wrong configuration, data, tasks or checkpoint.
    """
    configure(int(os.environ.get("RANK", "0")))
    found = find_trained_model(config)
    target = results_file(config, datetime.now())
    if config.evaluation.eval_tasks:
        evaluate_tasks(config, found, target)
    else:
        measure = measure_answers if config.evaluation.eval_references else measure_perplexity
        results = measure(config, found)
        if dist.get_rank() == 0:
            document = {
                **results,
                "checkpoint": str(found.checkpoint),
                "tokenizer": found.tokenizer.describe(),
                "config": values_without_secrets(config.to_flat()),
            }
            target.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            log.info("written to %s", target)
    stop()


def results_file(config: Config, now: datetime) -> Path:
    """`[PREFIX_]eval_results_mm-dd-YYYY-HH-MM-SS.json` in log_dir, else save, else here; a prefix with a folder wins.

    Makes the folder. Raises UserError where it cannot be written.
    """
    prefix = config.evaluation.eval_results_prefix
    name = f"{prefix}_" * bool(prefix) + f"eval_results_{now:%m-%d-%Y-%H-%M-%S}.json"
    base = "" if Path(prefix).parent != Path() else config.logging.log_dir or config.checkpoint.save or ""
    path = Path(base) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the results cannot be written to {path.parent}: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"the results cannot be written to {path.parent}: no permission")
    return path
