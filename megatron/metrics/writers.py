"""Writers of metrics: a JSON Lines file, TensorBoard, Weights & Biases.

Each writer is an entry of the registry's kind "metric_writer": a function of `WriterSettings` that returns a writer, or
None if the configuration does not ask for it. Only rank 0 opens writers.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron import registry
from megatron.config.schema.run_keys import LoggingKeys
from megatron.errors import RunError, UserError
from megatron.files import replaced_when_complete

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricWriter(Protocol):
    """Records the metrics of one step after another."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` for `step`, the number of steps done; called at most once per step. May raise RunError."""

    def close(self) -> None:
        """Flush and close."""


@dataclass(frozen=True)
class WriterSettings:
    """What writers need of a run."""

    logging: LoggingKeys
    folder: Path | None  # of metrics.jsonl; None: the run writes no files
    first_step: int  # steps done before this run; 0 unless it resumes
    config: Mapping[str, Any]  # as the user wrote it, to be recorded


class MetricWriters:
    """Several writers as one."""

    def __init__(self, writers: Sequence[MetricWriter]) -> None:
        """Take over `writers`; `close` closes them."""
        self._writers = writers

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Pass `values` to each writer, unless they are empty."""
        for writer in self._writers if values else []:
            writer.write(step, values)

    def close(self) -> None:
        """Close all, even if one of them fails."""
        with ExitStack() as closing:
            for writer in self._writers:
                closing.callback(writer.close)


def open_writers(settings: WriterSettings) -> MetricWriters:
    """The writers of the registry that the configuration asks for. Raises UserError where one cannot be opened."""
    opened = [registry.resolve("metric_writer", name)(settings) for name in registry.names("metric_writer")]
    return MetricWriters([writer for writer in opened if writer is not None])


class JsonLines:
    """One object per logged step: {"step": 11, "train/lm_loss": 3.2, ...}. NaN and infinity become null."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Open `path` for appending; an earlier run's steps beyond `first_step` are moved to another file."""
        self._path = path
        with _failures_as(UserError, f"log_dir: {path} cannot be written", OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            _set_later_steps_aside(path, first_step)
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line and flush it, so that the file is complete at any moment."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with _failures_as(RunError, f"{self._path} cannot be written", OSError):
            self._file.write(json.dumps({"step": step} | finite) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # every line was flushed, or `write` has raised already
            self._file.close()


class Tensorboard:
    """Event files for TensorBoard."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open event files in `folder`; TensorBoard hides an earlier run's steps beyond `first_step`."""
        self._folder = folder
        with _failures_as(UserError, f"tensorboard_dir ({folder}) cannot be written", OSError, ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one scalar per value."""
        with _failures_as(RunError, f"tensorboard_dir ({self._folder}) cannot be written", OSError):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        with _failures_as(RunError, f"tensorboard_dir ({self._folder}) cannot be written", OSError):
            self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases; without an API key a local one, to be uploaded with `wandb sync`."""

    def __init__(self, settings: WriterSettings) -> None:
        """Start the run. The WANDB_* environment variables keep their meaning."""
        way_out = "WANDB_MODE=offline records the run locally, use_wandb=false turns it off"
        with _failures_as(UserError, f"use_wandb: the run cannot be started at Weights & Biases ({way_out})"):
            self._run = self._started(settings)

    def _started(self, settings: WriterSettings) -> Any:
        import wandb

        chosen = settings.logging
        if chosen.wandb_host is not None:
            os.environ.setdefault("WANDB_BASE_URL", chosen.wandb_host)
        offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False)
        if offline:
            log.info("wandb: no API key found, so the run is recorded locally; `wandb sync` uploads it later")
        return wandb.init(
            project=chosen.wandb_project,
            group=chosen.wandb_group,
            name=chosen.wandb_run_name,
            entity=chosen.wandb_team,
            dir=settings.folder,
            config=dict(settings.config),
            mode="offline" if offline else None,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log all values of the step together."""
        with _failures_as(RunError, f"Weights & Biases does not take the metrics of step {step}"):
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        with _failures_as(RunError, "the run at Weights & Biases cannot be finished"):
            self._run.finish()


def json_lines(settings: WriterSettings) -> JsonLines | None:
    """Registry entry: whenever the run writes files."""
    return JsonLines(settings.folder / METRICS_FILE, settings.first_step) if settings.folder else None


def tensorboard(settings: WriterSettings) -> Tensorboard | None:
    """Registry entry: with `tensorboard_dir`."""
    folder = settings.logging.tensorboard_dir
    return Tensorboard(Path(folder), settings.first_step) if folder else None


def weights_and_biases(settings: WriterSettings) -> WeightsAndBiases | None:
    """Registry entry: with `use_wandb`."""
    return WeightsAndBiases(settings) if settings.logging.use_wandb else None


@contextmanager
def _failures_as(kind: type[UserError | RunError], what: str, *caught: type[Exception]) -> Iterator[None]:
    """Raise `kind`, with `what` failed and why, for exceptions of the types `caught` (default: all)."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError | RunError) or (caught and not isinstance(error, caught)):
            raise
        if isinstance(error, ModuleNotFoundError):
            reason = f'the package {error.name} is not installed; `pip install -e ".[logging]"` installs it'
        else:
            reason = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
        raise kind(f"{what}: {reason}") from error


def _set_later_steps_aside(path: Path, first_step: int) -> None:
    """If `path` holds steps that will be trained again, or other lines, rename it and keep the earlier steps only."""
    if not path.is_file():  # a device or a pipe has no earlier steps
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (step := _step_of(line)) is not None and step <= first_step]
    if len(kept) == len(lines):
        return
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    with replaced_when_complete(path, "wb") as file:
        file.write(b"".join(kept))
    log.info("%s continues from step %d; its previous content is in %s", path, first_step, aside.name)


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics; None for what a crash left of one, and for lines of other programs."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) and line.endswith(b"\n") else None
