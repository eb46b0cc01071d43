"""Key/value heads that tensor-parallel ranks share: who has what, and that it is what the estimate counts.

That such a model computes what one rank computes: test_model_tensor_parallel.py, test_layouts.py, test_lora.py.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron.config.parameter_counts import held_parameters
from megatron.engine.distributed import start_layout
from megatron.estimate.activations import block_bytes
from megatron.model.block import TransformerBlock
from megatron.model.gpt import gpt_layers
from megatron.parallel.column_exchange import ColumnExchange
from tests import tiny
from tests.models import random_tensor
from tests.ranks.run import make_grid, own_device, run_ranks
from tests.unit.test_estimate_activations import saved

WIDE = {"hidden_size": 96, "head_size": 16, "ffn_hidden_size": 160, "position_embedding": "none", "norm": "rmsnorm_1p"}


def exchange_body() -> None:
    """Ranks compute columns 0-2 and 3-5; column 4 is wanted three times, column 3 by nobody."""
    wanted = [[range(4, 5), range(1, 3)], [range(4, 6), range(0, 1), range(4, 5)]]
    rank, exchange = dist.get_rank(), ColumnExchange(6, wanted, make_grid(tensor=2))
    own = torch.arange(3.0 * rank, 3.0 * rank + 3, device=own_device()).repeat(2, 1).requires_grad_()
    got = exchange(own)
    expected = [[4.0, 1.0, 2.0], [4.0, 5.0, 0.0, 4.0]][rank]
    assert got.tolist() == [expected, expected]
    # gradients 1, 2, 3 of the results of rank 0; 10, 20, 30, 40 of those of rank 1
    factor = [1.0, 10.0][rank]
    got.backward(factor * torch.arange(1.0, got.shape[-1] + 1, device=own_device()).expand_as(got))
    expected = [[30.0, 2.0, 3.0], [0.0, 1.0 + 10.0 + 40.0, 20.0]][rank]
    assert own.grad is not None and own.grad.tolist() == [expected, expected]


def test_a_rank_gets_the_columns_that_it_wants_and_their_gradients_are_summed():
    run_ranks(2, exchange_body)


def estimate_body(layout: dict[str, int], model: dict[str, object]) -> None:
    plan = tiny.plan(model=WIDE | model, **layout)
    plan = replace(plan, batch=replace(plan.batch, micro_size=2, sequence_length=64))
    grid = start_layout(plan.layout)
    held = sum(
        parameter.numel() for layer in gpt_layers(plan.model, grid, 1) for parameter in layer.build().parameters()
    )
    assert held == held_parameters(plan.model, grid.size("tensor"), range(plan.model.num_layers + 3))
    block = TransformerBlock(plan.model, grid, 0, None)
    hidden = random_tensor((2, 64 // grid.size("context"), plan.model.hidden_size), 0).to(own_device()).requires_grad_()
    # besides: the weights of all heads
    assert block_bytes(plan, 0, on_cpu=True) == pytest.approx(saved(block, hidden), rel=0.02)


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ({"tensor": 2}, {"num_kv_heads": 1}),
        ({"tensor": 2}, {"num_attention_heads": 6, "num_kv_heads": 3}),
        ({"tensor": 2}, {"num_attention_heads": 6, "num_kv_heads": 3, "qk_norm": "full"}),
        ({"context": 2}, {"num_kv_heads": 1}),
    ],
    ids=str,
)
def test_a_rank_holds_and_saves_what_is_estimated(layout, model):
    run_ranks(2, estimate_body, layout, model)
