"""Writers to services that keep and show metrics: Weights & Biases, MLflow, Comet, Trackio.

Each has a thread of its own, in which its package is imported and the service is reached. Only that a package is
missing is said before the run; a service that does not answer, or refuses the key, is retried.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from megatron.errors import UserError
from megatron.metrics.writers import MetricWriter, WriterSettings

log = logging.getLogger(__name__)

MLFLOW_PARAMETERS = 100  # of a request
MLFLOW_METRICS = 1000


class _Service(MetricWriter):
    """A service behind a Python package. run: its object for this run, while it is open."""

    in_background = True
    key = package = extra = ""
    _id: str | None = None  # by which the service knows the run, which goes on there after a failure

    def __init__(self, settings: WriterSettings) -> None:
        """Raises UserError without the package."""
        self.settings, self.chosen = settings, settings.logging
        self.run: Any = None
        if find_spec(self.package) is None:
            raise UserError(
                f"{self.key} (true) needs the package {self.package}, which is not installed; "
                f"`pip install 'deepy[{self.extra}]'` installs it, {self.key}=false does without"
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log all values of the step together; the library buffers and sends them."""
        self.run.log(dict(values), step=step)

    def go_back(self, step: int) -> None:
        """End the run and go on in another, as after a resume: a service keeps the first value of a step, or both."""
        self.close()
        self._id = None

    def close(self) -> None:
        """End the run, if it is open."""
        if self.run is not None:
            run, self.run = self.run, None
            self.end(run)

    def end(self, run: Any) -> None:
        """Tell the service that `run` has ended."""
        run.finish()


class WeightsAndBiases(_Service):
    """A run at Weights & Biases; without an API key a local one, to be uploaded with `wandb sync`."""

    key, package, extra = "use_wandb", "wandb", "logging"

    def open(self) -> None:
        """Start the run. The WANDB_* environment variables keep their meaning."""
        import wandb

        chosen = self.chosen
        if chosen.wandb_host is not None:
            os.environ.setdefault("WANDB_BASE_URL", chosen.wandb_host)
        offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False)
        if offline:
            log.info("wandb: no API key found, so the run is recorded locally; `wandb sync` uploads it later")
        self.run = wandb.init(
            project=chosen.wandb_project,
            group=chosen.wandb_group,
            name=chosen.wandb_run_name,
            entity=chosen.wandb_team,
            dir=self.settings.folder,
            config=dict(self.settings.config),
            mode="offline" if offline else None,
            id=self._id,
            resume="allow" if self._id else None,
        )
        self._id = self.run.id


class MLflow(_Service):
    """A run of an experiment at an MLflow tracking server, or in its files."""

    key, package, extra = "use_mlflow", "mlflow", "trackers"
    _has_parameters: str | None = None  # the id of the run that has them

    def open(self) -> None:
        """Create the run, with the configuration as parameters. The MLFLOW_* environment variables keep their meaning.

        One attempt for each request, because this writer is retried as a whole.
        """
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.run = MlflowClient(self.chosen.mlflow_tracking_uri)
        if self._id is None:
            name = self.chosen.mlflow_experiment
            found = self.run.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self.run.create_experiment(name)
            self._id = self.run.create_run(experiment, run_name=self.chosen.mlflow_run_name).info.run_id
        if self._has_parameters != self._id:
            parameters = [Param(key, str(value)) for key, value in self.settings.config.items()]
            for part in _parts(parameters, MLFLOW_PARAMETERS):
                self.run.log_batch(self._id, params=part)
            self._has_parameters = self._id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log all values of the step. Characters that MLflow has no room for in a name become "_"."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_mlflow_name(name), value, now, step) for name, value in values.items()]
        for part in _parts(metrics, MLFLOW_METRICS):
            self.run.log_batch(self._id, metrics=part)

    def end(self, run: Any) -> None:
        """Say that the run has ended; a run that is continued afterwards says so again. run: the client."""
        if self._id is not None:
            run.set_terminated(self._id)


class Comet(_Service):
    """An experiment at Comet; without an API key an archive in the log folder, to be uploaded with `comet upload`."""

    key, package, extra = "use_comet", "comet_ml", "trackers"

    def open(self) -> None:
        """Start the experiment. The COMET_* environment variables and ~/.comet.config keep their meaning."""
        import comet_ml
        from comet_ml.config import get_config

        chosen, folder = self.chosen, self.settings.folder
        online = bool(get_config("comet.api_key"))
        if not online and self._id is None:
            log.info("comet: no API key found, so the run is recorded locally; `comet upload` uploads it later")
        settings = comet_ml.ExperimentConfig(
            name=chosen.comet_experiment_name,
            tags=list(chosen.comet_tags),
            offline_directory=str(folder / "comet") if folder else None,
            auto_output_logging=False,
            auto_metric_logging=False,
            auto_param_logging=False,
            auto_log_co2=False,
            log_code=False,
            log_graph=False,
            log_git_patch=False,
            log_env_network=False,
            parse_args=False,
            display_summary_level=0,
        )
        self.run = comet_ml.start(
            workspace=chosen.comet_workspace,
            project_name=chosen.comet_project,
            online=online,
            mode="create" if self._id is None else "get_or_create",
            experiment_key=self._id,
            experiment_config=settings,
        )
        if not self.run.alive:
            raise ConnectionError("Comet does not take the experiment; its own messages say why")
        if self._id is None:
            self.run.log_parameters(dict(self.settings.config))
            self.run.log_others(dict(chosen.comet_others or {}))
        self._id = self.run.id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log all values of the step; the library buffers and sends them."""
        self.run.log_metrics(dict(values), step=step)

    def end(self, run: Any) -> None:
        """End the experiment."""
        run.end()


class Trackio(_Service):
    """A run of Trackio: in its local database, or in a Space of Hugging Face."""

    key, package, extra = "use_trackio", "trackio", "trackers"

    def open(self) -> None:
        """Start the run. The TRACKIO_* environment variables keep their meaning."""
        import trackio

        chosen = self.chosen
        self.run = trackio.init(
            chosen.trackio_project,
            name=self._id or chosen.trackio_run_name,
            space_id=chosen.trackio_space_id,
            config=dict(self.settings.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._id = self.run.name


def weights_and_biases(settings: WriterSettings) -> WeightsAndBiases | None:
    """Registry entry: with `use_wandb`."""
    return WeightsAndBiases(settings) if settings.logging.use_wandb else None


def mlflow(settings: WriterSettings) -> MLflow | None:
    """Registry entry: with `use_mlflow`."""
    return MLflow(settings) if settings.logging.use_mlflow else None


def comet(settings: WriterSettings) -> Comet | None:
    """Registry entry: with `use_comet`."""
    return Comet(settings) if settings.logging.use_comet else None


def trackio(settings: WriterSettings) -> Trackio | None:
    """Registry entry: with `use_trackio`."""
    return Trackio(settings) if settings.logging.use_trackio else None


def _mlflow_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_-. /:" else "_" for c in name)


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))
