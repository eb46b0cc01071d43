"""float8 products, by torch's own kernel, which a CPU has too."""

import pytest
import torch

from megatron.errors import UserError
from megatron.parallel import products
from tests.ranks.layouts import Curve, curves
from tests.ranks.moves import different_tensors
from tests.ranks.moves import train as train_and_save

BF16 = {"precision": "bf16", "rate": 0.1}
FLOAT8 = BF16 | {"model": {"float8": True}}
# half of the distance between neighbouring numbers, relative to them
E4M3, E5M2, BFLOAT16 = 2**-4, 2**-3, 2**-8


def bound(left: torch.Tensor, right: torch.Tensor, unit: float) -> torch.Tensor:
    """The error of a product of factors that are rounded by E4M3 and `unit`.

    Relative to the sum of the magnitudes, (1 + u)(1 + v)(1 + w) - 1 with the rounding w of the result; elements below
    2 ** -15 of the largest, where float8 is coarser, add less than the tenth that is allowed on top.
    """
    relative = (1 + E4M3) * (1 + unit) * (1 + BFLOAT16) - 1
    return 1.1 * relative * (left.float().abs() @ right.float().abs())


def test_the_three_products_of_a_float8_layer_are_off_by_its_rounding_at_most_and_not_exact():
    torch.manual_seed(0)
    inputs = torch.randn(2, 32, 48, dtype=torch.bfloat16, requires_grad=True)
    weight = (0.02 * torch.randn(64, 48)).to(torch.bfloat16).requires_grad_()
    bias = torch.randn(64, dtype=torch.bfloat16, requires_grad=True)
    gradient = 1e-4 * torch.randn(2, 32, 64).to(torch.bfloat16)
    found, wanted = (
        [output.detach() - bias.detach(), *torch.autograd.grad(output, (inputs, weight), gradient)]
        for output in (products.linear(inputs, weight, bias, float8) for float8 in (True, False))
    )
    flat, of_outputs = inputs.detach().flatten(0, 1), gradient.flatten(0, 1)
    bounds = (
        bound(flat, weight.detach().t(), E4M3) + 2 * BFLOAT16 * 8,  # and the bias, of at most 4, was added in bf16
        bound(of_outputs, weight.detach(), E5M2),
        bound(of_outputs.t(), flat, E5M2),
    )
    for one, other, allowed in zip(found, wanted, bounds, strict=True):
        gap = (one - other).float().abs().view_as(allowed)
        assert (gap <= allowed).all()
        assert gap.max() > 0, "computed in bf16"


def test_tensors_of_zeros_and_infinities_stay_what_they_are():
    zeros, ones = torch.zeros(16, 16, dtype=torch.bfloat16), torch.ones(16, 16, dtype=torch.bfloat16)
    assert torch.equal(products.linear(ones, zeros, None, True), zeros)
    assert not products.linear(ones, ones * float("inf"), None, True).isfinite().any(), "an overflow must be seen"


def test_float8_is_refused_where_there_are_no_float8_products():
    with pytest.raises(
        UserError, match=r"compute capability 8\.9 or above .*this is a CPU; leave precision_linear out"
    ):
        products.check_float8(torch.device("cpu"))


def gap(one: Curve, other: Curve) -> float:
    return max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))


@pytest.mark.long
def test_float8_trains_like_bf16_and_tensor_parallel_ranks_like_one():
    """The bound is measured.

    e is the largest gap between the curves of bf16 and fp32. What a linear layer rounds in float8 is 2 ** 4 (e4m3) to
    2 ** 5 (e5m2) times as coarse, in two factors instead of a result: float8 may be 64 e off bf16. Two float8 runs that
    round at different places (shards have their own scales) are each off bf16 as far as measured, f: they lie within
    2 f of each other, which is allowed 0.01 at least, the rounding of a bf16 loss of 4.
    """
    (exact,) = curves([{"rate": 0.1}])
    one, bf16 = curves([FLOAT8, BF16])
    (two,) = curves([FLOAT8 | {"tensor": 2, "sequence_parallel": True}])
    assert 0 < gap(one, bf16) < 64 * gap(exact, bf16)
    assert gap(one, two) < max(0.01, 2 * gap(one, bf16))


@pytest.mark.long
@pytest.mark.parametrize("there", [True, False])
def test_a_checkpoint_does_not_know_whether_float8_was_used(tmp_path, there):
    common = {"precision": "bf16"}
    saved, _ = train_and_save(tmp_path / "source", common | {"model": {"float8": there}}, None, 2)
    again, _ = train_and_save(tmp_path / "again", common | {"model": {"float8": not there}}, saved, 0)
    assert not different_tensors(saved, again)
