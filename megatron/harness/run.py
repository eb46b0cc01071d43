"""evaluate.py with eval_tasks: the harness on rank 0, a trained model on all ranks."""

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config.schema.config import Config
from megatron.config.schema.run_keys import EvaluationKeys
from megatron.errors import RunError, UserError
from megatron.generation.chat import open_chat
from megatron.generation.engine import Engine, EngineSettings
from megatron.harness.hub import require_datasets
from megatron.harness.problems import task_problems
from megatron.harness.requests_cache import use_requests_cache
from megatron.harness.tasks import check_harness, find_tasks, open_tasks
from megatron.inference import FoundModel, open_trained_model
from megatron.record.secrets import values_without_secrets
from megatron.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from megatron.harness.language_model import HarnessModel

log = logging.getLogger(__name__)

# Datasets are fetched and requests built on one rank while the others wait.
PATIENCE = timedelta(days=1)
AUTOMATIC_BATCH = 64  # texts at once, if they fit into memory: reading is no faster with more


def evaluate_tasks(config: Config, found: FoundModel, target: Path) -> None:
    """Score `eval_tasks`, print tables and write the harness's results to `target`. Every rank calls it.

    Raises UserError for tasks or datasets that cannot be used, before the process group starts; RunError later.
    """
    check_harness(config.evaluation.eval_include_path)
    if int(os.environ.get("RANK", "0")) != 0:
        _open_engine(config, found).follow()
        return
    from megatron.harness.results import as_json, as_table, write_samples

    results = _results(config, found)
    log.info("%s", as_table(results))
    for path in write_samples(results, target):
        log.info("samples written to %s", path)
    target.write_text(as_json(results), encoding="utf-8")
    log.info("written to %s", target)


def harness_model(config: Config, found: FoundModel) -> "HarnessModel":
    """The model for the harness, on rank 0. Its weights are loaded when the first request has come."""
    return model_on(
        lambda: _open_engine(config, found), config, found.tokenizer, found.plan.model.max_position_embeddings
    )


def model_on(open_engine: Callable[[], Engine], config: Config, tokenizer: Tokenizer, context: int) -> "HarnessModel":
    """A model for the harness, on rank 0, computed by the engine that `open_engine` gives.

    Raises UserError where questions are to be chats and there is no template.
    """
    from megatron.harness.language_model import HarnessModel

    chat = open_chat(config.tokenizer, tokenizer) if config.evaluation.eval_chat_template else None
    return HarnessModel(tokenizer, context, config.training.seed, open_engine, chat)


def _open_engine(config: Config, found: FoundModel) -> Engine:
    """The engine on this rank. Collective."""
    minutes = PATIENCE.total_seconds() / 60
    model = open_trained_model(found, config.launcher.distributed_backend, minutes)
    return Engine(model, engine_settings(config.evaluation, model.context))


def engine_settings(keys: EvaluationKeys, context: int) -> EngineSettings:
    """The settings of the engine that `eval_batch_size` asks for."""
    asked = keys.eval_batch_size
    return EngineSettings(AUTOMATIC_BATCH if asked == "auto" else asked, context)


def open_harness(keys: EvaluationKeys) -> tuple[list[str], Any]:
    """The names of the tasks that the keys ask for, and the harness's TaskManager.

    Raises UserError for tasks that are not there or whose datasets cannot be fetched.
    """
    manager = open_tasks(keys.eval_include_path)
    names = find_tasks(keys.eval_tasks or (), manager)
    require_datasets(names, manager)
    if keys.eval_requests_cache is not None:
        use_requests_cache(keys.eval_requests_cache, names, manager)
    return names, manager


def _results(config: Config, found: FoundModel) -> dict[str, Any]:
    """The harness's results with the configuration of the run. For rank 0."""
    keys = config.evaluation
    names, manager = open_harness(keys)
    model = harness_model(config, found)
    results = run_harness(model, names, manager, **harness_options(keys))
    model.engine.close()
    arguments = values_without_secrets(config.to_flat())
    results["config"] |= {"model": "deepy", "model_args": arguments, "batch_size": model.engine.slots}
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
