"""Norms, activations, positions and first weights against their formulas, over everything in the registry."""

import math

import pytest
import torch
from torch import Tensor

from megatron.errors import UserError
from megatron.model.positions import LearnedTable, RotaryTable
from megatron.parallel.initial_values import initialise
from megatron.parallel.parameter import name_parameters
from megatron.registry import names, resolve
from tests.models import random_tensor, randomise, small
from tests.ranks.run import one_rank


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid:
        yield grid


def gauss(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


ACTIVATIONS = {
    "gelu": (gauss, False),
    "gelu_tanh": (lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), False),
    "relu": (lambda x: x.clamp(min=0), False),
    "silu": (lambda x: x * torch.sigmoid(x), False),
    "mish": (lambda x: x * torch.tanh(torch.log1p(torch.exp(x))), False),
    "softsign": (lambda x: x / (1 + x.abs()), False),
    "glu": (torch.sigmoid, True),
    "bilinear": (lambda x: x, True),
    "geglu_tanh": (lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), True),
    "swiglu": (lambda x: x * torch.sigmoid(x), True),
    "geglu": (gauss, True),
    "reglu": (lambda x: x.clamp(min=0), True),
}


@pytest.mark.parametrize("name", names("activation"))
def test_an_activation_computes_its_formula(name):
    formula, gated = ACTIVATIONS[name]
    activation, x = resolve("activation", name), torch.linspace(-5, 5, 101)
    assert activation.gated == gated
    torch.testing.assert_close(activation.function(x), formula(x))


NORMS = {
    "layernorm": lambda x, w: centred(x) / (centred(x).square().mean(-1, keepdim=True) + 0.01).sqrt() * w,
    "rmsnorm": lambda x, w: x / (x.square().mean(-1, keepdim=True) + 0.01).sqrt() * w,
    "rmsnorm_1p": lambda x, w: x / (x.square().mean(-1, keepdim=True) + 0.01).sqrt() * (1 + w),
    "non_parametric_layernorm": lambda x, w: centred(x) / (centred(x).square().mean(-1, keepdim=True) + 0.01).sqrt(),
    "scalenorm": lambda x, w: x / x.square().sum(-1, keepdim=True).sqrt() * w,
}


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", names("norm"))
def test_a_norm_computes_its_formula(grid, name, bias, dtype):
    norm = resolve("norm", name)(small(norm=name, norm_bias=bias, norm_epsilon=0.01), grid)
    name_parameters(norm, "norm", seed=1)
    initialise(norm)
    x = 3 + random_tensor((2, 5, 32), 0)
    first = torch.zeros(()) if name == "rmsnorm_1p" else torch.ones(())
    torch.testing.assert_close(norm(x), NORMS[name](x, first))
    randomise(norm)
    norm.to(dtype)
    x = x.to(dtype)
    values = {key: parameter.double() for key, parameter in norm.named_parameters()}
    assert ("bias" in values) == (bias and name == "layernorm")
    expected = NORMS[name](x.double(), values.get("weight")) + values.get("bias", 0)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1 / 64, "atol": 1 / 64}
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).double(), expected, check_dtype=False, **tolerance)


def test_a_small_weight_of_rmsnorm_1p_is_not_rounded_away_in_bf16(grid):
    norm = resolve("norm", "rmsnorm_1p")(small(norm="rmsnorm_1p"), grid).bfloat16()
    with torch.no_grad():
        norm.weight.fill_(0.003)
    x = random_tensor((2, 5, 32), 0).bfloat16()
    exact = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    # 1.003 is 1 in bf16; the roundings of 320 results, up to 1/512 each, cancel in the mean
    share = (norm(x).double() / exact).mean()
    assert share.item() == pytest.approx(1.003, abs=0.001)


def test_scalenorm_divides_by_no_less_than_its_epsilon(grid):
    norm = resolve("norm", "scalenorm")(small(norm="scalenorm", norm_epsilon=0.5), grid)
    torch.nn.init.ones_(norm.weight)
    x = torch.full((1, 1, 32), 1e-3)
    torch.testing.assert_close(norm(x), x / 0.5)


