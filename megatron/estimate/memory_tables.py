"""The tables of --dry-run: layers, parameters and memory of each stage."""

from megatron.config.parameter_counts import held_parameters
from megatron.config.pipeline_stages import layer_classes
from megatron.config.plan import Plan
from megatron.estimate.activations import WIDTH
from megatron.estimate.memory import FRAGMENTATION, RESERVE, StageMemory, fits, stage_memories

GIB = 2**30


def holder_lines(plan: Plan) -> list[str]:
    """Layers, ranks and parameters of each stage, and how they are sharded."""
    ranks = plan.layout.replicas * plan.layout.tensor
    lines = ["  layers and parameters:"]
    for number, stage in enumerate(stage_memories(plan)):
        owners = f"rank {number}" if ranks == 1 else f"ranks {number * ranks}-{(number + 1) * ranks - 1}"
        lines.append(
            f"    stage {number}, {owners}: {_layers(plan, stage.layers)}; {stage.parameters:,} parameters each"
        )
    return [*lines, *_shards(plan)]


def memory_lines(plan: Plan, gpu_memory: float | None, on_cpu: bool = False) -> list[str]:
    """Memory of a rank of each stage in GiB, with and without recomputation, and whether it fits."""
    stages = stage_memories(plan, on_cpu)
    lines = ["  memory of a rank, in GiB:"]
    lines.append("    stage  weights  gradients  optimizer  activations    loss  buffers     peak")
    for number, stage in enumerate(stages):
        cells = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.loss, stage.buffers)
        figures = "".join(f"{size / GIB:{width}.2f}" for size, width in zip(cells, (9, 11, 11, 13, 8, 9), strict=True))
        lines.append(f"    {number:5}{figures}{stage.peak / GIB:9.2f}")
    most = max(stages, key=lambda stage: stage.peak)
    lines.append(
        f"    activations with checkpoint_activations {_gib(max(s.activations_recomputed for s in stages))}, "
        f"without {_gib(max(s.activations_kept for s in stages))}"
    )
    lines.append(f"    analytic minimum of the peak with these settings: {_gib(most.least)}")
    if any(stage.host for stage in stages):
        lines.append(f"    offloaded to the host: {_gib(max(s.host for s in stages))} per rank, and gradients")
    return [*lines, _verdict(most, gpu_memory)]


def inference_lines(plan: Plan, gpu_memory: float | None) -> list[str]:
    """Memory of a rank for generation and evaluation: weights, and the cache of a token."""
    model, width = plan.model, WIDTH[plan.engine.precision]
    everything = range(len(layer_classes(model)))
    weights = held_parameters(model, plan.layout.tensor, everything) * width
    token = 2 * model.num_layers * model.kv_heads_on_rank(plan.layout.tensor) * model.head_size * width
    lines = [f"  memory of a rank: {_gib(weights)} of weights, and {token:,} bytes of cache per token"]
    if gpu_memory is not None:
        left = gpu_memory * GIB * (1 - FRAGMENTATION) - RESERVE - weights
        room = f"room for {int(left / token):,} tokens" if left > 0 else "it does not fit; raise model_parallel_size"
        lines.append(f"  gpu_memory {gpu_memory:g} GiB: {room}")
    return lines


def _layers(plan: Plan, layers: range) -> str:
    """The layers as text: "embedding, blocks 0 to 5"."""
    last = plan.model.num_layers
    blocks = [layer - 1 for layer in layers if 0 < layer <= last]
    parts = ["embedding"] if 0 in layers else []
    if blocks:
        parts.append(f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]} to {blocks[-1]}")
    parts += [name for layer, name in ((last + 1, "final norm"), (last + 2, "head")) if layer in layers]
    return ", ".join(parts) if parts else "nothing"


def _shards(plan: Plan) -> list[str]:
    layout, stage = plan.layout, plan.engine.zero_stage
    lines = []
    if layout.tensor > 1:
        lines.append(f"    every matrix is sharded over {layout.tensor} adjacent ranks (tensor parallelism)")
    if layout.sequence_parallel:
        lines.append(f"    outside the matrices, these {layout.tensor} ranks shard the sequence")
    if layout.context > 1:
        lines.append(f"    every sequence is sharded over {layout.context} ranks, and in attention the heads are")
    if stage and layout.replicas > 1:
        what = ("optimizer states", "optimizer states and gradients", "optimizer states, gradients and weights")
        owners = "ranks with the same weights" if layout.context > 1 else "data-parallel ranks"
        lines.append(f"    {what[stage - 1]} are sharded over {layout.replicas} {owners} (ZeRO {stage})")
    return lines


def _verdict(most: StageMemory, gpu_memory: float | None) -> str:
    if gpu_memory is None:
        return f"  peak: {_gib(most.peak)}; set gpu_memory=80 to see whether it fits"
    reserve = f"{_gib(RESERVE)} for CUDA and {FRAGMENTATION:.0%} lost to fragmentation"
    if fits(most.peak, gpu_memory):
        return f"  peak: {_gib(most.peak)}: it fits into gpu_memory {gpu_memory:g} GiB, with {reserve}"
    ways = [
        way
        for way, helps in (
            ("checkpoint_activations: true", most.activations > most.activations_recomputed),
            ("a smaller train_micro_batch_size_per_gpu", most.activations + most.loss > most.optimizer),
            ("more ranks, model_parallel_size or pipe_parallel_size", True),
        )
        if helps
    ]
    return (
        f"  peak: {_gib(most.peak)}: it does NOT fit into gpu_memory {gpu_memory:g} GiB, with {reserve}; try {ways[0]}"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
