"""A small model with random weights, opened the way generation and evaluation open a trained one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from megatron.engine.inference import InferenceEngine
from megatron.inference import TrainedModel
from megatron.model.gpt import gpt_layers
from megatron.parallel.grid import ParallelGrid
from megatron.tokenizer.build import build_tokenizer
from tests import tiny
from tests.ranks.run import one_rank


def trained_model(grid: ParallelGrid, **model: Any) -> TrainedModel:
    """On `grid`: bytes as tokens, a context of 16, weights large enough that prompts get different continuations."""
    tokenizer = build_tokenizer("CharLevelTokenizer")
    plan = tiny.plan(pipe=grid.size("pipe"), tensor=grid.size("tensor"), data=grid.size("data"))
    sizes = {"vocab_size": tokenizer.vocab_size, "padded_vocab_size": 264, "init_std": 0.4} | model
    plan = replace(plan, model=replace(plan.model, **sizes))
    layers = gpt_layers(plan.model, grid, seed=3)
    engine = InferenceEngine(layers, grid, torch.float32, plan.model.hidden_size)
    return TrainedModel(engine, grid, plan, tokenizer)


@contextmanager
def one_rank_model(**model: Any) -> Iterator[TrainedModel]:
    """The model in this process alone."""
    with one_rank() as grid:
        yield trained_model(grid, **model)
