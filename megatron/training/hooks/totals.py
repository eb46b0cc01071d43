"""Hook: what the run has read so far, and the memory it has taken."""

import resource
from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron.data.build import Sources
from megatron.parallel.grid import ParallelGrid
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, Run


class Totals(Hook):
    """Samples and tokens read, epochs of each corpus, and the peak of memory of the rank that has the highest."""

    def __init__(self, interval: int, epochs: Mapping[str, float], grid: ParallelGrid) -> None:
        """interval: in steps. epochs: those that one sample of the run adds, by corpus."""
        self._interval, self._epochs, self._grid = interval, epochs, grid

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """The totals if they are due. Collective over all ranks, in host memory."""
        if not step.is_due(self._interval):
            return NOTHING
        samples = step.state.consumed_samples
        epochs = {f"train/epochs/{name}" if name else "train/epochs": samples * of for name, of in self._epochs.items()}
        totals = {"train/samples": samples, "train/tokens": step.state.consumed_tokens}
        return totals | epochs | {"runtime/peak_memory_bytes": self._peak_memory()}

    def _peak_memory(self) -> int:
        """Bytes: what torch has allocated on a GPU at once, or the largest size of the process on a CPU."""
        device = self._grid.device
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        highest = torch.tensor(peak)
        if dist.get_world_size() > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self._grid.host_group)
        return int(highest)


def epochs_per_sample(sources: Sources) -> dict[str, float]:
    """What a sample of the run adds to the epochs of each corpus; the name is "" where only one is read."""
    corpora = sources.corpora.get("train")
    if corpora:
        return {corpus.name: corpus.weight / corpus.source.samples_per_epoch for corpus in corpora}
    return {"": 1 / sources.samples("train").samples_per_epoch}


def totals(run: Run) -> Totals:
    """Registry entry: in every run."""
    return Totals(run.config.logging.log_interval, epochs_per_sample(run.sources), run.engine.grid)
