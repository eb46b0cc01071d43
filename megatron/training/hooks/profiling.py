"""Hook: record chosen steps with torch's profiler, and their memory (`profile`, `memory_profiling`)."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from megatron.config.schema.config import Config
from megatron.errors import RunError
from megatron.files import replaced_when_complete
from megatron.training.clock import Clock
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, MicroBatches, Run
from megatron.training.hooks.profile_tables import kernel_table, memory_table
from megatron.training.liveness import Liveness

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProfileRequest:
    """Which steps to record, and the folders of traces and memory profiles (None: not recorded)."""

    steps: range  # numbers of steps, counted from 0
    trace: Path | None
    memory: Path | None

    @classmethod
    def of(cls, config: Config) -> "ProfileRequest":
        """As configured."""
        keys = config.profiling
        folder = Path(config.log_folder or ".", "profile")
        memory = Path(keys.memory_profiling_path) if keys.memory_profiling_path else folder
        steps = range(keys.profile_step_start, keys.profile_step_stop)
        return cls(steps, folder if keys.profile else None, memory if keys.memory_profiling else None)

    @property
    def folders(self) -> list[Path]:
        """The folders that will be written to."""
        return [folder for folder in (self.trace, self.memory) if folder is not None]


class Recording:
    """Records a rank between `start` and `stop`, and writes the files. The numerics stay the same."""

    def __init__(self, request: ProfileRequest, device: torch.device, rank: int) -> None:
        self._request, self._rank, self._on_gpu = request, rank, device.type == "cuda"
        self._snapshot = request.memory is not None and self._on_gpu
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        counts = request.memory is not None and not self._on_gpu
        self._profiler = (
            profile(activities=activities, record_shapes=True, profile_memory=counts)
            if request.trace is not None or counts
            else None
        )

    def warm_up(self) -> None:
        """Set the profiler up in advance, which takes seconds on a GPU."""
        if self._profiler is not None:
            self._profiler.prepare_trace()

    def start(self) -> None:
        """Start recording."""
        if self._snapshot:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.memory._record_memory_history()
        if self._profiler is not None:
            self._profiler.start_trace()

    def stop(self, steps: str) -> tuple[list[Path], list[str]]:
        """Stop recording and write. Returns the files of this rank, and the text of its tables.

        steps: the recorded steps, in words. Raises RunError if a file cannot be written.
        """
        if self._profiler is not None:
            self._profiler.stop_trace()
        try:
            return self._write(steps)
        except (OSError, RuntimeError) as error:
            raise RunError(f"the profile of {steps} cannot be written: {error}") from error
        finally:
            if self._snapshot:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, steps: str) -> tuple[list[Path], list[str]]:
        files, tables = [], []
        profiler, trace, memory, rank = self._profiler, self._request.trace, self._request.memory, self._rank
        head = f"{steps} on rank {rank}"
        if trace is not None and profiler is not None:
            files.append(_complete(trace / f"trace_rank_{rank}.json", profiler.export_chrome_trace))
            tables.append(f"{head}: {kernel_table(profiler, self._on_gpu)}")
            files.append(_complete(trace / f"kernels_rank_{rank}.txt", _text(tables[-1])))
        if memory is not None and self._snapshot:
            files.append(_complete(memory / f"memory_rank_{rank}.pickle", torch.cuda.memory._dump_snapshot))
            tables.append(f"{head}: at most {torch.cuda.max_memory_allocated() / 1e6:,.1f} MB were allocated")
        elif memory is not None and profiler is not None:
            tables.append(f"{head}: {memory_table(profiler)}")
            files.append(_complete(memory / f"memory_rank_{rank}.txt", _text(tables[-1])))
        return files, tables


class Profiling(Hook):
    """Records the requested steps of the run; if it ends during them, for whatever reason, writes what there is."""

    def __init__(
        self, recording: Recording, steps: range, done: int, clock: Clock, liveness: Liveness | None = None
    ) -> None:
        """steps: numbers of the steps to record, counted from 0. done: steps before this run."""
        self._recording, self._steps, self._done = recording, steps, done
        self._clock, self._liveness = clock, liveness or Liveness()
        self._warm = self._running = False
        self._begin = done
        self._step: record_function | None = None

    def watched(self, batches: Iterator[MicroBatches]) -> Iterator[MicroBatches]:
        """Start recording before the first requested step loads its batch."""
        while True:
            self._before_step()
            yield next(batches)

    def _before_step(self) -> None:
        begins = self._done in self._steps and not self._running
        if not self._warm and (begins or self._done + 1 == self._steps.start):
            with self._clock.paused():
                self._recording.warm_up()
            self._warm = True
        if begins:
            self._recording.start()
            self._begin, self._running = self._done, True
        if self._running:
            self._step = record_function(f"step {self._done + 1}")
            self._step.__enter__()

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Stop recording when it is due, before the other hooks are called."""
        self._done = step.state.step
        self._end_step()
        if self._running and (step.is_last or self._done == self._steps.stop):
            with self._clock.paused():
                self._write()
        return NOTHING

    def close(self) -> None:
        """Write what was recorded of a run that failed: the snapshot shows what filled the memory."""
        self._end_step()
        if self._running:
            try:
                self._write()
            except (RunError, RuntimeError) as error:  # must not hide the failure of the run
                log.warning("the profile is not written: %s", error)

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _write(self) -> None:
        self._running = False
        self._liveness.begin("writing the profile")
        files, tables = self._recording.stop(_in_words(range(self._begin, max(self._done, self._begin + 1))))
        for table in tables:
            log.info("%s", table)
        log.info("profile of this rank, next to those of the others: %s", ", ".join(map(str, files)))


def profiling(run: Run) -> Profiling | None:
    """Registry entry: with `profile` or `memory_profiling`, if the run includes one of the steps."""
    request = ProfileRequest.of(run.config)
    if not request.folders:
        return None
    steps = range(max(request.steps.start, run.first_step), min(request.steps.stop, run.last_step))
    if not steps:
        log.info(
            "nothing is profiled: this run has %s, and profile_step_start and profile_step_stop name %s",
            _in_words(range(run.first_step, run.last_step)), _in_words(request.steps),
        )  # fmt: skip
        return None
    recording = Recording(request, run.engine.grid.device, dist.get_rank())
    return Profiling(recording, steps, run.first_step, run.clock, run.liveness)


def _in_words(steps: range) -> str:
    """As the log counts them, from 1."""
    return f"steps {steps.start + 1} to {steps.stop}" if len(steps) != 1 else f"step {steps.stop}"


def _complete(path: Path, write: Callable[[str], object]) -> Path:
    """Let `write`, a function of a path, make the file, which gets its name when it is complete."""
    with replaced_when_complete(path, "wb") as partial:
        write(partial.name)
    return path


def _text(content: str) -> Callable[[str], object]:
    return lambda path: Path(path).write_text(content + "\n", encoding="utf-8")
