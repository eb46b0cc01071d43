"""The whole model as a list of layers: its order, its names, its types, and every choice of the registry in it."""

import pytest
import torch

from megatron.config.parameter_counts import parameter_count
from megatron.model.gpt import gather_logits, gpt_layers
from megatron.parallel.initial_values import initialise
from megatron.registry import names
from tests.models import VARIETY, build, random_tokens, small
from tests.ranks.run import one_rank


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid:
        yield grid


def test_the_layers_come_in_order_and_blocks_may_be_recomputed(grid):
    layers = gpt_layers(small(), grid, seed=1)
    assert [layer.module_class.__name__ for layer in layers] == [
        "Embedding",
        *["TransformerBlock"] * 3,
        "FinalNorm",
        "Head",
    ]
    assert [layer.recompute for layer in layers] == [False, True, True, True, False, False]


def test_parameters_have_names_that_say_where_they_are(grid):
    model = small(position_embedding="learned", activation="swiglu", num_layers=1, attention_kinds=("global",))
    parts = [
        "input_norm.weight",
        "input_norm.bias",
        "attention.query_key_value.weight",
        "attention.query_key_value.bias",
        "attention.dense.weight",
        "attention.dense.bias",
        "post_attention_norm.weight",
        "post_attention_norm.bias",
        "mlp.up.weight",
        "mlp.up.bias",
        "mlp.gate.weight",
        "mlp.gate.bias",
        "mlp.down.weight",
        "mlp.down.bias",
    ]
    assert [parameter.global_name for parameter in build(model, grid).parameters()] == [
        "embedding.weight",
        "embedding.positions.weight",
        *(f"blocks.0.{part}" for part in parts),
        "final_norm.weight",
        "final_norm.bias",
        "head.weight",
    ]


def test_a_tied_head_alone_on_its_stage_has_the_same_weight_and_no_positions(grid):
    first, *_, last = gpt_layers(VARIETY["gpt2"], grid, seed=1)
    assert first.tied == last.tied is not None
    embedding, head = first.build(), last.build()
    for module in (embedding, head):
        initialise(module)
    assert torch.equal(embedding.weight, head.weight)
    assert {parameter.global_name for parameter in head.parameters()} == {"embedding.weight"}


def test_tied_embeddings_get_gradients_from_both_ends(grid):
    model = VARIETY["gpt2"]
    module, ids = build(model, grid), random_tokens(model, batch=1, length=9)
    module(ids[:, :-1], targets=(ids[:, 1:], torch.ones(1, 8))).backward()
    weight = next(p for p in module.parameters() if p.global_name == "embedding.weight")
    assert (weight.grad[: model.vocab_size].abs().sum(-1) > 0).all()  # every row is an output, few are inputs


@pytest.mark.parametrize("name", VARIETY)
def test_the_estimate_counts_the_parameters_that_are_there(grid, name):
    model = VARIETY[name]
    there = sum(torch.Size(parameter.global_shape).numel() for parameter in build(model, grid).parameters())
    padding = (model.padded_vocab_size - model.vocab_size) * model.hidden_size * (1 if model.tied_embeddings else 2)
    assert parameter_count(model) in (there, there + padding)


CHOICES = [
    {field: choice}
    for field, kind in (("norm", "norm"), ("position_embedding", "position_embedding"), ("activation", "activation"))
    for choice in names(kind)
] + [{"attention_kinds": (kind,) * 3, "sliding_window": 4} for kind in names("attention_backend")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_choice_of_the_registry_trains_in_fp32_and_bf16(grid, choice, dtype):
    model = small(**choice)
    module, ids = build(model, grid).to(dtype), random_tokens(model, batch=2, length=13)
    targets = ids[:, 1:], torch.full((2, 12), 1 / 24)
    loss = module(ids[:, :-1], targets=targets)
    loss.backward()
    assert module(ids[:, :-1]).dtype == dtype and loss.dtype == torch.float32
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() and p.grad.any() for p in module.parameters())
    expected = build(model, grid)(ids[:, :-1], targets=targets)
    # 24 tokens of loss 5 or so; bf16 keeps 8 bits at each of a dozen steps
    assert loss.item() == pytest.approx(expected.item(), rel=0.03)


def test_logits_of_the_padding_are_minus_infinity_and_are_cut_off(grid):
    model = small()
    logits = build(model, grid)(random_tokens(model, batch=2, length=5))
    assert logits.shape == (2, 5, 64)
    assert (logits[..., 61:] == float("-inf")).all() and logits[..., :61].isfinite().all()
    assert torch.equal(gather_logits(logits, grid, 61), logits[..., :61])


def test_state_holds_parameters_only(grid):
    module = build(small(), grid)
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}


def test_a_causal_model_does_not_look_ahead(grid):
    for model in VARIETY.values():
        module, tokens = build(model, grid), random_tokens(model, batch=1, length=12)
        changed = tokens.clone()
        changed[:, 8:] = (tokens[:, 8:] + 1) % model.vocab_size
        before, after = module(tokens), module(changed)
        torch.testing.assert_close(before[:, :8], after[:, :8])
        assert not torch.allclose(before[:, 8], after[:, 8])
