"""Scores of tasks in training: what a run records, and that nothing else changes."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager

from megatron.checkpoint.state import TrainState
from megatron.config.load import config_from_flat
from megatron.errors import UserError
from megatron.harness.problems import refuse_unusable
from megatron.training.hooks.base import FinishedStep
from megatron.training.hooks.tasks import TaskScores
from tests.harness_tasks import CONTEXT, Weights, training_run, vocabulary, write_tasks

MODEL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": CONTEXT, "pos_emb": "rotary"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


@pytest.fixture(scope="module")
def manager(tasks):
    return TaskManager(include_path=str(tasks), include_defaults=False)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A training engine that has done a step, and the run that hooks see."""
    weights = Weights(MODEL | {"init_method_std": 0.4}, vocabulary(tmp_path_factory.mktemp("vocabulary")), {})
    config = config_from_flat(MODEL | {"eval_tasks": ["own_group"], "eval_batch_size": 5, "eval_limit": 6})
    with training_run(weights) as run:
        yield replace(run, config=config)


def finished(step: int, **flags: bool) -> FinishedStep:
    return FinishedStep(TrainState(step, 0, 0), SimpleNamespace(), 0.1, flags.pop("is_last", False), **flags)


def test_scores_are_metrics_of_the_steps_that_are_due(trainer, manager):
    hook = TaskScores(trainer, 4, ["own_group"], manager)
    assert not hook.after_step(finished(3)) and not hook.after_step(finished(4, is_last=True, is_stop=True))
    metrics = hook.after_step(finished(4))
    names = [f"tasks/{task}/{score}" for task in ("own_choice", "own_letters") for score in ("acc", "acc_norm")]
    assert set(metrics) == {*names, "tasks/own_group/acc"}
    assert metrics["tasks/own_group/acc"] == (metrics[names[0]] + metrics[names[2]]) / 2
    assert all(score * 6 == round(score * 6) for score in metrics.values() if score != metrics["tasks/own_group/acc"])
    assert hook.after_step(finished(5, is_last=True)) == metrics


def test_random_numbers_go_on_as_without_scores(trainer, manager):
    def drawn():
        return random.random(), np.random.random(), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    without = drawn()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    TaskScores(trainer, 1, ["own_choice"], manager).after_step(finished(1))
    assert drawn() == without


def test_tasks_whose_documents_cannot_be_asked_are_refused_when_the_run_starts(tmp_path):
    folder = write_tasks(tmp_path / "tasks")
    (folder / "own_letters.jsonl").write_text(json.dumps({"question": "x", "choices": ["a", ""], "answer": 0}) + "\n")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    refuse_unusable(["own_choice"], manager)
    with pytest.raises(UserError, match="eval_tasks: own_letters: a document has an empty choice"):
        refuse_unusable(["own_choice", "own_group"], manager)
