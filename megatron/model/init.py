"""Init methods: normal distributions with different standard deviations.

Biases always start at zero and norm weights at one. An init method maps the model plan to a function that fills a
whole tensor, or any part of it if the function is `Independent`; sizes are of the whole model, so that tensor
parallelism does not change the distribution.
"""

import math
from functools import partial

import torch
from torch import Tensor

from megatron.config.plan import ModelPlan
from megatron.parallel.initial_values import Independent
from megatron.parallel.parameter import Initialiser
from megatron.registry import resolve


def weight_initialisers(model: ModelPlan) -> tuple[Initialiser, Initialiser]:
    """The initialisers of all weights except output projections, and of output projections."""
    return resolve("init_method", model.init_method)(model), resolve("init_method", model.output_init_method)(model)


def normal(model: ModelPlan) -> Initialiser:
    """N(0, init_std), as in GPT-2 (Radford et al., 2019)."""
    return _gaussian(model.init_std)


def scaled_normal(model: ModelPlan) -> Initialiser:
    """N(0, init_std / sqrt(2 * num_layers)), for the 2 * num_layers projections that add to the residual stream.

    As in GPT-2 and Megatron-LM (https://arxiv.org/abs/1909.08053).
    """
    return _gaussian(model.init_std / math.sqrt(2 * model.num_layers))


def small_init(model: ModelPlan) -> Initialiser:
    """N(0, sqrt(2 / (5 * hidden_size))), the SmallInit of https://arxiv.org/abs/1910.05895."""
    return _gaussian(math.sqrt(2 / (5 * model.hidden_size)))


def wang_init(model: ModelPlan) -> Initialiser:
    """N(0, 2 / (num_layers * sqrt(hidden_size))), for output projections.

    Ben Wang's choice for GPT-J (mesh-transformer-jax); GPT-NeoX-20B uses it (https://arxiv.org/abs/2204.06745).
    """
    return _gaussian(2 / (model.num_layers * math.sqrt(model.hidden_size)))


def _gaussian(standard_deviation: float) -> Initialiser:
    return Independent(partial(_normal, standard_deviation=standard_deviation))


def _normal(tensor: Tensor, generator: torch.Generator, standard_deviation: float) -> None:
    tensor.normal_(0, standard_deviation, generator=generator)
