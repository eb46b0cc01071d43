"""Metrics for Prometheus: a port to scrape, and a file for node_exporter's textfile collector.

train/lm_loss becomes the gauge deepy_train_lm_loss, and what follows the second name a label:
validation/lm_loss/books becomes deepy_validation_lm_loss{of="books"}. In groups that are measured for each part of the
model (gradient_norms/blocks.0.mlp.up.weight) or each task, all that follows the first name is the label.
"""

import logging
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.metrics.writers import MetricWriter, WriterSettings, user_errors

log = logging.getLogger(__name__)

WITH_A_SECOND_NAME = ("train", "runtime", "validation")
STEP, UPDATED = "deepy_step", "deepy_last_update_timestamp_seconds"


def gauge_of(name: str) -> tuple[str, str]:
    """The gauge of a metric, and its label `of`, which is "" for most."""
    first, _, rest = name.partition("/")
    second, _, label = rest.partition("/") if first in WITH_A_SECOND_NAME else ("", "", rest)
    words = [re.sub(r"[^a-zA-Z0-9_]", "_", word) for word in ("deepy", first, second) if word]
    return "_".join(words), label


class Latest:
    """The latest value of each metric, as prometheus_client collects them."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], float] = {}

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Take over the values of `step`; those of other names stay."""
        new = {gauge_of(name): float(value) for name, value in values.items()}
        self._values = self._values | new | {(STEP, ""): float(step), (UPDATED, ""): time.time()}

    def collect(self) -> Iterator[Any]:
        """One family of gauges for each name."""
        from prometheus_client.core import GaugeMetricFamily

        families: dict[str, Any] = {}
        for (name, label), value in self._values.items():
            if name not in families:
                families[name] = GaugeMetricFamily(name, "A metric of the run.", labels=("of",))
            families[name].add_metric((label,), value)
        return iter(families.values())


class _Prometheus(MetricWriter):
    """Keeps the latest values in a registry of its own."""

    in_background = True

    def __init__(self, key: str) -> None:
        with user_errors(f"{key} is set"):
            from prometheus_client import CollectorRegistry
        self.latest, self.registry = Latest(), CollectorRegistry()
        self.registry.register(self.latest)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Show `values` from now on."""
        self.latest.update(step, values)


class ScrapePort(_Prometheus):
    """Serves the latest values at /metrics of a port."""

    def __init__(self, host: str, port: int) -> None:
        """host, port: to listen on."""
        super().__init__("prometheus_port")
        self._address = (host, port)
        self._server: Any = None

    def open(self) -> None:
        """Start to listen. Raises OSError if the port is taken."""
        from prometheus_client import start_http_server

        if self._server is None:
            host, port = self._address
            try:
                self._server, self._thread = start_http_server(port, host, self.registry)
            except OSError as error:
                raise OSError(error.errno, f"{host}:{port}: {error.strerror}") from error
            log.info("metrics for Prometheus: http://%s:%d/metrics", host, port)

    def close(self) -> None:
        """Free the port."""
        if self._server is not None:
            server, self._server = self._server, None
            server.shutdown()
            server.server_close()
            self._thread.join()


class Textfile(_Prometheus):
    """Replaces a file by the latest values, at once: its reader never sees a part."""

    def __init__(self, path: Path) -> None:
        """path: ends in .prom, as node_exporter reads no others."""
        super().__init__("prometheus_textfile")
        self._path = path

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Replace the file."""
        from prometheus_client import write_to_textfile

        super().write(step, values)
        write_to_textfile(str(self._path), self.registry)


def scrape_port(settings: WriterSettings) -> ScrapePort | None:
    """Registry entry: with `prometheus_port`."""
    keys = settings.logging
    return ScrapePort(keys.prometheus_host, keys.prometheus_port) if keys.prometheus_port else None


def textfile(settings: WriterSettings) -> Textfile | None:
    """Registry entry: with `prometheus_textfile`."""
    path = settings.logging.prometheus_textfile
    return Textfile(Path(path)) if path else None
