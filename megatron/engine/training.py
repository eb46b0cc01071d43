"""A list of layers, trained: one global batch in, loss and gradient norm out.

Shapes: b micro-batch, s sequence, v padded vocabulary.
What DeepSpeed does (pipeline schedule, ZeRO, loss scaling) stays behind this class.
"""

import contextlib
import hashlib
import io
import logging
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config.plan import EnginePlan, Plan
from megatron.engine.clipping import GradientClip, skip_if_not_finite
from megatron.engine.compiling import compiled, compiled_blocks
from megatron.engine.master_weights import MasterWeights
from megatron.engine.model_parallel_unit import ModelParallelUnit
from megatron.engine.modules import Sequential, pipeline_module
from megatron.engine.optimizer_state import OptimizerState
from megatron.engine.phases import Timed, time_phases
from megatron.engine.recompute import checkpoint_function
from megatron.engine.settings import DTYPES, deepspeed_settings
from megatron.model.gpt import Targets
from megatron.model.layer import Layer
from megatron.optimizers.build import build_optimizer
from megatron.optimizers.traits import traits_of
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.parameter import PlacedParameter

# tokens [b, s] int64; where documents are kept apart, also the column in which each token's document begins, int32
Inputs = Tensor | tuple[Tensor, Tensor]
MicroBatch = tuple[Inputs, Targets]


@dataclass(frozen=True)
class StepOutput:
    """What one optimizer step tells. Tensors are on the device, and may still be on their way.

    Who reads a number (the properties do) waits for the device; who collects tensors can read many at once, later.
    """

    loss: Tensor  # mean over the unmasked tokens of the global batch
    norm: Tensor  # of the gradients before the clip; not finite when nothing was updated
    loss_scale: float | None = None  # fp16 only

    @property
    def skipped(self) -> bool:
        """The gradients were not finite and nothing was updated."""
        return not math.isfinite(float(self.norm))

    @property
    def grad_norm(self) -> float | None:
        """Before the clip; None when the step was skipped."""
        return None if self.skipped else float(self.norm)


