"""Hook: scores of tasks of the lm-evaluation-harness, every `eval_tasks_interval` steps."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.distributed as dist

from megatron.generation.engine import Engine
from megatron.generation.messages import Messages
from megatron.harness.problems import refuse_unusable
from megatron.harness.run import engine_settings, harness_options, model_on, open_harness, run_harness
from megatron.harness.tasks import check_harness
from megatron.inference import TrainedModel
from megatron.training.decoding import decoding, kept_random_states
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, Run

log = logging.getLogger(__name__)


class TaskScores(Hook):
    """Scores tasks with the weights as they are: rank 0 runs the harness, all ranks compute, nothing is copied."""

    def __init__(self, run: Run, interval: int, names: list[str], manager: Any) -> None:
        """interval: in steps. names, manager: the tasks, and the harness's TaskManager, on rank 0."""
        self._run, self._interval, self._names, self._manager = run, interval, names, manager
        self._messages: Messages | None = None  # of all evaluations, as each has a process group

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Score if due, and at the last step, unless the run is being stopped early. The metrics are rank 0's."""
        if step.is_stop or not step.is_due(self._interval):
            return NOTHING
        with decoding(self._run, "evaluation of tasks") as model:
            results = self._results(model)
        if results is None:
            return NOTHING
        from megatron.harness.results import as_table, metrics_of

        log.info("tasks at step %d\n%s", step.state.step, as_table(results))
        return metrics_of(results)

    def _results(self, model: TrainedModel) -> dict[str, Any] | None:
        """The harness's results on rank 0. Collective."""
        run, keys = self._run, self._run.config.evaluation
        self._messages = self._messages or Messages()
        engine = Engine(model, engine_settings(keys, model.context), self._messages)
        if dist.get_rank() != 0:
            engine.follow()
            return None
        asked = model_on(lambda: engine, run.config, run.tokenizer, model.context)
        results = run_harness(asked, self._names, self._manager, **harness_options(keys))
        engine.close()
        return results


def tasks(run: Run) -> TaskScores | None:
    """Registry entry: with `eval_tasks_interval`.

    Raises UserError, on rank 0, for tasks or documents that cannot be used.
    """
    keys = run.config.evaluation
    if keys.eval_tasks_interval is None:
        return None
    check_harness(keys.eval_include_path)
    hook = partial(TaskScores, run, keys.eval_tasks_interval)
    if dist.get_rank() != 0:
        return hook([], None)
    names, manager = open_harness(keys)
    with kept_random_states():
        refuse_unusable(names, manager, keys.eval_limit)
    return hook(names, manager)
