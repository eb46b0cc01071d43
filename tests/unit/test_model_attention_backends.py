"""Every kernel of attention against a softmax written out in fp64, and what the start-up line says."""

import pytest
import torch
from torch import Tensor

from megatron.model.attention import describe_attention
from megatron.model.attention_backends import FlashAttention, FlashAttention3, flash_attention
from megatron.model.cache import Positions
from megatron.registry import names, resolve
from tests.models import small

CPU = torch.device("cpu")
WINDOW = 4


def written_out(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Attention in fp64 over [b, s, n, d] and [b, k, g, d]; visible: bool [s, k]."""
    share = query.shape[2] // key.shape[2]
    key, value = (tensor.double().repeat_interleave(share, dim=2) for tensor in (key, value))
    scores = torch.einsum("bsnd,bknd->bnsk", query.double(), key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("bnsk,bknd->bsnd", weights, value)


def order(queries: int, keys: int, window: int | None) -> Tensor:
    """Which keys the last `queries` of `keys` tokens see."""
    place, other = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)[None]
    return (other <= place) & (other > place - (window or keys))


def heads(batch: int, length: int, count: int, seed: int) -> Tensor:
    return torch.randn(batch, length, count, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kv_heads", [6, 3, 1])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (1, 9), (4, 9), (3, 3)])
@pytest.mark.parametrize("kind", names("attention_backend"))
def test_a_backend_computes_attention(kind, queries, keys, kv_heads):
    attend = resolve("attention_backend", kind)(small(sliding_window=WINDOW), CPU)
    query, key, value = heads(2, queries, 6, 0), heads(2, keys, kv_heads, 1), heads(2, keys, kv_heads, 2)
    visible = order(queries, keys, WINDOW if kind == "local" else None)
    expected = written_out(query, key, value, visible).float()
    torch.testing.assert_close(attend(query, key, value, None, 0.0), expected)
    places = torch.arange(keys)[None]
    positions = Positions(places[:, keys - queries :], places)
    torch.testing.assert_close(attend(query, key, value, positions, 0.0), expected)


@pytest.mark.parametrize("kind", names("attention_backend"))
def test_attention_dropout_keeps_the_mean_and_changes_the_values(kind):
    attend = resolve("attention_backend", kind)(small(sliding_window=WINDOW), CPU)
    query, key, value = (heads(1, 9, 2, seed) for seed in range(3))
    torch.manual_seed(0)
    samples = torch.stack([attend(query, key, value, None, 0.3) for _ in range(3000)])
    exact = attend(query, key, value, None, 0.0)
    assert (samples[0] - exact).abs().max() > 0.1
    # a mean of 3000 samples of deviation about one is within 5 of its own deviations of 1/55
    assert (samples.mean(0) - exact).abs().max() < 0.1


def flash_attn_func(
    query: Tensor, key: Tensor, value: Tensor, dropout_p=0.0, causal=False, deterministic=False
) -> Tensor:
    """What the package computes, as its documentation has it: causal order is counted from the last key."""
    assert causal and dropout_p == 0 and deterministic == torch.are_deterministic_algorithms_enabled()
    return written_out(query, key, value, order(query.shape[1], key.shape[1], None)).to(query.dtype)


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (1, 9), (4, 9)])
def test_flash_is_called_as_its_documentation_says(queries, keys):
    query, key, value = (
        heads(2, length, count, seed).bfloat16()
        for length, count, seed in ((queries, 6, 0), (keys, 2, 1), (keys, 2, 2))
    )
    expected = written_out(query, key, value, order(queries, keys, None)).bfloat16()
    flash = FlashAttention(flash_attn_func)
    torch.testing.assert_close(flash(query, key, value, None, 0.0), expected)
    # what the package cannot do goes elsewhere, with the same result
    torch.testing.assert_close(
        flash(query.float(), key.float(), value.float(), None, 0.0), expected.float(), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("with_sums", [False, True])
def test_flash_attention_3_is_called_as_its_interface_says_and_without_dropout(with_sums):
    def function(query: Tensor, key: Tensor, value: Tensor, causal=False, deterministic=False):
        mixed = flash_attn_func(query, key, value, causal=causal, deterministic=deterministic)
        return (mixed, mixed.sum()) if with_sums else mixed

    query, key, value = (heads(2, 9, count, seed).bfloat16() for count, seed in ((6, 0), (2, 1), (2, 2)))
    flash = FlashAttention3(function)
    wanted = FlashAttention(flash_attn_func)(query, key, value, None, 0.0)
    torch.testing.assert_close(flash(query, key, value, None, 0.0), wanted)
    assert not torch.equal(flash(query, key, value, None, 0.5), wanted), "dropout is left to torch's kernel"
    assert flash.describe(torch.bfloat16) == "flash_attn_func of FlashAttention-3"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_package_flash_attn_agrees_on_a_gpu():
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    cuda = torch.device("cuda")
    flash = flash_attention(small(), cuda)
    assert isinstance(flash, FlashAttention)
    query, key, value = (heads(2, 9, count, 0).bfloat16().to(cuda) for count in (6, 2, 2))
    expected = written_out(query, key, value, order(9, 9, None).to(cuda)).bfloat16()
    torch.testing.assert_close(flash(query, key, value, None, 0.0), expected, rtol=0.02, atol=0.02)


def test_the_start_up_line_names_the_kernel_and_the_reason():
    model = small(attention_kinds=("flash", "local", "flash"), sliding_window=WINDOW)
    assert describe_attention(model, CPU, torch.bfloat16) == [
        "attention: flash in 2 of 3 layers: torch's scaled_dot_product_attention,"
        " because flash-attn needs a GPU and this is the CPU, compiled: blocks of 128 queries",
        "attention: local in 1 of 3 layers: torch's scaled_dot_product_attention with a window of 4 tokens",
    ]
    assert describe_attention(small(), CPU, torch.float32) == [
        "attention: global in 3 of 3 layers: torch's scaled_dot_product_attention, compiled: blocks of 128 queries"
    ]
    flash = FlashAttention(flash_attn_func)
    assert flash.describe(torch.float16) == "flash_attn_func of the package flash-attn"
    assert flash.describe(torch.float32).endswith("because flash-attn needs fp16 or bf16 and this is float32")
