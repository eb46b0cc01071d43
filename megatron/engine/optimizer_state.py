"""Every optimizer DeepSpeed may wrap around ours, seen alike: runs of elements of named parameters.

The only file that reads attributes of DeepSpeed which are no public interface; `pyproject.toml` therefore
pins its minor version, and the tests cover each class below. Four cases exist:

    torch optimizer                 without ZeRO             the parameter is its own master, or has one (bf16)
    DeepSpeedZeroOptimizer          ZeRO 1 and 2             one flat fp32 partition per group and data rank
    BF16_Optimizer                  ZeRO 1, bf16 summed      the same
                                    in fp32
    DeepSpeedZeroOptimizer_Stage3   ZeRO 3                   the same, and the parameters are partitioned too
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron.engine.master_weights import MasterWeights
from megatron.optimizers.traits import OptimizerTraits

MASTER = "fp32"
_GATHERED_AT_ONCE = 1 << 20  # elements


@dataclass(frozen=True)
class Run:
    """`numel` consecutive elements of this rank's (flattened) shard of `parameter`, and all state kept for them."""

    parameter: nn.Parameter
    shape: tuple[int, ...]  # of this rank's tensor-parallel shard
    start: int
    numel: int
    tensors: dict[str, Tensor]  # "fp32" and the optimizer's moments: views [numel] of the live state


@dataclass(frozen=True)
class _Place:
    """Where a run lies: `flat[at : at + numel]`, `flat` being a tensor that the inner optimizer steps."""

    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: Tensor
    at: int


class ModuleState:
    """The weights of a module without an optimizer: what inference loads."""

    replicated_over_data = True

    def __init__(self, module: nn.Module) -> None:
        self._parameters = list(module.parameters())

    def runs(self) -> list[Run]:
        """One run for each parameter, with its weight only."""
        return [Run(p, tuple(p.shape), 0, p.numel(), {MASTER: p.detach().view(-1)}) for p in self._parameters]

    def finish_loading(self) -> None:
        """Nothing to do: the views are the weights."""


