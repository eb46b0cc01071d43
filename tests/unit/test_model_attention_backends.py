"""Every kernel of attention against a softmax written out in fp64, and what the start-up line says."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.model import attention_backends
from megatron.model.attention import describe_attention
from megatron.model.attention_backends import HOPPER, flash_attention, torch_kernel
from megatron.model.attention_kernels import FlashAttention, FlashAttention3, ScaledDotProduct
from megatron.model.cache import Positions, StepPositions
from megatron.model.positions import document_starts
from megatron.registry import names, resolve
from tests.models import build, random_tokens, small
from tests.ranks.run import one_rank
from tests.trained import one_rank_model

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


def heads(batch: int, length: int, count: int, seed: int, size: int = 8) -> Tensor:
    return torch.randn(batch, length, count, size, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("kind", ["global", "local"])
def test_a_short_text_beside_a_long_one_costs_its_own_keys_only(kind):
    """Those beyond its end are not touched: they are NaN here."""
    attend, ends = resolve("attention_backend", kind)(small(sliding_window=WINDOW), CPU), (3, 500)
    query, key, value = heads(2, 1, 6, 0, 64), heads(2, 500, 3, 1, 64), heads(2, 500, 3, 2, 64)
    for tensor in (key, value):
        tensor[0, ends[0] :] = torch.nan
    queries = torch.tensor(ends)[:, None] - 1
    mixed = attend(query, key, value, StepPositions(queries, torch.arange(500)[None], ends=ends), 0.0)
    for row, end in enumerate(ends):
        visible = order(1, end, WINDOW if kind == "local" else None)
        expected = written_out(query[row, None], key[row, None, :end], value[row, None, :end], visible)
        torch.testing.assert_close(mixed[row, None], expected.float())


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


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("queries", [1, 4, 9])
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_gpu_no_kernel_gets_fewer_keys_than_queries_together_with_a_mask(monkeypatch, device, masked, queries):
    compute, calls = F.scaled_dot_product_attention, []

    def noted(query, key, value, attn_mask, enable_gqa, **options):
        calls.append((attn_mask is not None, enable_gqa))
        return compute(query, key, value, attn_mask=attn_mask, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    shapes = ((queries, 6), (9, 2), (9, 2))
    query, key, value = (heads(2, length, count, count).bfloat16().to(device) for length, count in shapes)
    places = torch.arange(9, device=device)[None]
    visible = Positions(places[:, 9 - queries :], places) if masked else None
    found = ScaledDotProduct()(query, key, value, visible, 0.0)
    needs_mask = masked or queries == 4
    assert calls == [(needs_mask, queries > 1 and not (needs_mask and device == "cuda"))]
    expected = written_out(query, key, value, order(queries, 9, None).to(device)).bfloat16()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)  # bf16 keeps 8 bits


def test_one_query_sees_all_keys_also_where_as_many_heads_share_a_key_as_there_are_keys():
    query, key, value = heads(2, 1, 6, 0), heads(2, 3, 2, 1), heads(2, 3, 2, 2)
    expected = written_out(query, key, value, order(1, 3, None)).float()
    torch.testing.assert_close(ScaledDotProduct()(query, key, value, None, 0.0), expected)


def test_decoding_leaves_cudnn_out_and_everything_else_does_not():
    enabled = []
    with one_rank_model() as model:
        block = model.engine.module.layers[1]
        block.register_forward_pre_hook(lambda *_: enabled.append(torch.backends.cuda.cudnn_sdp_enabled()))
        cache = model.new_cache(1, 8)
        cache.begin_step([0], [0], [5])
        model.hidden(torch.arange(5)[None], cache)
        model.hidden(torch.arange(5)[None])
    assert enabled == [False, True] and torch.backends.cuda.cudnn_sdp_enabled()


def test_torch_says_which_kernel_it_chooses():
    assert torch_kernel(small(num_kv_heads=2), CPU, torch.bfloat16) == SDPBackend.FLASH_ATTENTION


@pytest.mark.parametrize(
    ("capability", "chosen", "installed", "found"),
    [
        ((9, 0), "CUDNN", ["flash_attn"], "(cuDNN kernel), because cuDNN is faster than flash-attn 2"),
        ((9, 0), "CUDNN", ["flash_attn", "flash_attn_interface"], "of FlashAttention-3"),
        # deterministic algorithms, heads of more than 128, an old cuDNN: torch knows
        ((9, 0), "FLASH", ["flash_attn"], "of the package flash-attn"),
        ((9, 0), "FLASH", [], "(flash kernel), because flash-attn cannot be imported"),
        ((8, 0), "FLASH", ["flash_attn", "flash_attn_interface"], "of the package flash-attn"),
        ((10, 0), "CUDNN", ["flash_attn"], "(cuDNN kernel), because cuDNN is faster than flash-attn 2"),
        ((7, 5), "EFFICIENT", ["flash_attn"], "(memory-efficient kernel), because flash-attn needs Ampere"),
    ],
    ids=["hopper", "hopper-fa3", "hopper-no-cudnn", "hopper-nothing", "ampere", "blackwell", "turing"],
)
def test_flash_is_the_fastest_kernel_for_the_gpu(monkeypatch, capability, chosen, installed, found):
    kernel = getattr(SDPBackend, f"{chosen}_ATTENTION")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(attention_backends, "torch_kernel", lambda model, device, dtype: kernel)
    for name in ("flash_attn", "flash_attn_interface"):
        package = SimpleNamespace(flash_attn_func=flash_attn_func) if name in installed else None
        monkeypatch.setitem(sys.modules, name, package)
    assert found in flash_attention(small(), torch.device("cuda")).describe(torch.bfloat16)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["ampere", "hopper"])
def test_flash_attn_is_not_asked_to_drop_weights_of_capped_scores(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_func=flash_attn_func))
    capped = small(attention_softcap=5.0)
    assert "flash_attn_func" in flash_attention(capped, torch.device("cuda")).describe(torch.bfloat16)
    both = flash_attention(small(attention_softcap=5.0, attention_dropout=0.1), torch.device("cuda"))
    assert "blocks of 128 queries" in both.describe(torch.bfloat16), "flash-attn refuses both at once"


STEPS = {
    "plain": {},
    "grouped queries": {"num_kv_heads": 2},
    "grouped queries, documents": {"num_kv_heads": 2, "reset_attention_mask": True, "reset_position_ids": True},
    "window": {"attention_kinds": ("local", "global"), "sliding_window": 130},
    "flash": {"attention_kinds": ("flash",) * 2},
}


# of those that have none of the kinds of the others; on a CPU documents and windows have ways of their own
LONG_STEPS = ("plain", "flash")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG_STEPS)) for name in STEPS]
)
def test_no_step_of_training_computes_plain_attention(name, device):
    sizes = {"hidden_size": 128, "head_size": 32, "num_layers": 2, "attention_kinds": ("global",) * 2}
    model = small(**sizes | STEPS[name], max_position_embeddings=256)
    with one_rank(device) as grid:
        module = build(model, grid).to(grid.device, torch.bfloat16)
        tokens = random_tokens(model, 2, 256).to(grid.device)
        inputs = (tokens, document_starts(tokens, 7)) if model.reset_attention_mask else tokens
        with torch.profiler.profile(acc_events=True) as profile:
            module(inputs).float().logsumexp(-1).mean().backward()
    names = {event.key for event in profile.key_averages()}
    assert not {"aten::_scaled_dot_product_attention_math", "aten::_softmax", "aten::_safe_softmax"} & names
    assert device == "cuda" or "aten::_scaled_dot_product_flash_attention_for_cpu" in names


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION], ids=["flash", "cudnn"])
@pytest.mark.parametrize(("queries", "keys"), [(256, 256), (300, 300), (1, 300)])
def test_the_kernels_of_a_gpu_agree_with_fp64_gradients_too(kernel, queries, keys):
    shapes = ((queries, 8, 0), (keys, 2, 1), (keys, 2, 2))
    inputs = [heads(2, length, count, seed, size=64).bfloat16() for length, count, seed in shapes]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    expected = written_out(*exact, order(queries, keys, None))
    slopes = torch.autograd.grad(expected.square().sum(), exact)
    on_gpu = [tensor.cuda().requires_grad_() for tensor in inputs]
    with sdpa_kernel(kernel):  # raises where torch would not run it
        found = ScaledDotProduct()(*on_gpu, None, 0.0)
        found_slopes = torch.autograd.grad(found.float().square().sum(), on_gpu)
    # bf16 keeps 8 bits: results are averages of values around one, gradients sums of such products
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0.02, atol=0.02)
    for slope, wanted in zip(found_slopes, slopes, strict=True):
        assert (slope.cpu().double() - wanted).norm() <= 0.02 * wanted.norm()


@pytest.mark.gpu
@needs_gpu
def test_the_kernel_for_flash_agrees_on_a_gpu():
    cuda = torch.device("cuda")
    flash = flash_attention(small(head_size=64), cuda)
    if torch.cuda.get_device_capability() == HOPPER:
        assert "flash-attn" not in flash.describe(torch.bfloat16).split(", because")[0], "FlashAttention-3 or cuDNN"
    query, key, value = (heads(2, 9, count, 0, size=64).bfloat16() for count in (6, 2, 2))
    expected = written_out(query, key, value, order(9, 9, None)).bfloat16()
    found = flash(query.to(cuda), key.to(cuda), value.to(cuda), None, 0.0)
    torch.testing.assert_close(found.cpu(), expected, rtol=0.02, atol=0.02)


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