class TrainingEngine:
    """Trains a model under any layout that the plan describes."""

    def __init__(
        self, layers: list[Layer], loss: Callable[[Tensor, Targets], Tensor], grid: ParallelGrid, plan: Plan
    ) -> None:
        """Build this rank's share of `layers`. Collective over all ranks.

        loss: (logits [b, s, v/tp], targets) -> the sum over tokens of weight * negative log likelihood. The weights
        of a global batch sum to accumulation steps * data-parallel size, so that the mean over micro-batches and
        replicas, which is what DeepSpeed forms, is the mean over the tokens.
        """
        deepspeed = _import_deepspeed(grid)
        if plan.engine.compile:
            layers, loss = compiled_blocks(layers), compiled(loss)
        self._grid, self._loss, self._seed = grid, loss, plan.engine.seed
        self._accumulation = plan.batch.accumulation_steps
        self._pipelined = plan.layout.pipe > 1
        recompute, checkpoint = plan.engine.recompute_layers, checkpoint_function(plan.engine, grid)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its set-up
            module: nn.Module = (
                pipeline_module(layers, loss, grid, plan.engine.partition_method, recompute, checkpoint)
                if self._pipelined
                else Sequential(layers, recompute, checkpoint).to(grid.device)
            )
            masters = _masters(module, plan.engine)
            traits = traits_of(plan.optimizer)
            optimizer = build_optimizer(masters.masters if masters else module.parameters(), plan.optimizer)
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=deepspeed_settings(plan),
                mpu=None if self._pipelined else ModelParallelUnit(grid),
                dist_init_required=False,
            )
        if masters:
            masters.attach(optimizer)
        clip = None
        if plan.engine.zero_stage == 0:
            weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
            clip = GradientClip(optimizer, weights, grid, plan.optimizer.gradient_clipping, traits.on_device)
            if grid.size("replica") == 1:  # nobody to average with
                self._engine.enable_backward_allreduce = self._engine.pipeline_enable_backward_allreduce = False
        self._norm: Callable[[], Tensor | float] = (lambda: clip.norm) if clip else self._engine.get_global_grad_norm
        # DeepSpeed sets its norm after the step that it takes from it
        zero = self._engine.optimizer
        norm = (lambda: clip.norm) if clip else lambda: zero._global_grad_norm
        skip_if_not_finite(optimizer, norm, traits.on_device)
        self.state = OptimizerState(zero, optimizer, traits, masters)

    @property
    def grid(self) -> ParallelGrid:
        """Where this rank stands."""
        return self._grid

    @property
    def parameter_names(self) -> set[str]:
        """Global names of the parameters this rank computes with."""
        return {cast(PlacedParameter, parameter).global_name for parameter in self._engine.module.parameters()}

    def parameters_on_rank(self) -> int:
        """Elements of the parameters that this rank computes with (ZeRO 3: before they are partitioned)."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self._engine.module.parameters())

    def time_phases(self, timed: Timed) -> None:
        """Let the functions that make up a step (and an evaluation) pass through `timed(phase, function)`."""
        time_phases(self._engine, self._pipelined, timed)
        self._loss = timed("forward", self._loss)

    def train_batch(self, micro_batches: Sequence[MicroBatch], *, step: int, learning_rate: float) -> StepOutput:
        """One optimizer step over this rank's micro-batches of a global batch. Collective over all ranks.

        step: decides the random streams, so that dropout needs no saved state.
        """
        torch.manual_seed(_stream(self._seed, step, self._grid.rank("replica"), self._grid.rank("pipe")))
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.module.train()
        batches = self._on_device(micro_batches)
        loss = self._engine.train_batch(batches) if self._pipelined else self._train_sequential(batches)
        # DeepSpeed says of an overflow with a float
        norm = torch.as_tensor(self._norm(), dtype=torch.float32, device=self._grid.device)
        return StepOutput(loss.detach(), norm, self._loss_scale())

    def evaluate_batch(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """The mean loss over the micro-batches of all data-parallel ranks, without gradients. Collective."""
        self._engine.module.eval()
        batches = self._on_device(micro_batches)
        if self._pipelined:
            loss: Tensor = self._engine.eval_batch(batches, num_micro_batches=len(micro_batches))
            return loss.detach().reshape(())
        with torch.no_grad():
            losses = [self._loss(self._engine(inputs), targets) for inputs, targets in batches]
        return self._mean_over_replicas(losses)

    def _train_sequential(self, batches: Iterator[MicroBatch]) -> Tensor:
        losses = []
        for inputs, targets in batches:
            loss = self._loss(self._engine(inputs), targets)
            self._engine.backward(loss)
            self._engine.step()
            losses.append(loss.detach())
        return self._mean_over_replicas(losses)

    def _mean_over_replicas(self, losses: Sequence[Tensor]) -> Tensor:
        mean = torch.stack([loss.float() for loss in losses]).mean()
        if self._grid.size("replica") > 1:
            dist.all_reduce(mean, group=self._grid.group("replica"))
            mean /= self._grid.size("replica")
        return mean

    def _on_device(self, micro_batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        def move(tensors: Any) -> Any:
            if isinstance(tensors, tuple):
                return tuple(move(tensor) for tensor in tensors)
            return tensors.to(self._grid.device, non_blocking=True)

        return map(move, (own_part(batch, self._grid) for batch in micro_batches))

    def _loss_scale(self) -> float | None:
        return float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else None


def _masters(module: nn.Module, plan: EnginePlan) -> MasterWeights | None:
    """fp32 masters, where weights are bf16 and none of DeepSpeed's ZeRO optimizers keeps them."""
    if plan.precision != "bf16" or plan.zero_stage:
        return None
    return MasterWeights(module, DTYPES[plan.precision], DTYPES[plan.gradient_accumulation_dtype or "fp32"])


def own_part(batch: MicroBatch, grid: ParallelGrid) -> MicroBatch:
    """This rank's part of the sequences of a micro-batch; where documents begin is told of the whole sequences.

    The weights grow with the ranks that share a sequence, as the mean over replicas divides by them.
    """
    ranks = grid.size("context")
    if ranks == 1:
        return batch
    inputs, (labels, weights) = batch
    length = labels.shape[1] // ranks
    part = slice(grid.rank("context") * length, (grid.rank("context") + 1) * length)
    inputs = (inputs[0][:, part], inputs[1]) if isinstance(inputs, tuple) else inputs[:, part]
    return inputs, (labels[:, part], weights[:, part] * ranks)


def _stream(seed: int, step: int, replica: int, pipe_rank: int) -> int:
    """A 63-bit seed for this step on this rank; the ranks of a tensor-parallel group share it."""
    digest = hashlib.blake2b(f"{seed}/{step}/{replica}/{pipe_rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _import_deepspeed(grid: ParallelGrid) -> Any:
    """Import DeepSpeed for the grid's device, quietly, and without the helpers it would compile on a CPU."""
    on_cpu = grid.device.type == "cpu"
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # torch renames collectives that DeepSpeed still calls by their old names, at every step
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # and warns of its pipeline's exchange of activations, whose gradients DeepSpeed sends back itself
    warnings.filterwarnings("ignore", message="c10d::broadcast_: an autograd kernel was not registered")
    if on_cpu:
        # its shared-memory collectives cost a minute of compiling at the first start, on every machine
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False, dist_init_required=False)
    return deepspeed
