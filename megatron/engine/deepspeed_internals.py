"""Everything that relies on attributes of DeepSpeed that are not a public interface.

No other file does. `pyproject.toml` pins DeepSpeed's minor version because of this one;
`tests/ranks/test_deepspeed_internals.py` checks each attribute against the installed version.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

_GATHERED_AT_ONCE = 1 << 20  # elements
# of ZeRO 1 and 2: the groups of parameters, the fp32 partitions, the 16-bit weights that all ranks' partitions make up
_FLAT_NAMES = {
    "DeepSpeedZeroOptimizer": ("bit16_groups", "single_partition_of_fp32_groups", "parallel_partitioned_bit16_groups"),
    "BF16_Optimizer": ("bf16_groups", "fp32_groups_flat_partition", "bf16_partitioned_groups"),
}
_LOSS_SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def is_tied_copy(parameter: nn.Parameter) -> bool:
    """Whether an earlier pipeline stage holds the same tied parameter."""
    return bool(getattr(parameter, "ds_pipe_replicated", False))


def zero_gradient_norm(optimizer: Any) -> Tensor | float:
    """The global gradient norm that a ZeRO optimizer computed for its latest step; inf after an overflow."""
    norm: Tensor | float = optimizer._global_grad_norm
    return norm


def disable_gradient_averaging(engine: Any) -> None:
    """Skip the all-reduce over replicas. Without ZeRO DeepSpeed runs it even when there is only one replica."""
    engine.enable_backward_allreduce = engine.pipeline_enable_backward_allreduce = False


def head_as_loss(pipeline: Any) -> None:
    """Call the last layer of a `PipelineModule` with the labels, as its loss function, and not in its forward pass."""
    pipeline.loss_fn = HeadLoss(pipeline.forward_funcs.pop())


@dataclass(frozen=True)
class HeadLoss:
    """The loss function of a pipeline. head: its last layer."""

    head: Callable[..., Any]

    def __call__(self, inputs: Any, targets: Any) -> Any:
        """The loss of the input of the head."""
        return self.head(inputs, targets=targets)


def layers_of_stage(pipeline: Any) -> tuple[range, list[Callable[..., Any]]]:
    """The numbers of a `PipelineModule`'s layers on this rank, and the layers, with the head in the last stage."""
    numbers = range(pipeline._local_start, pipeline._local_stop)
    head = [pipeline.loss_fn.head] if pipeline.loss_fn is not None else []
    return numbers, [*pipeline.forward_funcs, *head]


def keep_gradients_of_the_head(engine: Any) -> None:
    """Stop a pipeline's BF16_Optimizer from clearing the gradients of the head (`head_as_loss`).

    DeepSpeed clears 16-bit gradients when the gradient of the last stage's output is known. By then that of the head's
    weight is as well. Now they are cleared once they are added to the fp32 sums.
    """
    optimizer = engine.optimizer
    if type(optimizer).__name__ == "BF16_Optimizer":
        optimizer.backward_prologue = lambda: None
        optimizer.backward_epilogue = partial(optimizer.backward_epilogue, clear_lp_grads=True)


def wrap_instructions(engine: Any, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace each function of a pipeline's schedule by `wrap(name of its instruction, function)`."""
    engine._INSTRUCTION_MAP = {
        kind: wrap(kind.__name__, function) for kind, function in engine._INSTRUCTION_MAP.items()
    }


def sum_gradients_of_tied_weights(engine: Any) -> None:
    """Sum the gradients of a tied weight over the stages of a pipeline that hold it, wherever ZeRO 1 keeps them.

    DeepSpeed sums `grad`, which is empty where micro-batches are summed in another type than the weights': in bf16 with
    an offloaded optimizer, and in fp16, they are in `grad_accum`.
    """
    if not getattr(engine.optimizer, "use_grad_accum_attribute", False):
        return

    def reduce(_: Any) -> None:
        for weight, group in engine.module.get_tied_weights_and_groups():
            if weight.grad_accum is not None:
                dist.all_reduce(weight.grad_accum, group=group)

    wrap_instructions(engine, lambda name, function: reduce if name == "ReduceTiedGrads" else function)


def skip_extensions(deepspeed: Any) -> None:
    """Declare every C++ extension incompatible, so that none is compiled.

    On a CPU the shared-memory collectives would otherwise compile for a minute at the first start on each machine.
    """
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)


