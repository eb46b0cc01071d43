"""Dropout and recomputation of the whole model: bit-equal with and without, alike on ranks where it has to be."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.plan import ModelPlan
from megatron.model.attention import Attention
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.parameter import load_whole
from tests.models import VARIETY, build, random_tensor, random_tokens, small
from tests.ranks.run import deterministic_on_gpu, make_grid, one_rank, run_ranks
from tests.ranks.together import run_together

DROPOUT = {"attention_dropout": 0.2, "hidden_dropout": 0.1}


def step(model: ModelPlan, grid: ParallelGrid, recompute_layers: int, seed: int = 3) -> dict[str, Tensor]:
    """The loss and all gradients of a training step."""
    module = build(model, grid, recompute_layers).train()
    ids = random_tokens(model, batch=2, length=13).to(grid.device)
    torch.manual_seed(seed)
    loss = module(ids[:, :-1], targets=(ids[:, 1:], torch.ones(2, 12, device=grid.device)))
    loss.backward()
    return {"loss": loss.detach()} | {p.global_name: p.grad for p in module.parameters()}


def recompute_body(model: ModelPlan) -> None:
    deterministic_on_gpu()
    for sequence_parallel in (False, True)[: dist.get_world_size()]:
        grid = make_grid(tensor=dist.get_world_size(), sequence_parallel=sequence_parallel)
        plain = step(model, grid, recompute_layers=0)
        for layers in (1, 2):
            again = step(model, grid, recompute_layers=layers)
            different = [name for name in plain if not torch.equal(plain[name], again[name])]
            assert not different, f"recomputing {layers} layers changes {different}"


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dropout", [{}, DROPOUT], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("kind", [{}, {"parallel_residual": True, "num_kv_heads": 2}], ids=["serial", "parallel"])
def test_recomputation_is_bit_equal(request, tp, dropout, kind):
    run_together(
        request, recompute_body, lambda case: (small(**case["kind"], **case["dropout"]),), lambda case: case["tp"]
    )


def replicas_body(model: ModelPlan) -> None:
    grid = make_grid(tensor=dist.get_world_size())
    module = build(model, grid).train()
    hidden = random_tokens(model, batch=2, length=13).to(grid.device)
    torch.manual_seed(3)
    for layer in list(module.layers)[:-1]:  # embedding, blocks, final norm: whole on every rank
        hidden = layer(hidden)
        first, second = (torch.empty_like(hidden) for _ in range(2))
        dist.all_gather([first, second], hidden)
        assert torch.equal(first, second), f"ranks differ after {type(layer).__name__}"


@pytest.mark.parametrize("parallel_residual", [False, True])
def test_with_dropout_the_hidden_state_stays_the_same_on_all_ranks(request, parallel_residual):
    run_together(request, replicas_body, lambda case: (small(parallel_residual=case["parallel_residual"], **DROPOUT),))


def twin_heads_body(model: ModelPlan) -> None:
    """Give both ranks' heads the same weights: only their dropout can tell them apart."""
    grid = make_grid(tensor=dist.get_world_size())
    attention = Attention(model, grid, 0, "global", None)
    half = random_tensor((48, 32), 1)
    load_whole(attention.query_key_value.weight, torch.cat([half, half]))
    load_whole(attention.query_key_value.bias, torch.zeros(96))
    results = {}
    for mode in ("train", "eval"):
        hidden = random_tensor((2, 7, 32), 2).to(grid.device)
        mine = attention.train(mode == "train").heads(hidden).detach().contiguous()
        first, second = (torch.empty_like(mine) for _ in range(2))
        dist.all_gather([first, second], mine)
        results[mode] = torch.equal(first, second)
    assert results == {"train": False, "eval": True}


def test_attention_dropout_differs_between_ranks():
    run_ranks(2, twin_heads_body, small(attention_dropout=0.2))


@pytest.mark.parametrize("field", DROPOUT)
def test_each_dropout_acts_and_follows_the_seed(field):
    model = small(**{field: 0.2})
    with one_rank() as grid:
        first, again, other = (step(model, grid, 0, seed)["loss"] for seed in (3, 3, 4))
        without = step(small(), grid, 0)["loss"]
    assert first == again
    assert first != other
    assert first != without


def test_evaluation_drops_nothing():
    with one_rank() as grid, torch.no_grad():
        tokens = random_tokens(VARIETY["neox"], batch=1, length=9)
        with_dropout, without = (build(small(**fields), grid).eval()(tokens) for fields in (DROPOUT, {}))
    assert torch.equal(with_dropout, without)


def noise_body(model: ModelPlan) -> None:
    for sequence_parallel in (False, True)[: dist.get_world_size()]:
        grid = make_grid(tensor=dist.get_world_size(), sequence_parallel=sequence_parallel)
        tokens = random_tokens(model, batch=3, length=12).to(grid.device)
        embeddings = {alpha: build(replace(model, neftune_noise_alpha=alpha), grid).layers[0] for alpha in (None, 6.0)}
        quiet = embeddings[None].train()(tokens)
        assert torch.equal(quiet, embeddings[6.0].eval()(tokens))  # none outside of training
        torch.manual_seed(3)
        noise = (embeddings[6.0].train()(tokens) - quiet).detach()
        bound = 6 / (12 * model.hidden_size) ** 0.5  # of the whole sequence, whatever part of it is here
        assert 0.95 * bound < float(noise.abs().max()) <= bound * (1 + 1e-5)  # the sum is rounded
        assert abs(float(noise.std()) / bound - 3**-0.5) < 0.05  # uniform: of more than 500 elements
        parts = [torch.empty_like(noise) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, noise)
        assert all(torch.equal(part, noise) for part in parts) != sequence_parallel


@pytest.mark.parametrize("tp", [1, 2])
def test_noise_on_the_embedding_is_bounded_and_alike_on_ranks_that_hold_the_same(tp):
    run_ranks(tp, noise_body, small())
