"""Packed weights multiply like the weights they are made of, and a packed model has the logits of its training."""

from dataclasses import replace

import pytest
import torch

from megatron.config.plan import LoraPlan
from megatron.engine.inference import InferenceEngine
from megatron.errors import UserError
from megatron.inference import TrainedModel
from megatron.model.gpt import gpt_layers
from megatron.parallel.packed_weights import FEW_TOKENS, check_quantization, has_products, pack_weight, quantize_weight
from tests.models import random_tensor, small
from tests.ranks.run import one_rank
from tests.tiny import plan

CONTEXT = 24
MODELS = {
    "untied": {"padded_vocab_size": 72},
    "tied": {"tied_embeddings": True},
    "gated, grouped queries": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2},
    "learned positions, norm of the embedding": {"position_embedding": "learned", "embedding_norm": True},
    "adapters": {"lora": LoraPlan(rank=4, alpha=8.0, dropout=0.0, targets=("query_key_value", "up", "down"))},
}


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid:
        yield grid


def engine_of(grid, dtype: torch.dtype = torch.float32, **changes) -> InferenceEngine:
    model = small(max_position_embeddings=CONTEXT, init_std=0.2, **changes)
    engine = InferenceEngine(gpt_layers(model, grid, 5, 6), grid, dtype)
    for name, parameter in engine.module.named_parameters():
        if name.endswith("lora.b"):  # drawn as zero
            parameter.copy_(random_tensor(parameter.shape, 7))
    return engine


def tokens() -> torch.Tensor:
    return torch.randint(61, (3, CONTEXT), generator=torch.Generator().manual_seed(2))


def logits(engine: InferenceEngine) -> torch.Tensor:
    return engine.logits(engine.hidden(tokens()))[..., :61].float()


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_packed_weight_multiplies_like_the_weight(dtype, rows):
    weight, inputs = random_tensor((72, 48), 1).to(dtype), random_tensor((2, rows, 48), 2).to(dtype)
    bias = random_tensor((72,), 3).to(dtype)
    packed = pack_weight(weight)
    for added in (None, bias):
        exact = torch.nn.functional.linear(inputs.double(), weight.double(), added if added is None else added.double())
        # fp32 sums of 48 products; then one rounding to the type of the inputs
        torch.testing.assert_close(
            packed.product(inputs, added).double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-5
        )


def test_a_weight_that_fp16_cannot_hold_is_left_as_it_is():
    weight = random_tensor((72, 48), 1).bfloat16()
    assert pack_weight(weight) is not None
    if not has_products(torch.bfloat16):
        assert pack_weight(weight * 2.0**-20) is None
        assert pack_weight(weight * 2.0**20) is None


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_rounds_each_row_to_254_steps(dtype, rows):
    weight, inputs = random_tensor((72, 48), 1).to(dtype), random_tensor((rows, 48), 2).to(dtype)
    weight[3] *= 100  # another row's scale is its own
    packed = quantize_weight(weight)
    steps = (weight.float().abs().amax(1) / 127).bfloat16().float()[:, None]
    rounded = (weight.float() / steps).round().clamp(-127, 127) * steps
    exact = (inputs.bfloat16() if rows <= FEW_TOKENS else inputs).double() @ rounded.double().t()
    torch.testing.assert_close(packed.product(inputs, None).double(), exact, rtol=2.0**-8, atol=1e-3)


def test_int8_needs_widths_that_the_kernel_takes_and_a_cpu():
    assert quantize_weight(random_tensor((72, 40), 1)) is None
    with pytest.raises(UserError, match=r"quantization \(int8\) is for CPUs, and this is a CUDA device"):
        check_quantization(torch.device("cuda"))


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_packed_model_has_the_logits_of_training_in_fp32(grid, changes):
    plain, packed = engine_of(grid, **changes), engine_of(grid, **changes)
    [line] = packed.pack_weights()
    assert line.endswith("oneDNN")
    expected, found = logits(plain), logits(packed)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_packed_model_in_bf16_is_no_further_from_fp32_than_training_in_bf16(grid, changes):
    plain, packed = engine_of(grid, torch.bfloat16, **changes), engine_of(grid, torch.bfloat16, **changes)
    exact = engine_of(grid, torch.bfloat16, **changes)
    exact.module.float()
    packed.pack_weights()
    reference = logits(exact)
    errors = [(logits(engine) - reference).norm() for engine in (packed, plain)]
    assert errors[0] <= 1.2 * errors[1]  # sums in another order round differently
    if not has_products(torch.bfloat16):
        assert errors[0] <= 1e-4 * reference.norm()


@pytest.mark.parametrize("tied", [False, True])
def test_decoding_with_a_cache_and_the_loss_use_packed_weights(grid, tied):
    changes = {"tied_embeddings": tied, "max_position_embeddings": CONTEXT, "init_std": 0.2}
    whole = plan()
    whole = replace(whole, model=small(**changes))
    engine = InferenceEngine(gpt_layers(whole.model, grid, 5), grid, torch.bfloat16)
    engine.pack_weights()
    names = {name for name in engine.parameter_names if name.endswith("weight") and "norm" not in name}
    assert names == {"embedding.weight"}
    model = TrainedModel(engine, grid, whole, tokenizer=None)
    cache = model.new_cache(3, CONTEXT)
    expected = logits(engine)
    for start, stop in ((0, 9), (9, 10), (10, CONTEXT)):
        cache.begin_step([0, 1, 2], [start] * 3, [stop - start] * 3)
        found = engine.logits(engine.hidden(tokens()[:, start:stop], cache))[..., :61].float()
        tolerance = 1e-4 if engine.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found, expected[:, start:stop], rtol=0, atol=tolerance * expected.abs().max().item())
    labels = tokens().roll(-1, 1)
    loss = engine.loss(engine.hidden(tokens()), (labels, torch.ones(labels.shape)))
    summed = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, summed, rtol=1e-5 if engine.dtype == torch.float32 else 1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_changes_the_logits_a_little(grid, dtype):
    sizes = {"hidden_size": 64, "head_size": 16, "ffn_hidden_size": 96}
    plain, rounded = engine_of(grid, dtype, **sizes), engine_of(grid, dtype, **sizes)
    lines = rounded.pack_weights("int8")
    assert lines == ["weights of 13 matrix products: int8"]
    difference = (logits(rounded) - logits(plain)).norm() / logits(plain).norm()
    assert 1e-4 < difference < 5e-2
