"""Scores that are scaled, capped or biased: against a softmax written out in fp64, and against transformers."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_alibi
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_alibi
from transformers.models.gpt_neo import GPTNeoConfig
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from megatron.model.attention_kernels import FlashAttention, FlashAttention3, ScaledDotProduct, Scores
from megatron.model.cache import Positions
from megatron.model.composed_attention import QUERY_BLOCK, composed_attention
from megatron.model.score_bias import Alibi, RelativePositions, RoundedAlibi
from tests import flex
from tests.models import build, random_tensor, random_tokens, small
from tests.ranks.run import one_rank
from tests.unit.test_model_attention_backends import order
from tests.unit.test_model_documents import blocks_within, within

SOFTCAP, SCALE = 1.5, 0.7
LENGTH = QUERY_BLOCK + 70  # two blocks, the second one incomplete


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid:
        yield grid


def bias_of(table: Tensor, of_keys: bool = False):
    """A bias with this table [n, k]."""

    def bias(keys: int) -> Tensor:
        return table[:, :keys]

    bias.of_keys, bias.slopes = of_keys, lambda: None
    return bias


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    softcap: float | None = SOFTCAP,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """In the type of the tensors [b, s, n, d] and [b, k, g, d]; visible: bool [b or 1, s, k]; bias: [n, s, k]."""
    share = query.shape[2] // key.shape[2]
    key, value = (tensor.repeat_interleave(share, dim=2) for tensor in (key, value))
    scores = torch.einsum("bsnd,bknd->bnsk", query, key) * SCALE
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias
    weights = scores.masked_fill(~visible.unsqueeze(1), float("-inf")).softmax(-1)
    return torch.einsum("bnsk,bknd->bsnd", weights if kept is None else weights * kept, value)


def tensors(queries: int, keys: int, kv_heads: int) -> list[Tensor]:
    shapes = [(2, queries, 6, 8), (2, keys, kv_heads, 8), (2, keys, kv_heads, 8), (6, keys)]
    return [random_tensor(shape, seed) for seed, shape in enumerate(shapes)]


def spread_out(table: Tensor, queries: int, keys: int, of_keys: bool) -> Tensor:
    """[n, k] -> [n, s, k], for the last queries."""
    columns = torch.arange(keys)
    index = columns.expand(queries, -1) if of_keys else (columns[keys - queries :, None] - columns).clamp(min=0)
    return table[:, index]


def with_gradients(function, *inputs: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    result = function(*leaves)
    gradient = random_tensor(result.shape, 9).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, gradient)]


@pytest.mark.parametrize(
    ("queries", "keys", "window", "kv_heads", "softcap", "of_keys"),
    [
        (LENGTH, LENGTH, None, 6, SOFTCAP, False),
        (LENGTH, LENGTH, 40, 2, SOFTCAP, False),
        (LENGTH, LENGTH, QUERY_BLOCK + 9, 3, None, True),
        (1, 9, None, 2, SOFTCAP, False),
        (4, 9, 3, 1, None, False),
        (3, 3, 1, 6, SOFTCAP, True),
    ],
)
def test_capped_and_biased_scores_and_their_gradients_are_those_of_the_formula(
    queries, keys, window, kv_heads, softcap, of_keys
):
    attend = ScaledDotProduct(window, scores=Scores(SCALE, softcap, True))
    visible = order(queries, keys, window).unsqueeze(0)

    def ours(query, key, value, table):
        return attend(query, key, value, None, 0.0, bias_of(table, of_keys))

    def theirs(query, key, value, table):
        return written_out(query, key, value, visible, softcap, spread_out(table, queries, keys, of_keys))

    inputs = tensors(queries, keys, kv_heads)
    found, expected = with_gradients(ours, *inputs), with_gradients(theirs, *(tensor.double() for tensor in inputs))
    for mine, exact in zip(found, expected, strict=True):
        # fp32 keeps 24 bits; gradients are sums of up to 2 x 198 x 6 products of numbers around one
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=2e-5)


def test_documents_and_padding_stay_apart_with_capped_scores():
    query, key, value, _ = tensors(LENGTH, LENGTH, 2)
    first = torch.tensor([[0] * 100 + [100] * 98, [0] * 3 + [3] * 130 + [133] * 65], dtype=torch.int32)
    attend, positions = ScaledDotProduct(scores=Scores(SCALE, SOFTCAP)), within(first)
    expected = written_out(query, key, value, positions.visible()[:, 0])
    torch.testing.assert_close(attend(query, key, value, positions, 0.0), expected)
    shifted = torch.arange(LENGTH) - torch.tensor([[0], [5]])
    padded = Positions(shifted.clamp(min=0), shifted, in_order=False)
    expected = written_out(query, key, value, padded.visible()[:, 0])
    torch.testing.assert_close(attend(query, key, value, padded, 0.0), expected)


def test_backward_drops_the_weights_that_forward_dropped():
    query, _, _, table = tensors(LENGTH, LENGTH, 6)
    key, eye = random_tensor((1, LENGTH, 6, 8), 1), torch.eye(LENGTH)[None, :, None].expand(1, -1, 6, -1)
    visible = order(LENGTH, LENGTH, None).unsqueeze(0)
    columns = torch.arange(LENGTH)[None]

    def dropped(query, key, value, table, probability=0.3):
        torch.manual_seed(3)
        last = (columns, columns, None, False, True, None, SCALE, SOFTCAP, probability)
        return composed_attention(query, key, value, table, *last)[0]

    # with unit vectors as values the result is the weights themselves
    wide = torch.nn.functional.pad(query[:1], (0, LENGTH - 8)), torch.nn.functional.pad(key, (0, LENGTH - 8))
    weights, plain = (dropped(*wide, eye, table, share).permute(0, 2, 1, 3) for share in (0.3, 0.0))
    kept = torch.where(weights > 0, 1 / 0.7, 0.0)
    torch.testing.assert_close(weights, plain * kept)
    share = (weights > 0).sum() / (plain > 0).sum()
    assert share == pytest.approx(0.7, abs=0.01)  # of 118,206 weights: the deviation is 0.0013

    inputs = [query[:1], key, random_tensor((1, LENGTH, 6, 8), 2), table]
    bias = partial(spread_out, queries=LENGTH, keys=LENGTH, of_keys=False)
    found = with_gradients(dropped, *inputs)
    expected = with_gradients(lambda q, k, v, t: written_out(q, k, v, visible, bias=bias(t), kept=kept), *inputs)
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("of_keys", [False, True])
def test_flex_attention_changes_scores_alike(window, of_keys):
    scores = Scores(SCALE, SOFTCAP, True)
    first = torch.tensor([[0] * 100 + [100] * 98, [0] * 198], dtype=torch.int32)
    inputs = tensors(LENGTH, LENGTH, 2)
    inputs = [tensor.repeat(*[1] * (tensor.dim() - 1), 2 if tensor.dim() == 4 else 1) for tensor in inputs]

    *inputs, table = inputs  # on a CPU torch's operator itself has no gradient of the table

    def by(attend, visible):
        return with_gradients(lambda q, k, v: attend(q, k, v, visible, 0.0, bias_of(table, of_keys)), *inputs)

    found = by(flex.on_cpu(window, scores), blocks_within(first, window))
    wanted = by(ScaledDotProduct(window, scores=scores), within(first))
    for mine, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", [FlashAttention, FlashAttention3])
def test_flash_is_told_scale_cap_and_slopes(grid, kind, with_bias):
    calls = []

    def function(query, key, value, **options):
        calls.append(options)
        return query

    bias = Alibi(small(), grid) if with_bias else None
    flash = kind(function, Scores(SCALE, SOFTCAP, with_bias))
    query = random_tensor((1, 5, 4, 8), 0).bfloat16()
    flash(query, query, query, None, 0.0, *([bias] if with_bias else []))
    if kind is FlashAttention3 and with_bias:
        assert not calls, "it has no slopes"
        return
    (options,) = calls
    assert (options["softmax_scale"], options["softcap"], options["causal"]) == (SCALE, SOFTCAP, True)
    if with_bias:
        assert options["alibi_slopes"].tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    assert "capped at 1.5" in flash.describe(torch.bfloat16)


def test_scores_exist_for_one_block_of_queries_at_a_time():
    length = 8 * QUERY_BLOCK
    inputs = [random_tensor((1, length, 2, 8), seed).requires_grad_() for seed in range(3)]
    attend = ScaledDotProduct(scores=Scores(SCALE, SOFTCAP))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        attend(*inputs, None, 0.0).sum().backward()
    sizes = [event.cpu_memory_usage for event in run.events() if event.name == "[memory]"]
    one_block = 4 * 2 * QUERY_BLOCK * length
    alive, most = 0, 0
    for size in sizes:
        alive += size
        most = max(most, alive)
    assert max(sizes) <= one_block and most < 8 * one_block, "of 8 blocks six tensors each would be 24 or more"


def slopes(model, grid) -> list[float]:
    return (-Alibi(model, grid)(2)[:, 1]).tolist()


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 16, 20, 112])
def test_alibi_is_that_of_bloom_mpt_and_falcon(grid, heads):
    model, length = small(num_attention_heads=heads, num_kv_heads=heads), 30
    table, rounded = Alibi(model, grid)(length), RoundedAlibi(model, grid)(length)
    everything = torch.ones(1, length, dtype=torch.int64)
    bloom = bloom_alibi(everything, heads, torch.float32).squeeze(1)  # [n, k], grows with the key
    torch.testing.assert_close(table, -bloom)
    mpt = build_mpt_alibi_tensor(heads, length).squeeze(1).flip(-1)  # of the last query: [n, distance]
    torch.testing.assert_close(table, mpt)
    falcon = falcon_alibi(everything, heads, torch.float32).squeeze(1) / math.sqrt(model.head_size)
    assert torch.equal(rounded, falcon)


@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (6, 9), (2, 5), (7, 20)])
def test_relative_positions_are_those_of_t5(grid, buckets, far):
    model = small(position_embedding="rpe", relative_buckets=buckets, relative_distance=far)
    bias, distance = RelativePositions(model, grid), torch.arange(300)
    theirs = T5Attention._relative_position_bucket(-distance, False, buckets, far)
    with torch.no_grad():
        bias.weight.copy_(random_tensor(bias.weight.shape, 1))
    assert torch.equal(bias(300), bias.weight[theirs].t())


def test_a_query_of_a_window_sees_the_keys_that_it_sees_in_transformers():
    columns, window = torch.arange(20), 7
    seen = Positions(columns[None], columns[None]).visible(window)[0, 0]
    function = sliding_window_causal_mask_function(window)  # Mistral, Qwen 2, Phi-3, StarCoder 2, Gemma 2 and 3
    assert torch.equal(seen, torch.tensor([[bool(function(0, 0, row, key)) for key in columns] for row in columns]))
    config = GPTNeoConfig(hidden_size=8, num_heads=2, max_position_embeddings=20, window_size=window)
    assert torch.equal(seen, GPTNeoSelfAttention(config, "local").bias[0, 0])


def test_queries_keys_and_values_are_clamped_before_everything_else(grid):
    model, tokens = small(clip_qkv=0.3, qk_norm="head", norm="rmsnorm"), random_tokens(small(), 1, 6)
    attention = build(model, grid).layers[1].attention
    seen = []
    attention.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    hidden = random_tensor((1, tokens.shape[1], model.hidden_size), 1)
    attention(hidden)
    fused = attention.query_key_value(hidden).unflatten(-1, (4, 3, 8))
    assert fused.abs().max() > 0.3
    assert torch.equal(seen[0], fused[..., :2, :].clamp(-0.3, 0.3))


def test_the_start_up_line_says_what_is_done_to_the_scores(grid):
    capped = ScaledDotProduct(4, scores=Scores.of(small(attention_softcap=50.0, position_embedding="alibi")))
    assert capped.describe(torch.bfloat16) == (
        "blocks of 128 queries with a window of 4 tokens, scores capped at 50 and with a bias for positions"
    )
    assert SimpleNamespace(**vars(Scores.of(small(attention_scale=1.0)))).scale == 1.0
