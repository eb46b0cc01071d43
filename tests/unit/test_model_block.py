"""A block adds both of its branches, whatever its biases, norms and residual are."""

import itertools

import pytest
import torch

from megatron.model.block import TransformerBlock
from megatron.parallel.parameter import name_parameters
from tests.models import random_tensor, randomise, small
from tests.ranks.run import one_rank


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid:
        yield grid


def make(grid, **changes) -> TransformerBlock:
    block = TransformerBlock(small(**changes), grid, 0, None).eval()
    name_parameters(block, "block", seed=1)
    randomise(block)
    return block


@pytest.mark.parametrize(
    ("residual", "attention_bias", "mlp_bias", "activation"),
    itertools.product(["serial", "parallel", "tied"], [True, False], [True, False], ["gelu", "swiglu"]),
)
def test_no_branch_is_ever_dropped(grid, residual, attention_bias, mlp_bias, activation):
    block = make(
        grid,
        parallel_residual=residual != "serial",
        tied_norm=residual == "tied",
        bias_in_query_key_value=attention_bias,
        bias_in_dense=attention_bias,
        bias_in_mlp=mlp_bias,
        activation=activation,
    )
    x = random_tensor((2, 5, 32), 3)
    attended = block.attention(block.input_norm(x))
    if residual == "serial":
        between = x + attended
        expected = between + block.mlp(block.post_attention_norm(between))
    else:
        norm = block.input_norm if residual == "tied" else block.post_attention_norm
        expected = x + attended + block.mlp(norm(x))
    torch.testing.assert_close(block(x), expected)
    has_bias = {
        name.split(".")[0] for name, _ in block.named_parameters() if name.endswith("bias") and "norm" not in name
    }
    assert has_bias == {name for name, used in (("attention", attention_bias), ("mlp", mlp_bias)) if used}
    assert hasattr(block, "post_attention_norm") == (residual != "tied")


def test_one_norm_is_for_parallel_residuals_only(grid):
    assert hasattr(make(grid, parallel_residual=False, tied_norm=True), "post_attention_norm")


@pytest.mark.parametrize("multiplier", [1.0, 0.25])
@pytest.mark.parametrize("placement", ["input", "output", "both"])
def test_norms_are_where_the_placement_says_and_branches_are_scaled_before_they_are_added(grid, placement, multiplier):
    block = make(grid, norm_placement=placement, norm="rmsnorm", residual_multiplier=multiplier)
    x = random_tensor((2, 5, 32), 3)
    before, after = placement != "output", placement != "input"
    norms = {name for name, _ in block.named_children() if name.endswith("norm")}
    mlp_input = "pre_mlp_norm" if placement == "both" else "post_attention_norm"
    expected = {"input_norm", mlp_input} if before else set()
    assert norms == expected | ({"post_attention_norm", "post_mlp_norm"} if after else set())
    attended = block.attention(block.input_norm(x) if before else x)
    between = x + multiplier * (block.post_attention_norm(attended) if after else attended)
    mixed = block.mlp(getattr(block, mlp_input)(between) if before else between)
    torch.testing.assert_close(block(x), between + multiplier * (block.post_mlp_norm(mixed) if after else mixed))


def test_parallel_branches_are_scaled_together(grid):
    plain, scaled = (make(grid, parallel_residual=True, residual_multiplier=factor) for factor in (1.0, 0.25))
    x = random_tensor((2, 5, 32), 3)
    torch.testing.assert_close(scaled(x), x + 0.25 * (plain(x) - x))


@pytest.mark.long
def test_a_parallel_bf16_block_with_biases_compiles_forward_and_backward(grid):
    block = make(grid, parallel_residual=True).bfloat16()
    x = random_tensor((2, 5, 32), 3).bfloat16().requires_grad_()
    expected = block(x)
    expected.sum().backward()
    gradient = block.mlp.down.bias.grad.clone()
    block.zero_grad()
    compiled = torch.compile(block, dynamic=False)(x)
    compiled.sum().backward()
    torch.testing.assert_close(compiled, expected, rtol=0.05, atol=0.1)
    torch.testing.assert_close(block.mlp.down.bias.grad, gradient, rtol=0.05, atol=0.1)
