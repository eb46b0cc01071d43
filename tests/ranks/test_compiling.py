"""Compiled blocks and loss train like plain ones, under every kind of layout.

Fused kernels round between fewer operations; fp32 on the CPU, with the tolerance that test_layouts.py argues for.
"""

import pytest
import torch

from megatron.config.load import config_from_flat
from megatron.config.resolve import resolve
from megatron.engine.compiling import compiled
from megatron.model.attention_backends import QueryBlocks, ScaledDotProduct
from tests.ranks.test_layouts import DROPOUT, assert_same, curve

COMPILE = {"compile": True}
STEPS = 5
LAYOUTS = [
    {"tensor": 2, "sequence_parallel": True},
    {"pipe": 2},
    {"data": 2, "zero": 1, "recompute": 1, "model": DROPOUT},
    {"tensor": 2, "model": DROPOUT},
    {"context": 2},
    {"recompute": 2, "model": {"tied_embeddings": True}},
]


@pytest.mark.parametrize(
    "layout",
    [pytest.param({"precision": "fp32"}, id="one rank")]
    + [pytest.param(layout, id=str(layout), marks=pytest.mark.long) for layout in LAYOUTS],
)
def test_compiled_blocks_and_loss_train_like_plain_ones(tmp_path, layout):
    eager = layout | {"engine": {}}
    assert_same(curve(tmp_path, steps=STEPS, **{"engine": COMPILE} | layout), curve(tmp_path, steps=STEPS, **eager))


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
    zero_3 = {"zero_optimization": {"stage": 3}}
    tensor_2 = {"model_parallel_size": 2}
    cases = (small, large, large | zero_3, large | tensor_2, small | COMPILE, large | {"compile": False})
    plans = [resolve(config_from_flat(keys), 2, 50304) for keys in cases]
    assert [plan.engine.compile for plan in plans] == [False, True, False, False, True, False]
