"""What a rank of a parity test runs; apart from the test, so that no rank has to import transformers."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.plan import ModelPlan
from megatron.model.gpt import gather_logits
from megatron.parallel.parameter import load_state
from tests.models import build
from tests.ranks.run import make_grid


def assert_logits(model: ModelPlan, state: dict[str, Tensor], tokens: Tensor, expected: Tensor) -> None:
    """The model with the parameters `state`, cut over all ranks, gives `expected` within 1e-4 of its largest logit."""
    grid = make_grid(tensor=dist.get_world_size())
    module = build(model, grid).eval()
    load_state(module, state)
    with torch.no_grad():
        logits = gather_logits(module(tokens), grid, model.vocab_size)
    gap, size = (logits - expected).abs().max(), expected.abs().max()
    assert logits.shape == expected.shape
    assert gap <= 1e-4 * size, f"gap {gap:.2e} of {size:.2e}"
