"""Optimizer state as fragments of named parameters, the same for every optimizer that DeepSpeed wraps around ours.

Without ZeRO a parameter is its own master, or has an fp32 master (bf16, `master_weights.py`). The ZeRO optimizers are
read in `deepspeed_internals.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron.engine.deepspeed_internals import Location, LossScaler, Partitions, held_elements, zero_partitions
from megatron.engine.master_weights import MasterWeights
from megatron.optimizers.traits import OptimizerTraits
from megatron.parallel.initial_values import draw
from megatron.parallel.parameter import PlacedParameter

MASTER = "fp32"


@dataclass(frozen=True)
class Fragment:
    """`numel` consecutive elements of this rank's flattened shard of `parameter`, with all state kept for them."""

    parameter: nn.Parameter
    start: int
    numel: int
    tensors: dict[str, Tensor]  # "fp32" and the optimizer's moments: views [numel] of the live state
    replicated: bool = False  # over data-parallel ranks, even if other fragments are not


class ModuleState:
    """The weights of a module without an optimizer: what inference loads."""

    replicated_over_data = True

    def __init__(self, module: nn.Module) -> None:
        self._parameters = list(module.parameters())

    def fragments(self) -> list[Fragment]:
        """One fragment for each parameter, with its weight only."""
        return [Fragment(p, 0, p.numel(), {MASTER: p.detach().view(-1)}) for p in self._parameters]

    def finish_loading(self) -> None:
        """Do nothing: the views are the weights."""


def draw_initial_values(module: nn.Module, state: "ModuleState | OptimizerState") -> None:
    """Draw the weights of `module` into its `state`, as a checkpoint is loaded, if they have a seed. Collective."""
    if any(_is_drawn(parameter) for parameter in module.parameters()):
        fragments = [found for found in state.fragments() if _is_drawn(found.parameter)]
        draw((found.parameter, found.start, found.tensors[MASTER]) for found in fragments)
        state.finish_loading()


def _is_drawn(parameter: nn.Parameter) -> bool:
    return cast(PlacedParameter, parameter).seed is not None


class OptimizerState:
    """Masters, moments, step count and loss scale of a DeepSpeed engine's optimizer."""

    def __init__(
        self,
        optimizer: Any,
        inner: Optimizer,
        traits: OptimizerTraits,
        masters: MasterWeights | None = None,
        frozen: Sequence[nn.Parameter] = (),
    ) -> None:
        """optimizer: `engine.optimizer`. inner: the optimizer given to DeepSpeed, which may have wrapped it.

        masters: the tensors that `inner` steps instead of the weights. frozen: weights that it does not step.
        """
        self._inner, self._traits, self._frozen = inner, traits, frozen
        self.replicated_over_data = optimizer is inner  # no ZeRO: every data-parallel rank holds the same elements
        self._partitions: Partitions = (
            _Unsharded(inner, masters) if self.replicated_over_data else zero_partitions(optimizer, inner)
        )
        # torch's fused kernels leave new moments uninitialised when they skip a first update that is not finite
        self._create_missing_state()
        self._loss_scaler = LossScaler(optimizer)

    def locations(self) -> list[Location]:
        """Where the optimizer keeps each element that it steps on this rank."""
        return list(self._partitions.locations())

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the moments that the optimizer keeps."""
        return tuple(self._traits.moments)

    def fragments(self) -> list[Fragment]:
        """All state of this rank, as live views: writing to them changes the optimizer (see `finish_loading`).

        Of frozen parameters the weights in their own format.
        """
        self._create_missing_state()
        return [
            Fragment(found.parameter, found.start, found.numel, self._views(found))
            for found in self._partitions.locations()
        ] + [
            Fragment(parameter, start, elements.numel(), {MASTER: elements}, whole)
            for parameter in self._frozen
            for start, elements, whole in [held_elements(parameter)]
        ]

    def finish_loading(self) -> None:
        """Copy fp32 masters that were written through `fragments` into the model's weights. Collective."""
        self._partitions.push()

    @property
    def updates(self) -> int:
        """Optimizer updates made so far, skipped steps excluded; Adam's bias correction depends on it.

        One count is read, as all are equal: a fused optimizer keeps them on the device, where each read waits.
        """
        counts = (state[name] for state in self._inner.state.values() for name in self._traits.counters)
        return int(next(counts, 0))

    @updates.setter
    def updates(self, updates: int) -> None:
        self._create_missing_state()
        for state in self._inner.state.values():
            for name in self._traits.counters:
                state[name] = torch.full_like(state[name], updates) if self._traits.counts_in_tensors else updates

    @property
    def loss_scale(self) -> dict[str, float]:
        """State of the dynamic loss scale; empty without one."""
        return self._loss_scaler.state

    @loss_scale.setter
    def loss_scale(self, values: dict[str, float]) -> None:
        self._loss_scaler.state = values

    def _views(self, found: Location) -> dict[str, Tensor]:
        state = self._inner.state[found.flat]
        sources = {MASTER: found.flat} | {name: state[name] for name in self._traits.moments}
        return {name: source.detach().view(-1).narrow(0, found.at, found.numel) for name, source in sources.items()}

    def _create_missing_state(self) -> None:
        """Give a fresh optimizer the state it would create in its first step."""
        for flat in self._partitions.stepped():
            self._traits.fill(self._inner.state[flat], flat)


class _Unsharded:
    """Without ZeRO: the optimizer steps whole weights, or their fp32 masters."""

    def __init__(self, inner: Optimizer, masters: MasterWeights | None) -> None:
        self._inner, self._masters = inner, masters

    def stepped(self) -> list[Tensor]:
        return [parameter for group in self._inner.param_groups for parameter in group["params"]]

    def locations(self) -> Iterator[Location]:
        for stepped in self.stepped():
            weight = self._masters.weight_of(cast(nn.Parameter, stepped)) if self._masters else stepped
            yield Location(cast(nn.Parameter, weight), 0, weight.numel(), stepped, 0)

    def push(self) -> None:
        if self._masters:
            self._masters.push()
