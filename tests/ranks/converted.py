"""What a rank of a test of converted checkpoints runs; apart from the test, so that no rank imports transformers."""

from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron.checkpoint.folder import find_checkpoint
from megatron.checkpoint.store import load_weights
from megatron.config.load import load_config
from megatron.config.resolve import resolve
from megatron.engine.inference import InferenceEngine
from megatron.model.gpt import gather_logits, gpt_layers
from tests.ranks.run import make_grid


def assert_checkpoint_logits(cases: list[tuple[str, str, Tensor]], tokens: Tensor) -> None:
    """Each case's folder, opened with the model.yml in it, gives its logits within 1e-4 of the largest."""
    grid = make_grid(tensor=dist.get_world_size())
    for case, folder, expected in cases:
        config = load_config([str(Path(folder) / "model.yml")])
        vocabulary = expected.shape[-1]
        model = resolve(config, 1, vocabulary, inference=True).model
        engine = InferenceEngine(gpt_layers(model, grid, seed=None), grid)
        checkpoint = find_checkpoint(Path(folder))
        assert checkpoint is not None
        load_weights(engine, checkpoint)
        logits = gather_logits(engine.logits(engine.hidden(tokens)), grid, vocabulary)
        gap, size = (logits - expected).abs().max(), expected.abs().max()
        assert gap <= 1e-4 * size, f"{case}: gap {gap:.2e} of {size:.2e}"
