"""Documents that are kept apart: where they begin, and the kernels that see one document at a time."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from megatron.model.attention_backends import flash_attention, global_attention, local_attention
from megatron.model.attention_kernels import FlexAttention, ScaledDotProduct
from megatron.model.block_mask import BLOCK, block_lists, block_mask
from megatron.model.cache import Positions
from megatron.model.positions import document_starts, positions_in_documents
from tests.models import small
from tests.unit.test_model_attention_backends import CPU, WINDOW, heads, written_out

BUILDERS = (global_attention, local_attention, flash_attention)


def test_a_document_lasts_up_to_and_with_its_end():
    end = 9
    tokens = torch.tensor([[1, 2, end, 3, 4, 5], [end, end, 6, 7, end, 8], [1, 2, 3, 4, 5, end]])
    starts = document_starts(tokens, end)
    assert starts.dtype == torch.int32
    assert starts.tolist() == [[0, 0, 0, 3, 3, 3], [0, 1, 2, 2, 2, 5], [0] * 6]
    assert positions_in_documents(starts).tolist() == [[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]


def documents(length, seed, chance=0.03):
    """Columns at which documents begin, for two sequences: [2, length]."""
    ends = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < chance
    return document_starts(ends.long(), 1)


def within(first):
    places = torch.arange(first.shape[1], device=first.device).unsqueeze(0)
    return Positions(places, places, first)


def blocks_within(first, window):
    [counts], [indices] = block_lists(first, [window])
    return block_mask(counts, indices, first, window, first.shape[1])


@pytest.mark.parametrize(
    ("length", "window"),
    [
        (40, None),
        (128, 70),
        (300, None),
        (300, 70),
        pytest.param(40, 70, marks=pytest.mark.long),
        pytest.param(128, None, marks=pytest.mark.long),
        pytest.param(512, None, marks=pytest.mark.long),
        pytest.param(512, 70, marks=pytest.mark.long),
    ],
)
def test_within_documents_a_query_sees_the_tokens_of_its_document_up_to_itself(length, window):
    first = documents(length, length)
    query, key, value = (heads(2, length, count, seed) for count, seed in ((4, 0), (2, 1), (2, 2)))
    places = torch.arange(length)
    seen = (places[None, None, :] <= places[None, :, None]) & (places[None, None, :] >= first[:, :, None])
    if window:
        seen = seen & (places[None, None, :] > places[None, :, None] - window)
    expected = written_out(query, key, value, seen[:, None]).float()
    torch.testing.assert_close(ScaledDotProduct(window)(query, key, value, within(first), 0.0), expected)
    found = FlexAttention(window, compiled=False)(query, key, value, blocks_within(first, window), 0.0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("window", [1, pytest.param(70, marks=pytest.mark.long), 299])
def test_within_a_window_a_query_sees_the_last_tokens_by_blocks_too(window):
    query, key, value = (heads(2, 300, count, seed) for count, seed in ((4, 0), (2, 1), (2, 2)))
    [counts], [indices] = block_lists(torch.zeros(1, 300, dtype=torch.int32), [window])  # one for all of the batch
    found = FlexAttention(window, compiled=False)(
        query, key, value, block_mask(counts, indices, None, window, 300), 0.0
    )
    torch.testing.assert_close(found, ScaledDotProduct(window)(query, key, value, None, 0.0))


@settings(deadline=None, max_examples=12)
@given(length=st.integers(1, 700), seed=st.integers(0, 99), window=st.none() | st.integers(1, 400))
@example(length=641, seed=76, window=None)  # one query in the last block, which does not see the first ones
def test_the_mask_by_blocks_is_the_one_that_torch_makes_of_all_pairs(length, seed, window):
    first = documents(length, seed)
    blocks = blocks_within(first, window)
    dense = create_block_mask(blocks.mask_mod, 2, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(blocks, name), getattr(dense, name)), name
    assert torch.equal(blocks.to_dense(), dense.to_dense())


def test_documents_are_kept_apart_without_a_dense_mask_on_a_gpu():
    cuda = torch.device("cuda")
    model = small(reset_attention_mask=True, hidden_size=64, head_size=16, sliding_window=WINDOW)
    assert all(isinstance(build(model, cuda), FlexAttention) for build in BUILDERS)
    assert local_attention(model, cuda).window == WINDOW
    assert "FlexAttention" in global_attention(model, cuda).describe(torch.bfloat16)
    assert "heads of at least 16" in global_attention(small(reset_attention_mask=True), cuda).describe(torch.bfloat16)
    assert not any(isinstance(build(model, CPU), FlexAttention) for build in BUILDERS)


def test_a_window_takes_no_dense_mask_on_a_gpu():
    model = small(hidden_size=64, head_size=16, sliding_window=WINDOW)
    found = local_attention(model, torch.device("cuda"))
    assert isinstance(found, FlexAttention) and found.window == WINDOW
    assert "FlexAttention with a window of 4 tokens" in found.describe(torch.bfloat16)
    assert not isinstance(local_attention(model, CPU), FlexAttention)
    with_dropout = small(hidden_size=64, head_size=16, sliding_window=WINDOW, attention_dropout=0.1)
    assert not isinstance(local_attention(with_dropout, torch.device("cuda")), FlexAttention), "it has no dropout"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("length", [256, 300])
def test_attention_within_documents_agrees_on_a_gpu_gradients_too(length, window):
    first = documents(length, 0).cuda()
    inputs = [
        heads(2, length, count, seed).repeat(1, 1, 1, 4).cuda().requires_grad_()
        for count, seed in ((4, 0), (2, 1), (2, 2))
    ]
    wanted = ScaledDotProduct(window)(*inputs, within(first), 0.0)
    found = FlexAttention(window)(*inputs, blocks_within(first, window), 0.0)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    slopes = [torch.autograd.grad(output.square().sum(), inputs) for output in (wanted, found)]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-2, atol=1e-2)