DEVIATIONS = {
    "normal": 0.02,
    "scaled_normal": 0.02 / math.sqrt(2 * 12),
    "small_init": math.sqrt(2 / (5 * 768)),
    "wang_init": 2 / (12 * math.sqrt(768)),
    "single_residual_scaled_normal": 0.02 / math.sqrt(12),
    "xavier_normal": math.sqrt(2 / 2000),
    "xavier_uniform": math.sqrt(2 / 2000),
    "orthogonal": math.sqrt(2 / 1000),
    "scaled_orthogonal": math.sqrt(2 / 12 / 1000),
}


@pytest.mark.parametrize("name", names("init_method"))
def test_an_init_method_draws_with_its_standard_deviation(name):
    model = small(num_layers=12, hidden_size=768, init_std=0.02)
    weights = torch.empty(1000, 1000)
    resolve("init_method", name)(model)(weights, torch.Generator().manual_seed(0))
    # a million draws: their deviation is known to 0.07 %, their mean to a thousandth of it
    assert weights.std() == pytest.approx(DEVIATIONS[name], rel=0.004)
    assert abs(weights.mean()) < 0.005 * DEVIATIONS[name]


def test_xavier_uniform_has_bounds_where_xavier_normal_has_tails():
    generator, weights = torch.Generator().manual_seed(0), torch.empty(2, 300, 100)
    for name, matrix in zip(("xavier_uniform", "xavier_normal"), weights, strict=True):
        resolve("init_method", name)(small())(matrix, generator)
    bound = math.sqrt(6 / 400)
    assert 0.999 * bound < weights[0].abs().max() <= bound < weights[1].abs().max()


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)], ids=str)
def test_an_orthogonal_matrix_has_orthogonal_rows_or_columns_of_one_length(shape):
    weights = torch.empty(shape)
    resolve("init_method", "orthogonal")(small())(weights, torch.Generator().manual_seed(0))
    products = weights @ weights.t() if shape[0] < shape[1] else weights.t() @ weights
    torch.testing.assert_close(products, 2 * torch.eye(16))


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_rotary_positions_turn_pairs_and_leave_the_rest(grid, fraction):
    table = RotaryTable(small(head_size=8, rotary_fraction=fraction), grid)
    x = random_tensor((2, 6, 3, 8), 0)
    turned, width = table(x), int(8 * fraction)
    half = width // 2
    for position in range(6):
        angles = position * 10000.0 ** (-torch.arange(half) * 2 / width)
        pairs = torch.complex(x[:, position, :, :half], x[:, position, :, half:width]) * torch.polar(
            torch.ones(half), angles
        )
        expected = torch.cat([pairs.real, pairs.imag, x[:, position, :, width:]], dim=-1)
        torch.testing.assert_close(turned[:, position], expected)


def test_rotary_scores_depend_on_the_distance_alone(grid):
    table = RotaryTable(small(rotary_fraction=1.0), grid)
    query, key = random_tensor((1, 1, 1, 8), 0), random_tensor((1, 1, 1, 8), 1)

    def score(at: int, other: int) -> float:
        return float((table(query, torch.tensor([[at]])) * table(key, torch.tensor([[other]]))).sum())

    assert score(5, 3) == pytest.approx(score(12, 10), rel=1e-4)
    assert score(5, 3) != pytest.approx(score(5, 4), rel=1e-2)


def test_rotary_angles_stay_fp32_for_bf16_heads(grid):
    table, x = RotaryTable(small(max_position_embeddings=2048), grid), random_tensor((1, 2048, 2, 8), 0)
    turned = table(x.bfloat16())
    assert table.tables[0].dtype == torch.float32 and turned.dtype == torch.bfloat16
    # only the roundings of input and output remain: 2^-8 each; bf16 angles beyond 256 would be off by whole turns
    torch.testing.assert_close(turned.float(), table(x), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("fraction", [0.1, 0.4])
def test_rotary_positions_refuse_a_part_that_cannot_be_paired(grid, fraction):
    with pytest.raises(UserError, match=r"rotary_pct .* must be an even number"):
        RotaryTable(small(head_size=8, rotary_fraction=fraction), grid)


def test_learned_positions_add_the_vector_of_each_position(grid):
    table = LearnedTable(small(), grid)
    name_parameters(table, "positions", seed=1)
    initialise(table)
    hidden = random_tensor((2, 4, 32), 0)
    torch.testing.assert_close(table(hidden), hidden + table.weight[:4])
    positions = torch.tensor([[3, 0, 1, 2], [5, 6, 7, 8]])
    torch.testing.assert_close(table(hidden, positions), hidden + table.weight[positions])
