"""evaluate.py with eval_tasks: the harness on rank 0, a trained model on all ranks."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.config.schema.config import Config
from megatron.config.schema.run_keys import EvaluationKeys
from megatron.errors import RunError, UserError
from megatron.generation.chat import open_chat
from megatron.harness.hub import require_datasets
from megatron.harness.problems import task_problems
from megatron.harness.requests_cache import use_requests_cache
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
    from megatron.harness.results import as_json, as_table, write_samples

    results = _results(config, found, open_team)
    log.info("%s", as_table(results))
    for path in write_samples(results, target):
        log.info("samples written to %s", path)
    target.write_text(as_json(results), encoding="utf-8")
    log.info("written to %s", target)


def _results(config: Config, found: FoundModel, open_team: Callable[[], Team]) -> dict[str, Any]:
    """The harness's results with the configuration of the run. For rank 0."""
    from megatron.harness.language_model import HarnessModel

    keys, context = config.evaluation, found.plan.model.max_position_embeddings
    manager = open_tasks(keys.eval_include_path)
    names = find_tasks(keys.eval_tasks or (), manager)
    require_datasets(names, manager)
    if keys.eval_requests_cache is not None:
        use_requests_cache(keys.eval_requests_cache, names, manager)
    chat = open_chat(config.tokenizer, found.tokenizer) if keys.eval_chat_template else None
    batch = config.batch.train_micro_batch_size_per_gpu or config.generation.generation_batch_size
    model = HarnessModel(found.tokenizer, context, batch, config.training.seed, open_team, chat)
    results = run_harness(model, names, manager, **harness_options(keys))
    model.team.dismiss()
    results["config"] |= {"model": "deepy", "model_args": config.to_flat(), "batch_size": batch}
    return results | {"checkpoint": str(found.checkpoint), "tokenizer": found.tokenizer.describe()}


def harness_options(keys: EvaluationKeys) -> dict[str, Any]:
    """The options of the harness that the keys set."""
    return {
        "num_fewshot": keys.eval_num_fewshot,
        "limit": keys.eval_limit,
        "apply_chat_template": keys.eval_chat_template,
        "fewshot_as_multiturn": keys.eval_chat_template and keys.eval_fewshot_as_multiturn,
        "log_samples": keys.eval_log_samples,
        "cache_requests": keys.eval_requests_cache is not None,
    }


def run_harness(model: Any, names: list[str], manager: Any, **options: Any) -> dict[str, Any]:
    """The harness's results for tasks, groups or tags called `names`.

    model: a HarnessModel, on rank 0. options: of the harness's `simple_evaluate`.
    Before the model is needed, any failure is one of the tasks and becomes a UserError; once the model computes, a
    UserError becomes a RunError.
    """
    from lm_eval.evaluator import simple_evaluate

    try:
        return simple_evaluate(  # type: ignore[no-any-return]
            model, tasks=names, task_manager=manager, **{"log_samples": False, **options}
        )
    except UserError as error:
        if model.is_open:
            raise RunError(str(error)) from error
        raise
    except Exception as error:
        if model.was_needed:
            raise
        raise UserError(*task_problems(names, manager, error, options.get("limit"))) from error
