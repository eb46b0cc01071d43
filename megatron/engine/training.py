"""Training of a list of layers: one global batch in, loss and gradient norm out.

Shapes: b micro-batch, s sequence, v padded vocabulary.
DeepSpeed (pipeline schedule, ZeRO, loss scaling) is hidden behind `TrainingEngine`.
"""

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config.plan import EnginePlan, Plan
from megatron.engine.activations import BlockOutputs
from megatron.engine.clipping import GradientNorm, NormLimit, clip_and_skip
from megatron.engine.compiling import compiled_layers, gather_whole_blocks, share_memory
from megatron.engine.deepspeed_internals import (
    disable_gradient_averaging,
    keep_gradients_of_the_head,
    keep_loss_on_the_device,
    keep_norms_on_the_device,
    skip_extensions,
    sum_gradients_of_tied_weights,
    zero_gradient_norm,
)
from megatron.engine.figures import BeforeUpdate, GradientSquares, GradientSum, ParameterFigures
from megatron.engine.inference import InferenceEngine
from megatron.engine.master_weights import MasterWeights
from megatron.engine.model_parallel_unit import ModelParallelUnit
from megatron.engine.modules import Sequential, cast_parameters, freeze_parameters, pipeline_module
from megatron.engine.optimizer_state import OptimizerState, draw_initial_values
from megatron.engine.phases import Call, Timed, time_phases
from megatron.engine.recompute import checkpoint_function
from megatron.engine.settings import DTYPES, deepspeed_settings
from megatron.engine.training_inference import TrainingInference
from megatron.errors import UserError
from megatron.model.layer import Layer, LayerInput, Targets, pack, unpack
from megatron.optimizers.build import build_optimizer
from megatron.optimizers.traits import traits_of
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.parameter import PlacedParameter
from megatron.seeds import generator_seed

MicroBatch = tuple[LayerInput, Targets]


@dataclass(frozen=True)
class StepOutput:
    """Results of one optimizer step, as tensors on the device, possibly still being computed.

    The properties synchronize with the device. Keep the tensors to batch reads.
    """

    loss: Tensor  # mean over the unmasked tokens of the global batch
    norm: Tensor  # of the gradients before the clip; not finite if the step was skipped
    loss_scale: float | None = None  # fp16 only
    norm_limit: Tensor | None = None  # with `skip_update`: the norm above which the update was skipped; inf: none

    @property
    def skipped(self) -> bool:
        """Whether the gradients were not finite, so that nothing was updated."""
        return not math.isfinite(float(self.norm))

    @property
    def grad_norm(self) -> float | None:
        """Before the clip; None if the step was skipped."""
        return None if self.skipped else float(self.norm)