class OptimizerState:
    """Masters, moments, step count and loss scale of a DeepSpeed engine's optimizer."""

    def __init__(
        self, optimizer: Any, inner: Optimizer, traits: OptimizerTraits, masters: MasterWeights | None = None
    ) -> None:
        """optimizer: `engine.optimizer`. inner: the optimizer that DeepSpeed was given; it may have wrapped it.

        masters: what `inner` steps in the place of the weights.
        """
        self._optimizer, self._inner, self._traits, self._masters = optimizer, inner, traits, masters
        self._kind = type(optimizer).__name__
        if not self.replicated_over_data:
            self._keep_inner_optimizer()
        # torch's fused kernels leave a first update that is not finite out, and their new moments uninitialised
        self._create_missing_state()
        if self.loss_scale:  # it would end the run by itself; when enough is enough, a hook of the training says
            optimizer.loss_scaler.raise_error_at_min_scale = False

    @property
    def replicated_over_data(self) -> bool:
        """Whether every data-parallel rank holds the same elements (no ZeRO) or each its own."""
        return self._optimizer is self._inner

    def runs(self) -> list[Run]:
        """All state of this rank, as live views: writing to them changes the optimizer (see `finish_loading`)."""
        self._create_missing_state()
        return [
            Run(place.parameter, place.shape, place.start, place.numel, self._views(place)) for place in self._places()
        ]

    def finish_loading(self) -> None:
        """Carry fp32 masters that were written through `runs` into the weights the model computes with. Collective."""
        if self._kind in _FLAT:
            self._push_stage_1_and_2()
        elif self._kind == "DeepSpeedZeroOptimizer_Stage3":
            self._push_stage_3()
        elif self._masters:
            self._masters.push()

    @property
    def updates(self) -> int:
        """Optimizer updates made so far (skipped steps do not count): Adam's bias correction depends on it."""
        counts = [int(state[name]) for state in self._inner.state.values() for name in self._traits.counters]
        return counts[0] if counts else 0

    @updates.setter
    def updates(self, updates: int) -> None:
        self._create_missing_state()
        for state in self._inner.state.values():
            for name in self._traits.counters:
                state[name] = torch.full_like(state[name], updates) if self._traits.counts_in_tensors else updates

    @property
    def loss_scale(self) -> dict[str, float]:
        """State of the dynamic loss scale; empty when there is none."""
        scaler = getattr(self._optimizer, "loss_scaler", None)
        if scaler is None or not scaler.dynamic:
            return {}
        return {name: getattr(scaler, name) for name in _LOSS_SCALE_FIELDS}

    @loss_scale.setter
    def loss_scale(self, values: dict[str, float]) -> None:
        scaler = getattr(self._optimizer, "loss_scaler", None)
        if scaler is not None and scaler.dynamic:
            for name, value in values.items():
                setattr(scaler, name, value)

    def _views(self, place: _Place) -> dict[str, Tensor]:
        state = self._inner.state[place.flat]
        sources = {MASTER: place.flat} | {name: state[name] for name in self._traits.moments}
        return {name: source.detach().view(-1).narrow(0, place.at, place.numel) for name, source in sources.items()}

    def _places(self) -> Iterator[_Place]:
        if self._kind in _FLAT:
            return self._places_stage_1_and_2()
        if self._kind == "DeepSpeedZeroOptimizer_Stage3":
            return self._places_stage_3()
        return self._places_unsharded()

    def _places_unsharded(self) -> Iterator[_Place]:
        for stepped in self._stepped():
            assert isinstance(stepped, nn.Parameter)
            weight = self._masters.weight_of(stepped) if self._masters else stepped
            yield _Place(weight, tuple(weight.shape), 0, weight.numel(), stepped, 0)

    def _places_stage_1_and_2(self) -> Iterator[_Place]:
        groups, flats = (getattr(self._optimizer, name) for name in _FLAT[self._kind][:2])
        for parameters, flat in zip(groups, flats, strict=True):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:  # None: another data rank holds all of it
                    piece = mapping.lp_fragment_address
                    at = mapping.hp_fragment_address.start
                    yield _Place(parameter, tuple(parameter.shape), piece.start, piece.numel, flat, at)

    def _places_stage_3(self) -> Iterator[_Place]:
        zero = self._optimizer
        for parameters in zero.fp16_groups:
            for parameter in parameters:
                group, at, partition = zero.grad_position[zero.get_param_id(parameter)]
                start = partition * dist.get_rank(group=zero._get_param_partition_group(parameter))
                numel = min(partition, parameter.ds_numel - start)  # the last partition is padded
                if numel > 0:
                    flat = zero.fp32_partitioned_groups_flat[group]
                    yield _Place(parameter, tuple(parameter.ds_shape), start, numel, flat, at)

    def _stepped(self) -> list[Tensor]:
        """Every tensor the inner optimizer steps; ZeRO 3 takes them out of its groups between steps."""
        if self._kind == "DeepSpeedZeroOptimizer_Stage3":
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return [parameter for group in self._inner.param_groups for parameter in group["params"]]

    def _create_missing_state(self) -> None:
        """Give a fresh optimizer the state it would create in its first step."""
        for flat in self._stepped():
            self._traits.fill(self._inner.state[flat], flat)

    def _keep_inner_optimizer(self) -> None:
        """Undo what DeepSpeed does to an optimizer that makes its state when it is built.

        It builds torch's Adagrad anew, and loses its groups. It leaves all others with state for parameters that they
        do not step, and without any for those that they do.
        """
        if self._optimizer.optimizer is not self._inner:
            self._optimizer.optimizer = self._inner
            if self._kind == "DeepSpeedZeroOptimizer":
                self._optimizer._link_all_hp_params()
        self._inner.state.clear()

    def _push_stage_1_and_2(self) -> None:
        """What DeepSpeed's `update_lp_params` does, in pieces: gloo gathers into a copy of all that is gathered."""
        zero = self._optimizer
        groups = zip(
            getattr(zero, _FLAT[self._kind][2]),
            getattr(zero, _FLAT[self._kind][1]),
            zero.real_dp_process_group,
            strict=True,
        )
        for partitions, master, group in groups:
            mine = partitions[dist.get_rank(group)]
            mine.data.copy_(master.data)
            length = max(1, _GATHERED_AT_ONCE // len(partitions))
            for at in range(0, mine.numel() if len(partitions) > 1 else 0, length):
                pieces = [partition.data[at : at + length] for partition in partitions]
                dist.all_gather(pieces, mine.data[at : at + length], group)

    def _push_stage_3(self) -> None:
        zero = self._optimizer
        groups = zip(
            zero.fp32_partitioned_groups_flat,
            zero.fp16_partitioned_groups_flat,
            zero.fp16_partitioned_groups,
            strict=True,
        )
        for master, flat, parts in groups:
            flat.data.copy_(master.data)
            for part, new in zip(parts, zero.unflatten(flat, parts), strict=True):
                part.data = new.data
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.checkpoint_event_epilogue()


# optimizers with a flat fp32 partition for each group: their names for the groups of parameters, for the partitions,
# and for the 16-bit weights that all ranks' partitions make up
_FLAT = {
    "DeepSpeedZeroOptimizer": (
        "bit16_groups",
        "single_partition_of_fp32_groups",
        "parallel_partitioned_bit16_groups",
    ),
    "BF16_Optimizer": ("bf16_groups", "fp32_groups_flat_partition", "bf16_partitioned_groups"),
}
_LOSS_SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
