"""evaluate.py with eval_tasks: the harness on rank 0, a trained model on all ranks."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.config.schema.config import Config
from megatron.errors import RunError, UserError
from megatron.harness.problems import task_problems
from megatron.harness.tasks import check_harness, find_tasks, open_tasks
from megatron.harness.team import PATIENCE, Team
from megatron.inference import FoundModel, open_trained_model

log = logging.getLogger(__name__)


def evaluate_tasks(config: Config, found: FoundModel, target: Path) -> None:
    """Score `eval_tasks`, print tables and write the harness's results to `target`. Every rank calls it.

    Raises UserError for tasks or datasets that cannot be used, before the process group starts; RunError later.
    """
    check_harness(config.evaluation.eval_include_path)

    def open_team() -> Team:
        minutes = PATIENCE.total_seconds() / 60  # the other ranks wait while rank 0 downloads datasets
        return Team(open_trained_model(found, config.launcher.distributed_backend, minutes))

    if int(os.environ.get("RANK", "0")) != 0:
        open_team().serve()
        return
    from megatron.harness.results import as_json, as_table

    results = _results(config, found, open_team)
    log.info("%s", as_table(results))
    target.write_text(as_json(results), encoding="utf-8")
    log.info("written to %s", target)


def _results(config: Config, found: FoundModel, open_team: Callable[[], Team]) -> dict[str, Any]:
    """The harness's results with the configuration of the run. For rank 0."""
    from megatron.harness.language_model import HarnessModel

    keys, context = config.evaluation, found.plan.model.max_position_embeddings
    manager = open_tasks(keys.eval_include_path)
    names = find_tasks(keys.eval_tasks or (), manager)
    batch = config.batch.train_micro_batch_size_per_gpu or config.generation.generation_batch_size
    model = HarnessModel(found.tokenizer, context, batch, config.training.seed, open_team)
    results = run_harness(model, names, manager, keys.eval_num_fewshot, keys.eval_limit)
    model.team.dismiss()
    results["config"] |= {"model": "deepy", "model_args": config.to_flat(), "batch_size": batch}
    return results | {"checkpoint": str(found.checkpoint), "tokenizer": found.tokenizer.describe()}


def run_harness(
    model: Any, names: list[str], manager: Any, num_fewshot: int | None = None, limit: float | None = None
) -> dict[str, Any]:
    """The harness's results for tasks, groups or tags called `names`.

    model: a HarnessModel, on rank 0. limit: documents per task; below 1 a share of them; None: all.
    Before the model is needed, any failure is one of the tasks and becomes a UserError; once the model computes, a
    UserError becomes a RunError.
    """
    from lm_eval.evaluator import simple_evaluate

    try:
        return simple_evaluate(  # type: ignore[no-any-return]
            model, tasks=names, num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False
        )
    except UserError as error:
        if model.is_open:
            raise RunError(str(error)) from error
        raise
    except Exception as error:
        if model.was_needed:
            raise
        raise UserError(*task_problems(names, manager, error, limit)) from error