def keep_norms_on_the_device() -> None:
    """Stop the ZeRO optimizers from copying and reading gradient norms, for each of which the host waits.

    They replace a norm that is not finite by a constant from the host, and read on the host whether they did.
    `clipping.py` judges norms on the device instead.
    """
    from deepspeed.runtime import bf16_optimizer, utils
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module in (utils, stage_1_and_2):
        module.mask_nan_or_inf_with_val_inplace = lambda norm, device=None, val=-1.0: None
    for module in (bf16_optimizer, stage_1_and_2, stage3):
        module.is_invalid_grad_norm = lambda norm: False


def keep_loss_on_the_device(engine: Any) -> None:
    """Let a pipeline's stages receive the loss into new memory of the device, instead of a copy of zeros on the host.

    Its timers go as well: they keep two CUDA events for each step, which nothing reads.
    """
    from deepspeed.utils.timer import NoopTimer

    def loss_of_the_step() -> Tensor:
        """The mean over micro-batches and replicas, from the last stage."""
        loss = torch.empty((), device=engine.device)
        if engine.is_last_stage():
            loss.copy_(engine.total_loss / engine.gradient_accumulation_steps())
            if engine.is_data_parallel:
                dist.all_reduce(loss, group=engine.mpu.get_data_parallel_group())
                loss /= engine.dp_world_size
        dist.broadcast(loss, engine._loss_stage_global_rank(), group=engine.grid.get_pipe_parallel_group())
        return loss

    engine.timers, engine._aggregate_total_loss = NoopTimer(), loss_of_the_step


class LossScaler:
    """The dynamic loss scale of an fp16 optimizer; without state for any other optimizer or a static scale."""

    def __init__(self, optimizer: Any) -> None:
        scaler = getattr(optimizer, "loss_scaler", None)
        self._scaler = scaler if scaler is not None and scaler.dynamic else None
        if self._scaler is not None:  # it would raise at the lowest scale; the divergence hook decides that instead
            self._scaler.raise_error_at_min_scale = False

    @property
    def state(self) -> dict[str, float]:
        """What a checkpoint stores; empty without a dynamic scale."""
        return {name: getattr(self._scaler, name) for name in _LOSS_SCALE_FIELDS} if self._scaler else {}

    @state.setter
    def state(self, values: dict[str, float]) -> None:
        if self._scaler is not None:
            for name, value in values.items():
                setattr(self._scaler, name, value)


@dataclass(frozen=True)
class Location:
    """Where an optimizer keeps consecutive elements of a parameter: `flat[at : at + numel]` of a stepped tensor."""

    parameter: nn.Parameter
    start: int  # of the elements in this rank's tensor-parallel shard, flattened
    numel: int
    flat: Tensor
    at: int


def held_elements(parameter: nn.Parameter) -> tuple[int, Tensor, bool]:
    """What this rank holds of a weight that no optimizer steps, flattened: first element, elements, whether it is all.

    Under ZeRO 3 the partition of this rank, without its padding.
    """
    partition = getattr(parameter, "ds_tensor", None)
    if partition is None:
        return 0, parameter.detach().view(-1), True
    whole = cast(Any, parameter)
    start = partition.ds_numel * dist.get_rank(whole.ds_process_group)
    numel = max(0, min(partition.ds_numel, whole.ds_numel - start))
    return start, partition.detach().view(-1)[:numel], False


class Partitions(Protocol):
    """The tensors that an optimizer steps on this rank, and how they map to parameters."""

    def stepped(self) -> list[Tensor]:
        """Every tensor the inner optimizer steps."""
        ...

    def locations(self) -> Iterator[Location]:
        """One location for each parameter of which this rank keeps elements."""
        ...

    def push(self) -> None:
        """Copy the fp32 masters into the weights the model computes with. Collective."""
        ...


