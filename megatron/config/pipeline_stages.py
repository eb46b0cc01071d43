"""The layers of each pipeline stage, partitioned as DeepSpeed does.

The layers of the model in order: embedding, blocks, final norm, head. A test compares this file with DeepSpeed's own
partitioning, which needs torch and thus cannot be called here.
"""

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

from megatron.config.parameter_counts import layer_parameters
from megatron.config.parameter_shapes import trained_parameters
from megatron.config.plan import ModelPlan, Plan

BLOCK_CLASS = "TransformerBlock"


def layer_classes(model: ModelPlan) -> list[str]:
    """The class names of the layers, which pipe_partition_method "type:REGEX" searches."""
    head = "Embedding" if model.tied_embeddings else "Head"
    return ["Embedding", *[BLOCK_CLASS] * model.num_layers, "FinalNorm", head]


def stage_layers(plan: Plan) -> list[range]:
    """The layers of each stage, as indices into `layer_classes`."""
    classes, stages, method = layer_classes(plan.model), plan.layout.pipe, plan.engine.partition_method.lower()
    if stages == 1:
        return [range(len(classes))]
    if method == "uniform":
        bounds = _uniform(len(classes), stages)
    elif method == "parameters":
        bounds = _balanced(_trained(plan, len(classes)), stages)
    else:
        pattern = re.compile(method.partition(":")[2], re.IGNORECASE)
        bounds = _balanced([1 if pattern.search(name) else 0 for name in classes], stages)
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _trained(plan: Plan, layers: int) -> list[int]:
    """The parameters that DeepSpeed counts: those that train."""
    freeze, split = plan.engine.freeze, plan.layout.tensor
    if not freeze:
        return layer_parameters(plan.model, split)
    return [trained_parameters(plan.model, freeze, split, [layer]) for layer in range(layers)]


def _uniform(items: int, parts: int) -> list[int]:
    """Bounds of parts that differ by at most one item, rounded as in DeepSpeed."""
    if items <= parts:
        return [min(part, items) for part in range(parts + 1)]
    size, rest = divmod(items, parts)
    return [part * size + min(part, rest) for part in range(parts + 1)]


def _balanced(weights: Sequence[int], parts: int) -> list[int]:
    """Bounds of consecutive parts with the smallest difference between the heaviest and the lightest part.

    DeepSpeed's dynamic program over (items taken, parts made); ties go to the last choice.
    """
    items = len(weights)
    if items <= parts:
        return _uniform(items, parts)
    total = [0, *accumulate(weights)]
    none = (float("inf"), float("inf"), float("inf"))
    best: dict[tuple[int, int], tuple[float, float, float]] = {(0, 0): (0, 0, float("inf"))}  # cost, largest, smallest
    cut: dict[tuple[int, int], int] = {}
    for taken in range(1, items + 1):
        for made in range(1, min(taken, parts) + 1):
            for before in range(taken):
                _, largest, smallest = best.get((before, made - 1), none)
                weight = total[taken] - total[before]
                largest, smallest = max(largest, weight), min(smallest, weight)
                if best.get((taken, made), none)[0] >= largest - smallest:
                    best[taken, made] = (largest - smallest, largest, smallest)
                    cut[taken, made] = before
    bounds = [items]
    for made in range(parts, 0, -1):
        bounds.append(cut.get((bounds[-1], made), 0))
    return bounds[::-1]