class TrainingEngine:
    """Trains a model under any layout that the plan describes."""

    def __init__(self, layers: list[Layer], grid: ParallelGrid, plan: Plan) -> None:
        """Build the part of `layers` on this rank, and draw its weights if `layers` have a seed. Collective.

        The last layer gives the loss, the sum over tokens of weight * negative log likelihood. The weights of a global
        batch sum to accumulation steps * data-parallel size, so that DeepSpeed's mean over micro-batches and replicas
        is the mean over the tokens.
        Raises UserError for fp16 on a device for which DeepSpeed does not support it.
        """
        deepspeed = _import_deepspeed(grid)
        if plan.engine.precision == "fp16" and not deepspeed.get_accelerator().is_fp16_supported():
            raise UserError(
                f"precision (fp16) is not supported by DeepSpeed on this device ({grid.device.type.upper()}); "
                "write precision: bfloat16"
            )
        recompute, checkpoint = plan.engine.recompute_layers, checkpoint_function(plan.engine, grid)
        if plan.engine.compile:
            within = checkpoint if recompute and plan.engine.recompute_selective else None
            layers = compiled_layers(layers, within, plan.engine.async_tensor_parallel)
            if plan.engine.async_tensor_parallel:
                share_memory(grid)
            recompute = 0 if within else recompute
        self._grid, self._plan, self._seed = grid, plan, plan.engine.seed
        self.is_adapted = plan.model.lora is not None
        self.base: dict[str, str] | None = None  # which model adapters belong to, as in base.json
        self._accumulation = plan.batch.accumulation_steps
        self._pipelined = plan.layout.pipe > 1
        settings, unit = deepspeed_settings(plan), ModelParallelUnit(grid)

        def prepare(module: nn.Module) -> None:
            """Before the next layer is built, so that no rank holds the whole model in fp32, or under ZeRO 3 at all."""
            cast_parameters(module, DTYPES[plan.engine.precision])
            freeze_parameters(module, plan.engine.freeze)
            if plan.engine.zero_stage == 3:
                replicas = unit.get_data_parallel_group()
                deepspeed.zero.Init(module, replicas, config_dict_or_path=settings, mpu=unit)

        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints during set-up
            module: nn.Module = (
                pipeline_module(layers, grid, plan.engine.partition_method, recompute, checkpoint, prepare)
                if self._pipelined
                else Sequential(layers, recompute, checkpoint, prepare).to(grid.device)
            )
            if plan.engine.compile and plan.engine.zero_stage == 3:
                gather_whole_blocks(deepspeed, module, layers)
            masters = _masters(module, plan.engine)
            traits = traits_of(plan.optimizer)
            optimizer = build_optimizer(masters.masters if masters else module.parameters(), plan.optimizer)
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=settings,
                mpu=None if self._pipelined else unit,
                dist_init_required=False,
            )
        if self._pipelined:
            keep_loss_on_the_device(self._engine)
            keep_gradients_of_the_head(self._engine)
            sum_gradients_of_tied_weights(self._engine)
        if masters:
            masters.attach(optimizer)
        self._norm: Callable[[], Tensor | float] = partial(zero_gradient_norm, self._engine.optimizer)
        if plan.engine.zero_stage == 0:
            weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
            norm = GradientNorm(optimizer, weights, grid)
            self._norm = lambda: norm.value
            if grid.size("replica") == 1:
                disable_gradient_averaging(self._engine)
        self._before_update = BeforeUpdate(optimizer)
        deviations, window = plan.optimizer.skip_update, plan.optimizer.skip_update_window
        self._limit = None if deviations is None else NormLimit(deviations, window, grid.device)
        clip_and_skip(optimizer, self._norm, plan.optimizer.gradient_clipping, traits.on_device, self._limit)
        frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        self._optimizer = optimizer
        self.state = OptimizerState(self._engine.optimizer, optimizer, traits, masters, frozen)
        draw_initial_values(module, self.state)

    @property
    def grid(self) -> ParallelGrid:
        """The grid of ranks."""
        return self._grid

    @property
    def weights(self) -> list[nn.Parameter]:
        """The parameters this rank computes with; under ZeRO 3 they are empty between steps."""
        return list(self._engine.module.parameters())

    @property
    def gradient_norms(self) -> dict[str, Any]:
        """The norms that `skip_update` compares with, for a checkpoint; empty without it. Waits for the device."""
        return {} if self._limit is None else self._limit.state

    @gradient_norms.setter
    def gradient_norms(self, values: dict[str, Any]) -> None:
        if self._limit is not None:
            self._limit.state = values

    @property
    def parameter_names(self) -> set[str]:
        """Global names of the parameters this rank computes with."""
        return {cast(PlacedParameter, parameter).global_name for parameter in self._engine.module.parameters()}

    def parameters_on_rank(self) -> int:
        """Elements of the parameters this rank computes with (ZeRO 3: before they are partitioned)."""
        return sum(math.prod(cast(PlacedParameter, p).shard_shape) for p in self._engine.module.parameters())

    def parameter_figures(self) -> ParameterFigures:
        """Figures of each parameter of the whole model. Collective."""
        return ParameterFigures(self.state, self._grid)

    def gradient_squares(self, figures: ParameterFigures) -> GradientSquares:
        """Squares of each parameter's gradient, from the next step on."""
        return GradientSquares(figures, self._before_update)

    def gradient_sum(self, figures: ParameterFigures) -> GradientSum:
        """The sum of the gradients from the next step on."""
        return GradientSum(figures, self._before_update)

    def block_outputs(self) -> BlockOutputs:
        """Statistics of the output of each block, from the next step on."""
        return BlockOutputs(self._engine.module, self._plan.model.num_layers, self._grid)

    def time_phases(self, timed: Timed) -> None:
        """Wrap the functions of a training step (and an evaluation) in `timed(phase, function)`."""
        time_phases(self._engine, self._pipelined, timed)

    def time_update(self, begin: Call, end: Call) -> None:
        """Call `begin` and `end` around each update of this rank's own weights, during which no rank waits for another.

        The clip that a fused optimizer computes with it is part of it. A step may have several: one for each group of
        weights.
        """
        self._optimizer.register_step_pre_hook(begin)
        self._optimizer.register_step_post_hook(end)

    def train_batch(self, micro_batches: Sequence[MicroBatch], *, step: int, learning_rate: float) -> StepOutput:
        """One optimizer step over this rank's micro-batches of a global batch. Collective over all ranks.

        step: seeds the random streams, so that dropout needs no saved state.
        """
        # the ranks of a tensor-parallel group share the seed
        replica, stage = self._grid.rank("replica"), self._grid.rank("pipe")
        torch.manual_seed(generator_seed(f"{self._seed}/{step}/{replica}/{stage}"))
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.module.train()
        if self._limit is not None:
            self._limit.begin_step()
        batches = self._on_device(micro_batches)
        loss = self._engine.train_batch(batches) if self._pipelined else self._train_sequential(batches)
        # a float after an overflow
        norm = torch.as_tensor(self._norm(), dtype=torch.float32, device=self._grid.device)
        limit = None if self._limit is None else self._limit.value
        return StepOutput(loss.detach(), norm, self._loss_scale(), limit)

    def evaluate_batch(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """The mean loss over the micro-batches of all data-parallel ranks, without gradients. Collective."""
        self._engine.module.eval()
        batches = self._on_device(micro_batches)
        if self._pipelined:
            loss: Tensor = self._engine.eval_batch(batches, num_micro_batches=len(micro_batches))
            return loss.detach().reshape(())
        with torch.no_grad():
            losses = [self._engine(inputs, targets=targets) for inputs, targets in batches]
        return self._mean_over_replicas(losses)

    @contextmanager
    def inference(self, begin: Callable[[], None] = lambda: None) -> Iterator[InferenceEngine]:
        """The model as it is, for inference until the block ends. Entered by all ranks.

        begin: called before each forward pass.

        Nothing is compiled for its shapes, and tensor-parallel ranks do not divide the sequence.
        """
        module = self._engine.module.eval()
        with torch.compiler.set_stance("force_eager"), self._grid.whole_sequences():
            yield TrainingInference(module, self._grid, self._plan, begin)

    def _train_sequential(self, batches: Iterator[MicroBatch]) -> Tensor:
        losses = []
        for inputs, targets in batches:
            loss = self._engine(inputs, targets=targets)
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

        return map(move, (context_slice(batch, self._grid) for batch in micro_batches))

    def _loss_scale(self) -> float | None:
        return float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else None


def _masters(module: nn.Module, plan: EnginePlan) -> MasterWeights | None:
    """fp32 masters if weights are bf16 and no ZeRO optimizer keeps them."""
    if plan.precision != "bf16" or plan.zero_stage:
        return None
    return MasterWeights(module, DTYPES[plan.precision], DTYPES[plan.gradient_accumulation_dtype or "fp32"])


def context_slice(batch: MicroBatch, grid: ParallelGrid) -> MicroBatch:
    """This rank's context-parallel slice of the sequences in `batch`; document starts stay unsharded.

    Loss weights are scaled by the context-parallel size, because the mean over replicas divides by it.
    """
    ranks = grid.size("context")
    if ranks == 1:
        return batch
    (tokens, masking), (labels, weights) = unpack(batch[0]), batch[1]
    length = labels.shape[1] // ranks
    part = slice(grid.rank("context") * length, (grid.rank("context") + 1) * length)
    return pack(tokens[:, part], masking), (labels[:, part], weights[:, part] * ranks)


def _import_deepspeed(grid: ParallelGrid) -> Any:
    """Import DeepSpeed for the grid's device, without its log output and without compiling extensions on a CPU."""
    on_cpu = grid.device.type == "cpu"
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # torch warns at every step of the deprecated collectives that DeepSpeed calls
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # and of the pipeline's exchange of activations, whose gradients DeepSpeed sends back itself
    warnings.filterwarnings("ignore", message="c10d::broadcast_: an autograd kernel was not registered")
    keep_norms_on_the_device()
    if on_cpu:
        skip_extensions(deepspeed)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False, dist_init_required=False)
    return deepspeed
