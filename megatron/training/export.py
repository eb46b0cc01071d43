"""save_hf: write the trained model as Hugging Face has it, whatever the layout, when training ends."""

import logging
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron.checkpoint.chunks import LocalChunks, local_chunks
from megatron.checkpoint.converted import StoredWeight
from megatron.checkpoint.merge import merged_weights
from megatron.checkpoint.state import TrainState
from megatron.engine.optimizer_state import MASTER
from megatron.engine.training import TrainingEngine
from megatron.errors import RunError
from megatron.hugging_face.outgoing import Export, TrainedWeights, export_model
from megatron.training.hooks.base import Run

log = logging.getLogger(__name__)

_FINISHED, _FAILED = -1, -2  # in the place of a parameter's number


class GatheredWeights:
    """The weights of an engine, whole, on rank 0: it asks for one at a time, and their owners send their parts.

    Through host memory, so that no rank holds more than its part and rank 0 one parameter more.
    """

    def __init__(self, engine: TrainingEngine) -> None:
        """Collective."""
        state, grid = engine.state, engine.grid
        owned = local_chunks(state.fragments(), grid, owned_only=True, replicated_over_data=state.replicated_over_data)
        self._group = grid.host_group
        self._mine = {name: local for name, local in owned.items() if name.endswith(f"/{MASTER}")}
        layouts: list[dict[str, tuple[torch.Size, list[tuple[torch.Size, torch.Size]]]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(layouts, {name: _layout(local) for name, local in self._mine.items()}, self._group)
        self._layouts = layouts
        self._names = sorted({name for layout in layouts for name in layout})

    def weights(self) -> dict[str, StoredWeight]:
        """On rank 0: the parameters by global name. Reading one needs the other ranks in `serve`."""
        shapes = {name: shape for layout in self._layouts for name, (shape, _) in layout.items()}
        return {
            name.removesuffix(f"/{MASTER}"): StoredWeight(shapes[name], partial(self._read, number))
            for number, name in enumerate(self._names)
        }

    def serve(self) -> None:
        """On the other ranks: send what rank 0 asks for, until it ends. Raises RunError if it failed."""
        while (number := self._announce(0)) >= 0:
            if (local := self._mine.get(self._names[number])) is not None:
                for chunk in local.chunks.values():
                    dist.send(chunk.detach().float().cpu().contiguous(), 0, self._group)  # frozen ones may be bf16
        if number == _FAILED:
            raise RunError("rank 0 could not write save_hf")

    def end(self, failed: bool) -> None:
        """On rank 0: let the other ranks go on."""
        self._announce(_FAILED if failed else _FINISHED)

    def _announce(self, number: int) -> int:
        told = torch.tensor(number)
        dist.broadcast(told, 0, self._group)
        return int(told)

    def _read(self, number: int) -> torch.Tensor:
        self._announce(number)
        name = self._names[number]
        whole = torch.empty(next(layout[name][0] for layout in self._layouts if name in layout))
        for rank, layout in enumerate(self._layouts):
            chunks = self._mine[name].chunks if rank == 0 and name in self._mine else {}
            for offsets, sizes in layout[name][1] if name in layout else ():
                target = whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
                if rank == 0:
                    target.copy_(chunks[offsets])
                else:
                    received = torch.empty(sizes)
                    dist.recv(received, rank, self._group)
                    target.copy_(received)
        return whole


def export_at_end(run: Run, export: Export, state: TrainState) -> None:
    """Write `save_hf`. Collective. Raises RunError on every rank if that fails."""
    run.liveness.begin("saving")
    gathered = GatheredWeights(run.engine)
    if dist.get_rank() != 0:
        gathered.serve()
        return
    failed = True
    try:
        weights, keys = gathered.weights(), run.config.to_flat(with_defaults=True)
        if run.plan.model.lora is not None:
            weights = merged_weights(weights, weights, run.plan.model)
        trained = TrainedWeights(export.model, weights, run.tokenizer, keys, state)
        export_model(trained, export, Path(str(run.config.checkpoint.save_hf)), tell=log.info)
        failed = False
    finally:
        gathered.end(failed)


def _layout(local: LocalChunks) -> tuple[torch.Size, list[tuple[torch.Size, torch.Size]]]:
    """The shape of the whole parameter, and offsets and sizes of the chunks."""
    return local.size(), [(offsets, chunk.size()) for offsets, chunk in local.chunks.items()]