def zero_partitions(optimizer: Any, inner: Optimizer) -> Partitions:
    """The partitions of DeepSpeed's ZeRO optimizer around `inner`, whose state starts empty.

    Three classes exist:
        DeepSpeedZeroOptimizer          ZeRO 1 and 2                   one flat fp32 partition per group and data rank
        BF16_Optimizer                  ZeRO 1, bf16 summed in fp32    the same
        DeepSpeedZeroOptimizer_Stage3   ZeRO 3                         the same, and the parameters are partitioned too
    """
    _reset_inner_optimizer(optimizer, inner)
    return (
        _Stage3(optimizer) if type(optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3" else _Flat(optimizer, inner)
    )


def _reset_inner_optimizer(optimizer: Any, inner: Optimizer) -> None:
    """Undo what DeepSpeed does to an optimizer that creates its state when it is built.

    DeepSpeed rebuilds torch's Adagrad and loses its groups. All others are left with state for parameters that they do
    not step, and without state for those that they do.
    """
    if optimizer.optimizer is not inner:
        optimizer.optimizer = inner
        if type(optimizer).__name__ == "DeepSpeedZeroOptimizer":
            optimizer._link_all_hp_params()
    inner.state.clear()


class _Flat:
    """ZeRO 1 and 2: a flat fp32 partition for each parameter group."""

    def __init__(self, zero: Any, inner: Optimizer) -> None:
        self._zero, self._inner = zero, inner
        self._groups, self._masters, self._weights = _FLAT_NAMES[type(zero).__name__]

    def stepped(self) -> list[Tensor]:
        return [parameter for group in self._inner.param_groups for parameter in group["params"]]

    def locations(self) -> Iterator[Location]:
        for parameters, flat in zip(getattr(self._zero, self._groups), getattr(self._zero, self._masters), strict=True):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:  # None: another data rank holds all of it
                    shard, at = mapping.lp_fragment_address, mapping.hp_fragment_address.start
                    yield Location(parameter, shard.start, shard.numel, flat, at)

    def push(self) -> None:
        """As DeepSpeed's `update_lp_params`, in slices: gloo gathers into a copy of everything that is gathered."""
        groups = zip(
            getattr(self._zero, self._weights),
            getattr(self._zero, self._masters),
            self._zero.real_dp_process_group,
            strict=True,
        )
        for partitions, master, group in groups:
            mine = partitions[dist.get_rank(group)]
            mine.data.copy_(master.data)
            length = max(1, _GATHERED_AT_ONCE // len(partitions))
            for at in range(0, mine.numel() if len(partitions) > 1 else 0, length):
                slices = [partition.data[at : at + length] for partition in partitions]
                dist.all_gather(slices, mine.data[at : at + length], group)


class _Stage3:
    """ZeRO 3: partitioned parameters with a partitioned fp32 master each, in flat tensors."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def stepped(self) -> list[Tensor]:
        """Not from the inner optimizer's groups, which are empty between steps."""
        return list(self._zero.fp32_partitioned_groups_flat)

    def locations(self) -> Iterator[Location]:
        zero = self._zero
        for parameters in zero.fp16_groups:
            for parameter in parameters:
                group, at, partition = zero.grad_position[zero.get_param_id(parameter)]
                start = partition * dist.get_rank(group=zero._get_param_partition_group(parameter))
                numel = min(partition, parameter.ds_numel - start)  # the last partition is padded
                if numel > 0:
                    flat = zero.fp32_partitioned_groups_flat[group]
                    yield Location(parameter, start, numel, flat, at)

    def push(self) -> None:
        zero = self._zero
        groups = zip(
            zero.fp32_partitioned_groups_flat,
            zero.fp16_partitioned_groups_flat,
            zero.fp16_partitioned_groups,
            strict=True,
        )
        for master, flat, parameters in groups:
            flat.data.copy_(master.data)
            for parameter, new in zip(parameters, zero.unflatten(flat, parameters), strict=True):
                parameter.data = new.data
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.checkpoint_event_epilogue()
