"""What a rank computes of a family's small models; apart from the tests, so that no rank has to import transformers."""

import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.plan import BatchPlan, ModelPlan
from megatron.convert.parameters import ParameterMap
from megatron.engine.distributed import start_layout
from megatron.engine.modules import Sequential
from megatron.engine.training import TrainingEngine
from megatron.model.gpt import gather_logits, gpt_layers
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.parameter import load_state
from megatron.registry import resolve
from tests import tiny
from tests.models import new_cache, read_in_steps
from tests.ranks.run import make_grid, own_device

Figures = dict[str, float]  # check -> the largest gap, relative
BOUND = 1e-4


@dataclass(frozen=True)
class Reference:
    """A model of theirs: its parameters as ours, and what it computes, in fp32 on a CPU."""

    family: str
    model: ModelPlan
    state: dict[str, Tensor]  # ours
    tokens: Tensor  # [b, s]
    labels: Tensor  # [b, s]
    logits: Tensor  # [b, s, v]
    loss: Tensor
    gradients: dict[str, Tensor]  # theirs

    def parameters(self) -> ParameterMap:
        """The map of its parameters."""
        found: ParameterMap = resolve("hugging_face_family", self.family).parameters(self.model)
        return found

    def targets(self) -> tuple[Tensor, Tensor]:
        """Labels, and weights for the mean over all tokens."""
        weights = torch.full(self.labels.shape, 1 / self.labels.numel(), device=self.labels.device)
        return self.labels, weights


def measure(folder: str, names: Sequence[str], pipe: int = 1) -> None:
    """On each rank: the figures of every model that `names` name in `folder`, which the first rank writes beside it."""
    for name in names:
        reference: Reference = torch.load(f"{folder}/{name}.pt", weights_only=False, map_location=own_device())
        try:
            figures: Mapping[str, object] = _pipeline(reference) if pipe > 1 else _figures(reference)
        except Exception:
            figures = {"error": traceback.format_exc()}
        if dist.get_rank() == 0:
            Path(folder, f"{name}.{pipe}.{dist.get_world_size()}.json").write_text(json.dumps(figures))


def _figures(reference: Reference) -> Figures:
    """Logits and decoding on all ranks as tensor-parallel ones; on one rank the gradients too."""
    tensor = dist.get_world_size()
    grid, model = make_grid(tensor=tensor), reference.model
    module = Sequential(gpt_layers(model, grid, None)).eval()
    load_state(module, reference.state)
    with torch.no_grad():
        logits = gather_logits(module(reference.tokens), grid, model.vocab_size)
        decoded = _decode(module, reference.tokens, model, grid)
    figures = {
        f"logits, tp {tensor}": _gap(logits, reference.logits),
        f"decoding, tp {tensor}": _gap(decoded, reference.logits),
    }
    return figures | ({"gradients": _gap_of_gradients(module, reference)} if tensor == 1 else {})


def _decode(module: Sequential, tokens: Tensor, model: ModelPlan, grid: ParallelGrid) -> Tensor:
    """Logits of half of the text read at once, and the rest token by token."""
    heads = model.kv_heads_on_rank(grid.size("tensor"))
    batch, length = tokens.shape
    steps = [length // 2] + [1] * (length - length // 2)
    decoded = read_in_steps(module, tokens, new_cache(model, batch, length, heads), steps)
    return gather_logits(decoded, grid, model.vocab_size)


def _gap_of_gradients(module: Sequential, reference: Reference) -> float:
    """The largest gap of a parameter's gradient, relative to its largest element.

    Where that is below a thousandth of the largest of all, relative to this: the gradient of a key's bias is zero but
    for rounding if no positions are rotated, as softmax ignores what all scores have in common.
    """
    module(reference.tokens, targets=reference.targets()).backward()
    ours = {}
    for parameter in module.parameters():
        whole = tuple(slice(size) for size in parameter.global_shape)  # without padding
        ours[parameter.global_name] = parameter.grad[whole]
    theirs = reference.parameters().to_hugging_face(ours)
    floor = 1e-3 * max(float(gradient.abs().max()) for gradient in reference.gradients.values())
    return max(
        float((theirs[name] - gradient).abs().max()) / max(floor, float(gradient.abs().max()))
        for name, gradient in reference.gradients.items()
    )


def _pipeline(reference: Reference) -> Figures:
    """The loss of a pipeline over all ranks."""
    batch, length = reference.tokens.shape
    plan = replace(
        tiny.plan(pipe=dist.get_world_size(), model=vars(reference.model)), batch=BatchPlan(batch, 1, batch, length)
    )
    grid = start_layout(plan.layout)
    engine = TrainingEngine(gpt_layers(plan.model, grid, None), grid, plan)
    load_state(engine._engine.module, reference.state)
    loss = engine.evaluate_batch([(reference.tokens, reference.targets())])
    return {f"loss, pp {dist.get_world_size()}": _gap(loss, reference.loss)}


def _gap(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and ours.isfinite().all()
    return float((ours - theirs).abs().max() / theirs.abs().max())
