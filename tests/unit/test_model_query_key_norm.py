"""Norms of queries and keys against their formulas, for each of their styles and kinds."""

import pytest
import torch
from torch import Tensor

from megatron.model.query_key_norm import query_key_norm
from megatron.parallel.parameter import name_parameters
from tests.models import random_tensor, randomise, small
from tests.ranks.run import one_rank

GROUPS, SHARE, SIZE = 2, 2, 8  # 2 key/value heads with 2 query heads each


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid:
        yield grid


def normed(x: Tensor, norm: str) -> Tensor:
    """Over the last dimension, without weights."""
    centred = x - x.mean(-1, keepdim=True) if norm == "layernorm" else x
    return centred / (centred.square().mean(-1, keepdim=True) + 0.01).sqrt()


def expected(heads: Tensor, kind: str, norm: str, values: dict[str, Tensor]) -> Tensor:
    """[..., heads, d] of queries or of keys, in order."""
    if kind == "full":
        return expected(heads.flatten(-2).unsqueeze(-2), "head", norm, values).view(heads.shape)
    weight = values["weight"].view(-1, heads.shape[-1]) + (1 if norm == "rmsnorm_1p" else 0)
    return normed(heads, norm) * weight + values.get("bias", torch.zeros(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "rmsnorm_1p"])
@pytest.mark.parametrize("kind", ["head", "each_head", "full"])
def test_queries_and_keys_are_normalized_over_what_the_kind_says(grid, kind, norm, dtype):
    module = query_key_norm(small(qk_norm=kind, norm=norm, num_kv_heads=GROUPS, norm_epsilon=0.01), grid)
    name_parameters(module, "norm", seed=1)
    randomise(module)
    module.to(dtype)
    heads = (1 + random_tensor((2, 5, GROUPS, SHARE + 1, SIZE), 0)).to(dtype)
    queries, keys = heads.double().split([SHARE, 1], dim=3)
    of_query, of_key = (
        {name: value.double() for name, value in part.named_parameters()} for part in (module.query, module.key)
    )
    assert ("bias" in of_query) == (norm == "layernorm" and kind != "each_head")
    wanted = torch.cat(
        [
            expected(queries.flatten(2, 3), kind, norm, of_query).view(queries.shape),
            expected(keys.flatten(2, 3), kind, norm, of_key).view(keys.shape),
        ],
        dim=3,
    )
    found = module(heads)
    assert found.dtype == dtype
    # bf16: three roundings of values up to 8, each off by 1/512 of them
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1 / 64, "atol": 1 / 32}
    torch.testing.assert_close(found.double(), wanted, **tolerance)


def test_a_model_without_biases_in_its_norms_has_none_here(grid):
    module = query_key_norm(small(qk_norm="head", norm_bias=False), grid)
    assert [name for name, _ in module.named_parameters()] == ["query.weight", "key.weight"]
