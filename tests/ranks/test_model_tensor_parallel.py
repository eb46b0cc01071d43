"""The whole model on 2 ranks equals the model on 1: logits, loss and every slice of every gradient.

fp32. A rank's share changes the order of sums of up to a hundred terms, and three layers pass the difference on:
gaps seen are below 3e-6 of a tensor's largest element. A gradient that is counted twice, or a bias that is added on
every rank, is off by its own size; 2e-5 lies between with room on both sides.
"""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.plan import ModelPlan
from megatron.model.gpt import gather_logits
from megatron.parallel.grid import ParallelGrid
from tests.models import VARIETY, build, new_cache, random_tokens, read_in_steps
from tests.ranks.run import make_grid, one_rank, run_ranks
from tests.ranks.together import run_together

TOLERANCE = 2e-5


def assert_near(actual: Tensor, expected: Tensor, name: str) -> None:
    gap, size = (actual - expected).abs().max(), expected.abs().max()
    assert gap <= TOLERANCE * size, f"{name}: gap {gap:.2e} of {size:.2e}"


def run(model: ModelPlan, grid: ParallelGrid) -> tuple[Tensor, Tensor, dict[str, torch.nn.Parameter]]:
    """Logits of the true vocabulary, the loss, and the parameters with their gradients."""
    module, ids = build(model, grid), random_tokens(model, batch=3, length=13).to(grid.device)  # 12 tokens: 4 x 3
    weights = torch.rand(3, 12, generator=torch.Generator().manual_seed(2)).to(grid.device)
    loss = module(ids[:, :-1], targets=(ids[:, 1:], weights))
    loss.backward()
    whole = gather_logits(module(ids[:, :-1]).detach(), grid, model.vocab_size)
    return whole, loss.detach(), {p.global_name: p for p in module.parameters()}


def compare(model: ModelPlan, logits: Tensor, loss: Tensor, gradients: dict[str, Tensor]) -> None:
    for sequence_parallel in (False, True):
        compare_on(tensor_grid(sequence_parallel), model, logits, loss, gradients)


@cache
def tensor_grid(sequence_parallel: bool = False) -> ParallelGrid:
    """All ranks of this start as tensor-parallel ones."""
    return make_grid(tensor=dist.get_world_size(), sequence_parallel=sequence_parallel)


def compare_on(
    grid: ParallelGrid, model: ModelPlan, logits: Tensor, loss: Tensor, gradients: dict[str, Tensor]
) -> None:
    our_logits, our_loss, parameters = run(model, grid)
    assert_near(our_logits, logits, "logits")
    assert_near(our_loss, loss, "loss")
    assert set(parameters) == set(gradients)
    for name, parameter in parameters.items():
        expected = gradients[name]
        if parameter.shard_dim is not None:
            expected = expected.chunk(grid.size("tensor"), parameter.shard_dim)[grid.rank("tensor")]
        assert_near(parameter.grad, expected, name)


def of_one_rank(name: str) -> tuple[ModelPlan, Tensor, Tensor, dict[str, Tensor]]:
    """Arguments of `compare`."""
    with one_rank() as grid:
        logits, loss, parameters = run(VARIETY[name], grid)
    gradients = {key: parameter.grad for key, parameter in parameters.items()}
    for key, gradient in gradients.items():
        assert gradient.abs().max() > 1e-4, f"{name}: the gradient of {key} says nothing"
    return VARIETY[name], logits, loss, gradients


@pytest.mark.parametrize("name", VARIETY)
def test_two_ranks_compute_what_one_computes(request, name):
    run_together(request, compare, lambda case: of_one_rank(case["name"]))


@pytest.mark.parametrize("name", ["neox", "llama"], ids=["neox", "two key/value heads"])
def test_four_ranks_compute_what_one_computes(request, name):
    run_together(request, compare, lambda case: of_one_rank(case["name"]), lambda _: 4)


def decode_body(model: ModelPlan, expected: Tensor) -> None:
    grid = tensor_grid()
    module, tokens = build(model, grid).eval(), random_tokens(model, batch=2, length=12).to(grid.device)
    cache = new_cache(model, 2, 12, model.kv_heads_on_rank(grid.size("tensor")))
    with torch.inference_mode():
        decoded = gather_logits(read_in_steps(module, tokens, cache, [6, 1, 1, 4]), grid, model.vocab_size)
    assert_near(decoded, expected, "logits")


@pytest.mark.parametrize("name", ["gpt2", "llama", "local", "three key/value heads"])
def test_decoding_on_two_ranks_equals_reading_everything_on_one(request, name):
    run_together(request, decode_body, lambda case: read_by_one_rank(VARIETY[case["name"]]))


def read_by_one_rank(model: ModelPlan) -> tuple[ModelPlan, Tensor]:
    """Arguments of `decode_body`."""
    tokens = random_tokens(model, batch=2, length=12)
    with one_rank() as grid, torch.no_grad():
        return model, build(model, grid).eval()(tokens)[..., : model.vocab_size]


def padding_body(model: ModelPlan) -> None:
    grid = tensor_grid()
    _, _, parameters = run(model, grid)
    for name in ("embedding.weight", "head.weight"):
        weight = parameters[name]
        padding = slice(max(0, model.vocab_size - weight.shard_start), None)
        assert (weight[padding] == 0).all() and (weight.grad[padding] == 0).all()


@pytest.mark.parametrize("tp", [1, 2])
def test_padding_rows_stay_zero_and_get_no_gradient(tp):
    run_ranks(tp, padding_body, VARIETY["neox"])
