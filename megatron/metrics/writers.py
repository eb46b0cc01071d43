"""Where metrics go: a JSON Lines file, tensorboard, Weights & Biases.

Each writer is one entry of the registry's kind "metric_writer": a function of `WriterSettings` that returns a writer,
or None where nobody asked for it. Only the first rank opens writers.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron import registry
from megatron.config.schema.run_keys import LoggingKeys

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricWriter(Protocol):
    """Takes the metrics of one step after another."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` as those of `step`, the number of steps done; called at most once for a step."""

    def close(self) -> None:
        """Bring everything to its place."""


@dataclass(frozen=True)
class WriterSettings:
    """What writers need to know of a run."""

    logging: LoggingKeys
    folder: Path | None  # of metrics.jsonl; None: the run writes no files
    first_step: int  # steps done before this run: 0, or what was resumed
    config: Mapping[str, Any]  # as the user wrote it, for the record


class MetricWriters:
    """Several writers as one."""

    def __init__(self, writers: Sequence[MetricWriter]) -> None:
        """Take over `writers`; `close` closes them."""
        self._writers = writers

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand `values` to each writer; empty values are no record."""
        for writer in self._writers if values else []:
            writer.write(step, values)

    def close(self) -> None:
        """Close all, also where one of them fails."""
        with ExitStack() as closing:
            for writer in self._writers:
                closing.callback(writer.close)


def open_writers(settings: WriterSettings) -> MetricWriters:
    """All writers that the configuration asks for, out of those that the registry knows."""
    opened = [registry.resolve("metric_writer", name)(settings) for name in registry.names("metric_writer")]
    return MetricWriters([writer for writer in opened if writer is not None])


class JsonLines:
    """One object per logged step: {"step": 11, "train/lm_loss": 3.2, ...}. NaN and infinities stand as null."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Open `path` for appending; what an earlier run wrote beyond `first_step` is set aside, not lost."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _set_later_steps_aside(path, first_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line, and flush it: the file is whole at any moment."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step} | finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Tensorboard:
    """Event files for tensorboard."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open event files in `folder`; tensorboard hides what an earlier run wrote beyond `first_step`."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one scalar per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases; without an API key a local one, which `wandb sync` uploads later."""

    def __init__(self, settings: WriterSettings) -> None:
        """Start the run. The WANDB_* variables of the environment keep their meaning."""
        import wandb

        chosen = settings.logging
        if chosen.wandb_host is not None:
            os.environ.setdefault("WANDB_BASE_URL", chosen.wandb_host)
        offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False)
        if offline:
            log.info("wandb: no API key found, so the run is recorded locally; `wandb sync` uploads it later")
        self._run = wandb.init(
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
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def json_lines(settings: WriterSettings) -> JsonLines | None:
    """Registry entry: always, where the run writes files at all."""
    return JsonLines(settings.folder / METRICS_FILE, settings.first_step) if settings.folder else None


def tensorboard(settings: WriterSettings) -> Tensorboard | None:
    """Registry entry: with `tensorboard_dir`."""
    folder = settings.logging.tensorboard_dir
    return Tensorboard(Path(folder), settings.first_step) if folder else None


def weights_and_biases(settings: WriterSettings) -> WeightsAndBiases | None:
    """Registry entry: with `use_wandb`."""
    return WeightsAndBiases(settings) if settings.logging.use_wandb else None


def _set_later_steps_aside(path: Path, first_step: int) -> None:
    """Where `path` holds steps that will be trained again, keep it under a free name and go on without them."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first_step]
    if len(kept) == len(lines):
        return
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    path.write_text("".join(kept), encoding="utf-8")
    log.info("%s goes on from step %d; what it held before is in %s", path, first_step, aside.name)
