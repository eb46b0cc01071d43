"""What one training step computes once: the lists of blocks, and with selective recomputation attention."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.engine.modules import Sequential
from megatron.engine.recompute import checkpoint_function
from megatron.model.gpt import gpt_layers
from megatron.model.positions import document_starts
from tests import flex, tiny
from tests.models import random_tokens, randomise, small
from tests.ranks.run import one_rank

LENGTH, WINDOW, END = 300, 70, 7
BY_BLOCKS = {"attention_kinds": ("flex", "local_flex", "flex")}
DENSE = {"attention_kinds": ("global", "local", "global")}
PLAIN = "aten::_scaled_dot_product_flash_attention_for_cpu"


class Executed(TorchDispatchMode):
    """Counts the operations that are executed, by name; a stored result is not."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count[operation.name()] += 1
        return operation(*args, **(kwargs or {}))


def step(kinds: dict, apart: bool, recompute: str, device: str = "cpu") -> tuple[float, float, Counter[str]]:
    """Loss, sum of the gradients' sizes, and operations of one step of three layers."""
    sizes = {"hidden_size": 64, "head_size": 16, "num_kv_heads": 2}
    sizes |= {"sliding_window": WINDOW, "max_position_embeddings": LENGTH}
    model = small(**sizes, **kinds, reset_attention_mask=apart, reset_position_ids=apart)
    with one_rank(device) as grid, flex.registered():
        plan = replace(tiny.plan().engine, recompute_selective=recompute == "selective")
        layers = gpt_layers(model, grid, seed=1)
        module = Sequential(layers, 0 if recompute == "none" else 1, checkpoint_function(plan, grid)).train()
        randomise(module)
        module.to(grid.device)
        tokens = random_tokens(model, 2, LENGTH).to(grid.device)
        with Executed() as executed:
            targets = tokens, torch.full(tokens.shape, 1 / tokens.numel(), device=grid.device)
            loss = module((tokens, document_starts(tokens, END)) if apart else tokens, targets=targets)
            loss.backward()
        size = sum(parameter.grad.double().abs().sum() for parameter in module.parameters())
        return float(loss.detach()), float(size), executed.count


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("apart", [True, False], ids=["documents", "window"])
def test_the_lists_of_blocks_are_made_once_for_all_layers_and_attention_is_computed_as_often_as_asked(apart, recompute):
    loss, size, executed = step(BY_BLOCKS, apart, recompute)
    assert executed["aten::sort.stable"] == 1
    in_blocks = 3 if apart else 1  # without documents only the window skips blocks
    assert executed["flex_attention"] == in_blocks * (2 if recompute == "full" else 1)
    assert executed["flex_attention_backward"] == in_blocks
    dense_loss, dense_size, dense = step(DENSE, apart, recompute)
    assert dense["aten::sort.stable"] == 0
    assert dense[PLAIN] == 3 * (2 if recompute == "full" else 1)
    # fp32, sums in another order: gaps seen are 1e-7 of the loss and 1e-9 of the gradients
    assert loss == pytest.approx(dense_loss, rel=1e-6)
    assert size == pytest.approx(dense_size, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_compiled_attention_by_blocks_is_computed_as_often_as_asked_on_a_gpu(recompute, times):
    loss, size, executed = step(DENSE, True, recompute, "cuda")
    assert executed["inductor_compiled_code"] == 3 * times + 3, "forward and backward of three layers"
    plain_loss, plain_size, _ = step(DENSE, True, "none")
    # fp32 without TF32, sums in another order
    assert loss == pytest.approx(plain_loss, rel=1e-4)
    assert size == pytest.approx(plain_size, rel=1e-3)


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def flash_attn_forward(tensor: torch.Tensor) -> torch.Tensor:
    """Stands for the operator of the package flash-attn, which needs a GPU: its name is what counts."""
    return tensor * 2


flash_attn_forward.register_autograd(lambda ctx, gradient: gradient * 2)


def compiled_region(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.sin() * 2


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        pytest.param(flash_attn_forward, "flash_attn::_flash_attn_forward", id="flash-attn"),
        pytest.param(compiled_region, "inductor_compiled_code", id="compiled", marks=pytest.mark.long),
    ],
)
def test_selective_recomputation_stores_the_results_of_packages_and_of_compiled_attention(operation, name):
    if operation is compiled_region:
        operation = torch.compile(operation, options={"wrap_inductor_compiled_regions": True})
    plan = replace(tiny.plan().engine, recompute_selective=True)
    tensor = torch.randn(3, 4, requires_grad=True)
    with one_rank() as grid, Executed() as executed:
        checkpoint_function(plan, grid)(lambda inputs: operation(inputs.cos()).exp(), tensor).sum().backward()
    assert executed.count["aten::cos"] == executed.count["aten::exp"] == 2
    assert executed.count[name] == (2 if operation is not flash_attn_forward else 1), "the second one is its backward"
