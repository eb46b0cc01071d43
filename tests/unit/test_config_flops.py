"""FLOPs of a token, against brute force and against what torch counts in a training step."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron.config.flops import TokenFlops, common_flops, executed_flops, recomputed_flops, seen_keys, token_flops
from megatron.config.load import config_from_flat
from megatron.config.parameter_counts import parameter_count
from megatron.config.resolve import resolve
from tests import tiny
from tests.models import VARIETY, build, random_tokens
from tests.ranks.run import one_rank

BATCH, LENGTH = 2, 9


def _square(query, key, *_, out_val=None, **__):
    """Of two products of each query with all keys, as the counter has it for torch's kernels."""
    return 4 * query[0] * query[1] * query[2] * query[3] * key[1]


def _square_backward(gradient, query, key, *_, out_val=None, **__):
    return 2 * _square(query, key)


# the kernel is one operation for the counter
COMPOSED = {
    torch.ops.deepy.composed_attention: _square,
    torch.ops.deepy.composed_attention_backward: _square_backward,
}


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid:
        yield grid


def counted(model, grid, recompute_layers=0):
    """FLOPs per token that torch counts in a training step whose attention is written out as products."""
    module, tokens = build(model, grid, recompute_layers).train(), random_tokens(model, BATCH, LENGTH)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=COMPOSED) as counter:
        module(tokens).logsumexp(-1).sum().backward()
    return counter.get_total_flops() / (BATCH * LENGTH)


def masked(model, products):
    """FLOPs per token of `products` products of each query with keys that it does not see."""
    windows = [model.sliding_window if kind == "local" else None for kind in model.attention_kinds]
    unseen = sum(LENGTH - seen_keys(LENGTH, window) for window in windows)
    return 2 * products * model.num_attention_heads * model.head_size * unseen


@pytest.mark.parametrize("name", VARIETY)
def test_executed_flops_are_what_torch_counts_except_for_masked_keys(grid, name):
    model = VARIETY[name]  # the counter knows no mask: two products forward and four backward are over the whole square
    assert executed_flops(model, LENGTH) == pytest.approx(counted(model, grid) - masked(model, 6), rel=1e-12)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_recomputed_flops_are_what_torch_counts_in_addition(grid, group):
    model = VARIETY["olmo 2"]  # the norm of the last product's output needs that output: torch recomputes everything
    plan = replace(tiny.plan(recompute=group), model=model, batch=replace(tiny.plan().batch, sequence_length=LENGTH))
    extra = counted(model, grid, recompute_layers=group) - counted(model, grid)
    assert recomputed_flops(plan) == pytest.approx(extra - masked(model, 2), rel=1e-12)


def test_torch_leaves_out_the_last_product_of_a_recomputed_block_whose_output_it_does_not_need(grid):
    model = VARIETY["llama"]
    plan = replace(tiny.plan(recompute=1), model=model, batch=replace(tiny.plan().batch, sequence_length=LENGTH))
    extra = counted(model, grid, recompute_layers=1) - counted(model, grid) - masked(model, 2)
    last = 2 * model.ffn_hidden_size * model.hidden_size * model.num_layers
    assert recomputed_flops(plan) == pytest.approx(extra + last, rel=1e-12)


def test_only_what_is_recomputed_whole_adds_to_what_the_hardware_computes():
    plain, whole = tiny.plan(), tiny.plan(recompute=2)
    selective = tiny.plan(recompute=2, engine={"recompute_selective": True})
    executed = executed_flops(tiny.MODEL, tiny.SEQUENCE)
    assert token_flops(plain).hardware == token_flops(selective).hardware == executed
    assert token_flops(whole).executed == executed
    assert token_flops(whole).hardware == executed + recomputed_flops(whole) > executed


@pytest.mark.parametrize("window", [None, 1, 3, 9, 20])
def test_seen_keys_are_the_mean_of_what_the_mask_shows(window):
    position = torch.arange(LENGTH)
    mask = position[:, None] >= position
    if window is not None:
        mask &= position[:, None] - position < window
    assert seen_keys(LENGTH, window) == pytest.approx(mask.sum().item() / LENGTH)


def test_the_common_formula_is_six_per_parameter_and_the_attention_square():
    model = replace(tiny.MODEL, head_size=12)
    assert common_flops(model, 100) == 6 * parameter_count(model) + 12 * 4 * (4 * 12) * 100


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "ratio"), [(12, 768, 12, 1.40), (24, 1024, 16, 1.25), (24, 2048, 16, 1.14)]
)
def test_the_common_formula_counts_more_than_is_executed_most_of_all_in_small_models(layers, hidden, heads, ratio):
    shape = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "seq_length": 2048}
    flops = token_flops(resolve(config_from_flat(shape | {"pos_emb": "rotary", "no_weight_tying": True}), 1, 50304))
    # by hand: 12 L h^2 in the blocks, V h in the head, and (T + 1) / 2 keys
    executed = 6 * (12 * layers * hidden**2 + 50304 * hidden) + 12 * layers * hidden * 2049 / 2
    assert flops == TokenFlops(flops.common, executed)
    assert flops.common / flops.executed == pytest.approx(ratio, abs=0.005)
