"""Compiled blocks and loss train like plain ones, under every kind of layout.

Fused kernels round between fewer operations; fp32 on the CPU, with the tolerance that test_layouts.py argues for.
"""

import pytest
import torch

from megatron.config.load import config_from_flat
from megatron.config.resolve import resolve
from megatron.engine.compiling import compiled, compiled_layers, share_memory
from megatron.engine.distributed import start_layout
from megatron.engine.recompute import checkpoint_function
from megatron.errors import UserError
from megatron.model.attention_kernels import QueryBlocks, ScaledDotProduct
from megatron.model.gpt import gpt_layers
from tests import tiny
from tests.forking import BACKEND
from tests.ranks.run import one_rank, run_ranks
from tests.ranks.test_layouts import DROPOUT, assert_same, curve

COMPILE = {"compile": True}
SELECTIVE = COMPILE | {"recompute_selective": True}
HIDDEN_DROPOUT = {"hidden_dropout": 0.1}
STEPS = 5
LAYOUTS = [
    {"tensor": 2, "sequence_parallel": True, "model": HIDDEN_DROPOUT},
    {"data": 2, "zero": 3},
    {"data": 2, "zero": 3, "recompute": 1},
    {"data": 2, "zero": 3, "recompute": 1, "engine": SELECTIVE},
    {"tensor": 2, "sequence_parallel": True, "recompute": 1, "engine": SELECTIVE},
    {"tensor": 2, "sequence_parallel": True},
    {"pipe": 2},
    {"data": 2, "zero": 1, "recompute": 1, "model": DROPOUT},
    {"tensor": 2, "model": DROPOUT},
    {"context": 2},
    {"recompute": 2, "model": {"tied_embeddings": True}},
]


@pytest.mark.parametrize(
    "layout",
    [pytest.param({"model": {"num_layers": 2, "attention_kinds": ("global",) * 2}}, id="one rank")]
    + [pytest.param(layout, id=str(layout), marks=pytest.mark.long) for layout in LAYOUTS],
)
def test_compiled_blocks_and_loss_train_like_plain_ones(tmp_path, layout):
    eager = layout | {"engine": {}}
    assert_same(curve(tmp_path, steps=STEPS, **{"engine": COMPILE} | layout), curve(tmp_path, steps=STEPS, **eager))


def whole_graph_body(layout: dict[str, object]) -> None:
    plan = tiny.plan(**layout)
    grid = start_layout(plan.layout)
    block = gpt_layers(plan.model, grid, 1)[1].build()
    whole = torch.randn(2, plan.batch.sequence_length, plan.model.hidden_size).to(grid.device)
    hidden = whole[:, grid.own_tokens(4)].requires_grad_()
    results = []
    for forward in (block, torch.compile(block.forward, fullgraph=True, dynamic=False, backend="aot_eager")):
        output = forward(hidden)
        results.append([output, *torch.autograd.grad(output.square().sum(), [hidden, *block.parameters()])])
    for compiled_one, plain in zip(*results, strict=True):
        assert torch.equal(compiled_one, plain)


SPLIT = [
    {"tensor": 2, "sequence_parallel": True, "model": {"float8": True}},
    {"tensor": 2, "model": {"qk_norm": "full", "activation": "swiglu"}},
    {"tensor": 2, "model": {"num_attention_heads": 6, "num_kv_heads": 3, "qk_norm": "full"}},
    {"context": 2},
    {"context": 2, "model": {"position_embedding": "rpe", "attention_softcap": 2.0}},
]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=str(layout), marks=[pytest.mark.long] if number else [])
        for number, layout in enumerate(SPLIT)
    ],
)
def test_a_block_that_is_split_over_ranks_is_one_graph_of_the_same_operations(layout):
    """Recorded without graph breaks (else torch raises) and run without fusing anything: the same bits."""
    run_ranks(2, whole_graph_body, layout, timeout=120)


@pytest.mark.long
def test_a_compiled_block_that_is_recomputed_selectively_drops_in_backward_what_it_dropped_in_forward():
    """A second mask would move gradients by tens of percent; fused fp32 kernels round 1e-6 of them differently."""
    plan = tiny.plan(recompute=1, engine=SELECTIVE, model=HIDDEN_DROPOUT)
    with one_rank() as grid:
        layers = gpt_layers(plan.model, grid, 1)
        hidden = torch.randn(2, plan.batch.sequence_length, plan.model.hidden_size, requires_grad=True)
        results = []
        for layer in (layers[1], compiled_layers(layers, checkpoint_function(plan.engine, grid))[1]):
            block = layer.build().train()
            torch.manual_seed(1)
            output = block(hidden)
            results.append([output, *torch.autograd.grad(output.square().sum(), [hidden, *block.parameters()])])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.detach().abs().max()))


def test_async_tensor_parallel_is_refused_on_a_cpu():
    with one_rank() as grid, pytest.raises(UserError, match="this is a CPU; leave async_tensor_parallel out"):
        share_memory(grid)


@pytest.mark.gpu
@pytest.mark.skipif(BACKEND != "nccl", reason="needs RANKS_BACKEND=nccl and two GPUs connected by NVLink")
def test_async_tensor_parallel_trains_like_waiting_for_each_collective(tmp_path):
    """fp32: the parts of a reduce-scatter are added in another order; the bound of test_layouts.py."""
    layout = {
        "tensor": 2,
        "sequence_parallel": True,
        "model": {"bias_in_mlp": False, "bias_in_query_key_value": False, "bias_in_dense": False},
    }
    overlapped = curve(tmp_path, steps=STEPS, engine=COMPILE | {"async_tensor_parallel": True}, **layout)
    assert_same(overlapped, curve(tmp_path, steps=STEPS, engine=COMPILE, **layout))


@pytest.mark.long
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_blocks_of_queries_attend_like_torchs_kernel(kv_heads):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 256, heads, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    results = []
    for attend in (compiled(QueryBlocks()), ScaledDotProduct()):
        mixed = attend(*tensors, None, 0.0)
        results.append([mixed, *torch.autograd.grad(mixed.square().sum(), tensors)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_compiling_is_on_where_a_micro_batch_is_work_enough_unless_it_is_said():
    small = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32}
    large = small | {"hidden_size": 512, "seq_length": 1024}
    selective = {"checkpoint_activations": True, "recompute_granularity": "selective"}
    cases: list[tuple[dict[str, object], bool]] = [
        (small, False),
        (large, True),
        (large | {"zero_optimization": {"stage": 3}}, True),
        (large | {"model_parallel_size": 2}, True),
        (small | COMPILE, True),
        (large | {"compile": False}, False),
        (large | selective, True),
        (large | selective | {"checkpoint_in_cpu": True}, False),
    ]
    for keys, expected in cases:
        assert resolve(config_from_flat(keys), 2, 50304).engine.compile is expected, keys
