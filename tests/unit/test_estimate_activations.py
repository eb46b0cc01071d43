"""What a block saves for its backward pass, against the tensors that autograd keeps of a real block."""

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

from megatron.config.parameter_shapes import ALL_BUT_ADAPTERS
from megatron.config.plan import LoraPlan
from megatron.engine.modules import freeze_parameters
from megatron.engine.settings import DTYPES
from megatron.estimate.activations import block_bytes
from megatron.model.block import TransformerBlock
from megatron.model.gpt import gpt_layers
from megatron.registry import names
from tests import tiny
from tests.models import random_tensor
from tests.ranks.run import one_rank

BATCH, LENGTH = 2, 64
WIDE = {"hidden_size": 64, "head_size": 16, "ffn_hidden_size": 160, "position_embedding": "none"}
CASES = [
    *({"norm": name} for name in names("norm")),
    *({"activation": name} for name in names("activation")),
    {"norm": "rmsnorm", "norm_placement": "output"},
    {"norm": "rmsnorm_1p", "norm_placement": "both"},
    {"parallel_residual": True, "tied_norm": True, "residual_multiplier": 0.5},
    *({"norm": norm, "qk_norm": kind} for norm in ("layernorm", "rmsnorm_1p") for kind in ("each_head", "full")),
    *({"lora": LoraPlan(4, 8.0, 0.0, targets)} for targets in (("query", "value"), ("dense", "down"), ("mlp",))),
    {"lora": LoraPlan(4, 8.0, 0.1, ("query_key_value", "dense", "mlp"))},
    {"lora": LoraPlan(4, 8.0, 0.1, ("query", "key", "up")), "norm": "rmsnorm", "activation": "swiglu"},
    {"lora": LoraPlan(4, 8.0, 0.0, ("query_key_value", "up")), "parallel_residual": True, "tied_norm": True},
    {"lora": LoraPlan(4, 8.0, 0.0, ("query",)), "activation": "relu"},
]


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid:
        yield grid


def saved(block: TransformerBlock, hidden: Tensor) -> int:
    """Bytes of the tensors that autograd keeps, without parameters; views of one storage count once."""
    known = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(hidden)
    assert output.grad_fn is not None  # the graph keeps every storage alive until here
    return sum(kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_a_block_saves_what_is_estimated(grid, changes, precision):
    plan = tiny.plan(model=WIDE | changes, precision=precision)
    freeze = (ALL_BUT_ADAPTERS,) if plan.model.lora else ()
    plan = replace(plan, batch=replace(plan.batch, micro_size=BATCH, sequence_length=LENGTH))
    plan, dtype = replace(plan, engine=replace(plan.engine, freeze=freeze)), DTYPES[precision]
    block = cast(TransformerBlock, gpt_layers(plan.model, grid, None)[1].build()).to(dtype)
    freeze_parameters(block, freeze)
    hidden = random_tensor((BATCH, LENGTH, plan.model.hidden_size), 0).to(dtype).requires_grad_()
    # besides: the weights of all heads, and a norm's statistics, which a CPU keeps in bf16 for bf16
    assert block_bytes(plan, 0, on_cpu=True) == pytest.approx(saved(block, hidden), rel=0.02)
