"""Init methods: normal and uniform distributions, and orthogonal matrices.

Biases always start at zero and norm weights at one, those of rmsnorm_1p at zero. An init method maps the model plan to
a function that fills a whole tensor, or any part of it if the function is `Independent`; sizes are of the whole model
and the whole matrix, so that tensor parallelism does not change the distribution. The formulas are GPT-NeoX's, which
applies them to gate and up as one matrix.
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


def single_residual_scaled_normal(model: ModelPlan) -> Initialiser:
    """N(0, init_std / sqrt(num_layers)), for one projection in each layer that adds to the residual stream."""
    return _gaussian(model.init_std / math.sqrt(model.num_layers))


def small_init(model: ModelPlan) -> Initialiser:
    """N(0, sqrt(2 / (5 * hidden_size))), the SmallInit of https://arxiv.org/abs/1910.05895."""
    return _gaussian(math.sqrt(2 / (5 * model.hidden_size)))


def wang_init(model: ModelPlan) -> Initialiser:
    """N(0, 2 / (num_layers * sqrt(hidden_size))), for output projections.

    Ben Wang's choice for GPT-J (mesh-transformer-jax); GPT-NeoX-20B uses it (https://arxiv.org/abs/2204.06745).
    """
    return _gaussian(2 / (model.num_layers * math.sqrt(model.hidden_size)))


def xavier_normal(_: ModelPlan) -> Initialiser:
    """N(0, sqrt(2 / (inputs + outputs))) of a matrix (Glorot and Bengio, 2010)."""
    return Independent(partial(_normal, standard_deviation=1.0), lambda shape: math.sqrt(2 / sum(shape)))


def xavier_uniform(_: ModelPlan) -> Initialiser:
    """Uniform between +-sqrt(6 / (inputs + outputs)) of a matrix (Glorot and Bengio, 2010)."""
    return Independent(_uniform, lambda shape: math.sqrt(6 / sum(shape)))


def orthogonal(_: ModelPlan) -> Initialiser:
    """A random matrix with orthogonal rows or columns, whichever are fewer, of length sqrt(2).

    https://arxiv.org/abs/1312.6120. Every rank that holds a part factorizes the whole matrix, in fp32 on one core: for
    m x n with m >= n about 4 m n^2 FLOPs (4096 x 4096: 10 seconds), and a few copies of it in host memory.
    """
    return partial(_orthogonal, gain=math.sqrt(2))


def scaled_orthogonal(model: ModelPlan) -> Initialiser:
    """As `orthogonal`, with rows or columns of length sqrt(2 / num_layers)."""
    return partial(_orthogonal, gain=math.sqrt(2 / model.num_layers))


def _gaussian(standard_deviation: float) -> Initialiser:
    return Independent(partial(_normal, standard_deviation=standard_deviation))


def _normal(tensor: Tensor, generator: torch.Generator, standard_deviation: float) -> None:
    tensor.normal_(0, standard_deviation, generator=generator)


def _uniform(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.uniform_(-1, 1, generator=generator)


def _orthogonal(tensor: Tensor, generator: torch.Generator, gain: float) -> None:
    torch.nn.init.orthogonal_(tensor, gain, generator=generator)
